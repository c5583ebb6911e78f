"""How requests get into the cache, lose their pages when others need them, and come back with the same bits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

from layerskip_kernels.decoding.kv_cache import PagedKVCache
from layerskip_kernels.decoding.swap import SwapFolder
from layerskip_kernels.engine.request import Request

__all__ = ["CacheManager", "Preemption", "Stats"]

Preemption = Literal["auto", "swap", "recompute"]
RECOVERABLE = (MemoryError, RuntimeError)  # SwapError and CacheFull, and torch's own, of tensors without memory


@dataclass
class Stats:
    """What went other than planned since the engine was made. Results are the same all the same."""

    preemptions: int = 0
    swapped_out: int = 0  # of the preemptions; the others were or will be computed again
    swapped_in: int = 0
    swap_errors: int = 0  # K and V not written or not readable: computed again
    draft_errors: int = 0  # requests whose drafting failed in a step and that then decoded plainly
    batch_errors: int = 0  # steps that failed, and of which every half succeeded

    def count(self, kind: str, what: str, error: Exception) -> None:
        """Count an error that was worked around, and warn about the first of its kind."""
        setattr(self, kind, getattr(self, kind) + 1)
        if getattr(self, kind) == 1:
            message = f"{what}: {type(error).__name__}: {str(error)[:300]} (Engine.stats.{kind} counts these)"
            warnings.warn(message, RuntimeWarning, stacklevel=2)


class CacheManager:
    """Admits requests to a cache, preempts them, and releases what they hold.

    A preempted request's K and V are swapped to host memory or into files in a folder under ``swap_dir``, or dropped
    and computed again: ``preemption`` says which, "auto" whichever takes less time by the measured rate of swapping
    and by ``recompute_seconds(length)`` (None: not known yet). Either way the bits are the same. A swap that fails
    is a recomputation.
    """

    FIRST_RATE = 1e9  # bytes per second, before anything was swapped
    LEARNING = 0.3  # weight of the newest measurement of that rate

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
        self._folder = None if swap_dir is None else SwapFolder(swap_dir)
        self._recompute_seconds = recompute_seconds
        self._rate = self.FIRST_RATE
        slots = self.cache.pool.num_pages * self.cache.pool.page_size
        self._position_bytes = (self.cache.all_k.nbytes + self.cache.all_v.nbytes) // slots

    def admit(self, request: Request) -> None:
        """Give a request a sequence in the cache.

        Texts of one prompt start from the pages of the first of them, if that one is there.
        """
        leader = request.leader
        if request.swapped is not None:
            self._swap_in(request)
        elif leader is not None and leader.sequence is not None and len(request.known) == request.prompt_length:
            request.sequence = self.cache.fork(leader.sequence)
            self.cache.truncate(request.sequence, min(request.prompt_length - 1, self.cache.length(leader.sequence)))
            request.sequence.tokens[:] = request.known
        else:
            request.sequence = self.cache.add_sequence(request.known, request.salt)
            if not request.generation.token_ids:
                request.generation.cached_tokens = self.cache.length(request.sequence)

    def preempt(self, request: Request) -> None:
        """Take a request's pages; it is admitted again later."""
        self.stats.preemptions += 1
        assert request.sequence is not None
        if not (self._swapping_pays(self.cache.length(request.sequence)) and self._swap_out(request)):
            self.release(request)

    def release(self, request: Request) -> None:
        """Take all that a request holds in the cache and outside; it keeps its tokens."""
        if request.sequence is not None:
            request.known = request.sequence.tokens
            self.cache.free(request.sequence)
        request.sequence = None
        self._forget_swapped(request)

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
            path = None if self._folder is None else self._folder.path / f"{request.id}.kv"
            request.swapped = self.cache.swap_out(sequence, path)
        except RECOVERABLE as error:
            self.stats.count("swap_errors", "K and V could not be swapped out and will be computed again", error)
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
        except RECOVERABLE as error:
            self.stats.count("swap_errors", "K and V could not be swapped in and are computed again", error)
        else:
            self.stats.swapped_in += 1
            self._learn(self.cache.length(request.sequence), perf_counter() - start)
        self._forget_swapped(request)

    def _forget_swapped(self, request: Request) -> None:
        if isinstance(request.swapped, Path):
            with suppress(OSError):  # whatever became of the folder, the request goes on
                request.swapped.unlink()
        request.swapped = None

    def _learn(self, length: int, seconds: float) -> None:
        if length and seconds > 0:
            self._rate += self.LEARNING * (length * self._position_bytes / seconds - self._rate)
