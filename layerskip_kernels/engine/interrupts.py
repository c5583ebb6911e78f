"""Deferred Ctrl-C: what must change together changes together.

Python runs the SIGINT handler, which raises KeyboardInterrupt, between two instructions of the main thread and in no
other thread. The default handler cannot tell a state that is half changed from one that is whole.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["DeferredInterrupt"]


class DeferredInterrupt:
    """``with DeferredInterrupt() as interrupt:`` a Ctrl-C inside takes effect at the end of the block.

    It then does what it would have done: raise KeyboardInterrupt, or call whatever handler there is. While
    ``interrupt.held`` is False, Ctrl-C takes effect at once. Both are plain assignments, so nothing can come between
    them and what they guard. Blocks may be nested: only the outermost one delivers.
    """

    def __init__(self) -> None:
        self.held = True
        self._asked: tuple[int, FrameType | None] | None = None
        self._before: Callable[[int, FrameType | None], Any] | None = None

    def __enter__(self) -> DeferredInterrupt:
        before = signal.getsignal(signal.SIGINT)
        if callable(before):
            self._before = before
            try:
                signal.signal(signal.SIGINT, self._on_signal)
            except ValueError:  # not the main thread: no signal arrives here
                self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self.deliver()

    def deliver(self) -> None:
        """Let a Ctrl-C that was deferred take effect now."""
        if self._asked is not None and self._before is not None:
            asked, self._asked = self._asked, None
            self._before(*asked)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = number, frame
        if not self.held:
            self.deliver()
