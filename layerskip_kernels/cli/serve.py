"""``layerskip serve``: the OpenAI API and a page to look at, over one engine."""

from __future__ import annotations

import argparse
import math
import os
import signal
from typing import Any

from layerskip_kernels.cli.options import add_command, add_model_options, add_threads_option, load, positive

__all__ = ["add_serve_command"]

LEAVING_SECONDS = 5  # for clients to read the ends of their streams, after which connections are closed
KEY_VARIABLE = "LAYERSKIP_API_KEY"
MISSING = "layerskip serve needs packages that are not installed; run: pip install starlette uvicorn prometheus-client"


def add_serve_command(commands: Any) -> None:
    parser = add_command(commands, "serve", _serve, "serve a model over the OpenAI API, with a page at /")
    add_model_options(parser)
    add_threads_option(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free one")
    parser.add_argument("--api-key", metavar="KEY", help=f"asked of every client (or ${KEY_VARIABLE}; default: none)")
    parser.add_argument("--model-name", metavar="NAME", help="what clients call the model (default: its own name)")
    parser.add_argument("--max-batch", type=positive, default=8, help="requests that run at a time (default: 8)")
    parser.add_argument("--memory", type=float, default=1.0, metavar="GIB", help="for the cache (default: 1)")
    parser.add_argument("--max-queue", type=positive, default=256, help="requests in progress at most (default: 256)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for one request (default: none)")
    parser.add_argument("--drain", type=float, default=30.0, metavar="SECONDS", help="for what runs at SIGTERM")


def _serve(args: argparse.Namespace) -> int:
    try:
        import uvicorn

        from layerskip_kernels.serving.app import ServerSettings, build_app
        from layerskip_kernels.serving.http_server import HttpServer
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{MISSING} ({error.name} is missing)") from error
    from layerskip_kernels.engine.engine import Engine

    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port must be in 0..65535, got {args.port}")
    if not 0 < args.memory < 1 << 20:
        raise ValueError(f"--memory must be a number of GiB above 0, got {args.memory}")
    model = load(args)
    engine = Engine(model, memory=int(args.memory * (1 << 30)), max_batch=args.max_batch)
    settings = ServerSettings(
        model_name=args.model_name or model.name,
        api_key=args.api_key or os.environ.get(KEY_VARIABLE),
        max_queue=args.max_queue,
        timeout=args.timeout,
        drain=args.drain,
    )
    app = build_app(engine, settings)
    config = uvicorn.Config(app, host=args.host, port=args.port, log_level="warning", access_log=False)
    config.timeout_graceful_shutdown = math.ceil(args.drain) + LEAVING_SECONDS
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn ends in order, then raises what it was ended by once more
        signal.signal(number, lambda *_: None)
    HttpServer(config, settings.model_name, lambda: app.state.server.worker.drain(args.drain)).run()
    return 0
