"""Deferred signals: what must change together changes together.

Python runs a signal's handler between two instructions of the main thread and in no other thread. A handler that raises
(Ctrl-C's own does; so does a time limit by SIGALRM, or an orderly end at SIGTERM) cannot tell a state that is half
changed from one that is whole.
"""

from __future__ import annotations

import _signal  # what `signal` wraps to give names to numbers, which takes eight times as long as the rest of a block
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["DeferredInterrupt"]


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class DeferredInterrupt:
    """``with DeferredInterrupt() as interrupt:`` a Ctrl-C inside takes effect at the end of the block.

    It then does what it would have done: raise KeyboardInterrupt, or call whatever handler there is. So does each of
    ``SIGNALS`` that has a handler in Python. While ``interrupt.held`` is False, they take effect at once. Both are
    plain assignments, so nothing can come between them and what they guard. Blocks may be nested: only the outermost
    one delivers.
    """

    def __init__(self) -> None:
        self.held = True
        self._asked: dict[int, FrameType | None] = {}
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def __enter__(self) -> DeferredInterrupt:
        try:
            for number in SIGNALS:
                before = _signal.getsignal(number)
                if callable(before):
                    self._before[number] = before
                    _signal.signal(number, self._on_signal)
        except BaseException as error:
            if not isinstance(error, ValueError):  # one of them came before it was deferred
                self._restore()
                raise
            self._before.clear()  # not the main thread: no signal arrives here
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._restore()
        except BaseException:
            self._restore()  # one of them came between two
            raise
        finally:
            self.deliver()

    def _restore(self) -> None:
        for number, before in self._before.items():
            _signal.signal(number, before)

    def deliver(self) -> None:
        """Let the signals that were deferred take effect now."""
        if self._asked:
            number, frame = self._asked.popitem()
            try:
                self._before[number](number, frame)
            finally:
                self.deliver()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked[number] = frame
        if not self.held:
            self.deliver()
