"""A server on a port of this machine, in a thread of its own."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from layerskip_kernels import Engine, Model
from layerskip_kernels.serving.app import ServerSettings, build_app
from layerskip_kernels.serving.http_server import HttpServer


@dataclass
class Server:
    url: str
    engine: Engine
    model: Model

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def text(self, **body: Any) -> dict[str, Any]:
        """The only choice of a completion that must succeed."""
        response = self.post("/v1/completions", **body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    def all_pages_free(self) -> bool:
        """Once nothing runs, within a second."""
        for _ in range(100):
            stats = self.engine.cache.stats()
            if stats.num_owned == 0 and stats.num_sequences == 0 and self.engine.num_unfinished == 0:
                self.engine.cache.check_integrity()
                return True
            time.sleep(0.01)
        return False


@contextmanager
def serving(model: Model, max_batch: int = 8, memory: int = 16 << 20, **settings: Any) -> Iterator[Server]:
    """``settings``: of ServerSettings. Drafts as each request says, whatever the machine's load makes of their cost."""
    engine = Engine(model, memory=memory, max_batch=max_batch, drafts="fixed")
    app = build_app(engine, ServerSettings(**{"model_name": "tiny", "drain": 5.0, **settings}))
    config = uvicorn.Config(app, port=0, log_level="warning")
    server = HttpServer(config, "tiny", lambda: app.state.server.worker.drain(5.0))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Server(f"http://127.0.0.1:{port}", engine, model)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()
