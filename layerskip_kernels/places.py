"""How requests come into the cache, give their pages up when others need them, and come back with the same bits."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from time import perf_counter
from typing import Literal

from layerskip_kernels.kv_cache import PagedKVCache
from layerskip_kernels.request import Request

__all__ = ["Places", "Preemption", "Stats"]

Preemption = Literal["auto", "swap", "recompute"]
OUT_OF_ROOM = (MemoryError, RuntimeError)  # SwapError and CacheFull, and torch's own, of tensors without memory


@dataclass
class Stats:
    """What happened to requests that had to give way, since the engine was made."""

    preemptions: int = 0
    swapped_out: int = 0  # of the preemptions; the others were or will be computed again
    swapped_in: int = 0
    swap_errors: int = 0  # files not written or damaged: what they held was computed again


class Places:
    """The places of requests in a cache.

    A preempted request's K and V are swapped to host memory or into files in a folder under ``swap_dir``, or dropped
    and computed again: ``preemption`` says which, "auto" whichever takes less time by the measured rate of swapping
    and by ``recompute_seconds(length)`` (None: not known yet). Either way the bits are the same. A swap that fails
    is a recomputation.
    """

    FIRST_RATE = 1e9  # bytes per second, before anything was swapped
    LEARNING = 0.3

    def __init__(
        self,
        cache: PagedKVCache,
        preemption: Preemption,
        swap_dir: str | os.PathLike[str] | None,
        recompute_seconds: Callable[[int], float | None],
    ) -> None:
        self.cache = cache
        self.stats = Stats()
        self._preemption = preemption
        self._folder = None if swap_dir is None else Path(mkdtemp(prefix="layerskip-swap-", dir=swap_dir))
        if self._folder is not None:  # removed with this object, whatever is left in it
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._recompute_seconds = recompute_seconds
        self._rate = self.FIRST_RATE
        slots = self.cache.pool.num_pages * self.cache.pool.page_size
        self._position_bytes = (self.cache.k.nbytes + self.cache.v.nbytes) // slots

    def enter(self, request: Request) -> None:
        """Give a request a place. Texts of one prompt start from the pages of the first of them, if it is there."""
        leader = request.leader
        if request.swapped is not None:
            self._swap_in(request)
        elif leader is not None and leader.sequence is not None and len(request.known) == request.prompt_length:
            request.sequence = self.cache.fork(leader.sequence)
            self.cache.truncate(request.sequence, min(request.prompt_length - 1, self.cache.length(leader.sequence)))
            request.sequence.tokens[:] = request.known
        else:
            request.sequence = self.cache.add_sequence(request.known, request.salt)

    def preempt(self, request: Request) -> None:
        """Take a request's pages, to be given a place again later."""
        self.stats.preemptions += 1
        assert request.sequence is not None
        if not (self._swapping_pays(self.cache.length(request.sequence)) and self._swap_out(request)):
            self.leave(request)

    def leave(self, request: Request) -> None:
        """Take all a request has in the cache and outside; it keeps its tokens."""
        if request.sequence is not None:
            request.known = request.sequence.tokens
            self.cache.free(request.sequence)
        self._forget_swapped(request)
        request.sequence = None

    def _swapping_pays(self, length: int) -> bool:
        if self._preemption != "auto":
            return self._preemption == "swap"
        recompute_seconds = self._recompute_seconds(length)
        return recompute_seconds is None or 2 * length * self._position_bytes / self._rate < recompute_seconds

    def _swap_out(self, request: Request) -> bool:
        sequence = request.sequence
        assert sequence is not None
        length, start = self.cache.length(sequence), perf_counter()
        try:
            path = None if self._folder is None else self._folder / f"{request.id}.kv"
            request.swapped = self.cache.swap_out(sequence, path)
        except OUT_OF_ROOM:
            self.stats.swap_errors += 1
            return False
        self._learn(length, perf_counter() - start)
        self.stats.swapped_out += 1
        return True

    def _swap_in(self, request: Request) -> None:
        """What can't be brought back is computed again: the sequence has its tokens and nothing in the cache yet."""
        assert request.sequence is not None and request.swapped is not None
        start = perf_counter()
        try:
            self.cache.swap_in(request.sequence, request.swapped)
        except OUT_OF_ROOM:
            self.stats.swap_errors += 1
        else:
            self.stats.swapped_in += 1
            self._learn(self.cache.length(request.sequence), perf_counter() - start)
        self._forget_swapped(request)

    def _forget_swapped(self, request: Request) -> None:
        if isinstance(request.swapped, Path):
            request.swapped.unlink(missing_ok=True)
        request.swapped = None

    def _learn(self, length: int, seconds: float) -> None:
        if length:
            self._rate += self.LEARNING * (length * self._position_bytes / seconds - self._rate)
