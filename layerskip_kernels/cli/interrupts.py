"""What Ctrl-C does in each phase of a command."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["INTERRUPTED", "MESSAGE", "NotedInterrupt", "exit_on_interrupt", "raise_on_interrupt"]

INTERRUPTED = 130  # the exit status, as shells report it
MESSAGE = "layerskip: interrupted\n"


def exit_on_interrupt() -> None:
    """While packages are imported: end the process at once. Some of them swallow a KeyboardInterrupt."""
    signal.signal(signal.SIGINT, _exit)


def raise_on_interrupt() -> None:
    """From here on files may be half written, so Ctrl-C raises KeyboardInterrupt, and they are cleared away."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(_: int, __: FrameType | None) -> None:
    os.write(2, MESSAGE.encode())
    os._exit(INTERRUPTED)


class NotedInterrupt:
    """While entered, the first Ctrl-C only sets ``asked``; the second raises KeyboardInterrupt as usual."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> NotedInterrupt:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
