"""What a fork does to an engine that another thread is using: the child has no such thread to wait for."""

from __future__ import annotations

import os
import weakref
from threading import RLock
from typing import Any, NoReturn, Protocol

__all__ = ["lock_of"]


class _Locked(Protocol):
    _lock: Any  # an RLock, which must stay one: a lock in Python could be left held by a Ctrl-C as it is entered


class _LostLock:
    """Where another thread held an engine's lock as the process forked, the engine is as that left it, in the middle of
    something: entering it in the child raises RuntimeError."""

    def __enter__(self) -> NoReturn:
        raise RuntimeError(
            "another thread was using this engine when the process forked, so the child cannot; make an Engine of its "
            "own in the child"
        )

    def __exit__(self, *_: object) -> None:
        pass


_watched: weakref.WeakSet[Any] = weakref.WeakSet()


def lock_of(engine: _Locked) -> Any:
    """The lock of a new engine, an RLock, which is seen to in every child that is forked."""
    _watched.add(engine)
    return RLock()


def _after_fork() -> None:
    for engine in list(_watched):
        lock = getattr(engine, "_lock", None)
        if lock is None or isinstance(lock, _LostLock):
            continue  # about to be made by another thread, or of a child's child
        if lock.acquire(blocking=False):
            lock.release()
        else:
            engine._lock = _LostLock()


os.register_at_fork(after_in_child=_after_fork)
