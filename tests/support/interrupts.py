"""A Ctrl-C at a chosen point: wherever CPython runs signal handlers, counted."""

import dis
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupter:
    """Sends ``number`` at the events ``at`` of the calls made through it, and counts the events; its handler raises
    KeyboardInterrupt.

    ``within``: only those in functions of this name count (None: all).

    CPython runs a signal's handler in the main thread when a Python function is entered, when a function in C returns,
    and when a loop jumps back. These are the events, in all frames but the test's own.
    """

    def __init__(self, *at: int, within: str | None = None, number: signal.Signals = signal.SIGINT) -> None:
        self.at = at
        self.number = number
        self.within = within
        self.events = 0
        self.fired = 0
        self._files = {__file__}

    def until_done(self, call: Callable[[], T]) -> T:
        """What a call returns, made again where it is interrupted."""
        while True:
            try:
                return self.once(call)
            except KeyboardInterrupt:
                assert self.fired, "a Ctrl-C that nobody sent"

    def once(self, call: Callable[[], T]) -> T:
        self._files.add(call.__code__.co_filename)
        before = signal.signal(self.number, signal.default_int_handler)
        if self.fired < len(self.at) or not self.at:
            sys.settrace(self._trace)
            sys.setprofile(self._profile)
        try:
            return call()
        finally:
            sys.setprofile(None)
            sys.settrace(None)
            assert signal.signal(self.number, before) is signal.default_int_handler

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_return", "c_exception"):
            self._tick(frame)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        if event == "opcode" and _jumps_back(frame):
            self._tick(frame)
        return self._trace

    def _tick(self, frame: FrameType) -> None:
        if frame.f_code.co_filename in self._files or self.within not in (None, frame.f_code.co_name):
            return
        self.events += 1
        if self.events in self.at:
            self.fired += 1
            if self.fired == len(self.at):
                sys.setprofile(None)
                sys.settrace(None)
            signal.raise_signal(self.number)


def _jumps_back(frame: FrameType) -> bool:
    return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith(("JUMP_BACKWARD", "JUMP_ABSOLUTE"))
