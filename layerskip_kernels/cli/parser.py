"""The parser of ``layerskip``: options before the command, and every command's own parser."""

from __future__ import annotations

import argparse
from typing import Any

from layerskip_kernels.cli import chat, comparison, evaluation, generation, harness, measurement, serve, training
from layerskip_kernels.cli.options import Parser, add_command, add_json_options, report

__all__ = ["build_parser"]


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. What it parses has ``run``, a function of the parsed arguments, and ``debug``."""
    parser = Parser(prog="layerskip", description="Early-exit self-speculative decoding, the same bits as plain.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=lambda _: _help(parser))
    commands = parser.add_subparsers(metavar="command")
    generation.add_commands(commands)
    chat.add_chat_command(commands)
    serve.add_serve_command(commands)
    for module in (comparison, measurement, evaluation):
        module.add_commands(commands)
    harness.add_eval_command(commands)
    training.add_commands(commands)
    doctor = add_command(commands, "doctor", _doctor, "what a bug report needs: versions, machine, backends")
    add_json_options(doctor)
    return parser


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 0


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from layerskip_kernels import __version__

        print(f"layerskip_kernels {__version__}")
        parser.exit()


def _doctor(args: argparse.Namespace) -> int:
    from layerskip_kernels.cli.doctor import as_text, diagnose

    found = diagnose()
    report(args, found, as_text(found))
    return 0
