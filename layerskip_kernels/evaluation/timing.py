"""The one timer: candidates in turn, so that what slows the machine slows them all. benchmarks/ uses it as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from statistics import median, quantiles
from time import perf_counter
from typing import Any, TypeVar

from layerskip_kernels import machine
from layerskip_kernels.evaluation.bandwidth import MIN_BUFFER_BYTES

__all__ = ["MIN_ROUNDS", "Candidate", "Timing", "interleave", "num_copies", "rotating"]

MIN_ROUNDS = 5
T = TypeVar("T")


def _no_arguments() -> tuple[Any, ...]:
    return ()


@dataclass(frozen=True)
class Candidate:
    """Something to time: ``run(*prepare())``, then ``restore()``; only ``run`` counts.

    ``seconds`` reads the time from what ``run`` returned, where that knows it better than the clock.
    """

    run: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] = _no_arguments
    restore: Callable[[], object] = _no_arguments
    seconds: Callable[[Any], float] | None = None


@dataclass(frozen=True)
class Timing:
    """The seconds that a candidate took, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def iqr(self) -> float:
        """The distance between the quartiles; 0 for a single round."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return high - low


def interleave(
    candidates: Mapping[str, Candidate],
    min_rounds: int = MIN_ROUNDS,
    seconds: float = 0.0,
    warmup: int = 1,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, Timing]:
    """Time all candidates in each of at least ``min_rounds`` rounds, and go on until ``seconds`` have passed.

    What slows the machine for a while slows them all, so that ratios of their medians mean something. Each round
    starts one candidate later than the one before: none always follows the same other. ``warmup`` rounds come
    first and are forgotten.
    """
    names = list(candidates)
    for _ in range(warmup):
        for candidate in candidates.values():
            _time(candidate, clock)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start, rounds = clock(), 0
    while rounds < min_rounds or clock() - start < seconds:
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(_time(candidates[name], clock))
        rounds += 1
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _time(candidate: Candidate, clock: Callable[[], float]) -> float:
    arguments = candidate.prepare()
    start = clock()
    result = candidate.run(*arguments)
    elapsed = clock() - start
    candidate.restore()
    return elapsed if candidate.seconds is None else candidate.seconds(result)


def rotating(make: Callable[[], T], num_bytes: int, cache_bytes: int | None = None) -> Callable[[], T]:
    """A function that hands out what ``make`` made, copy after copy, so that operands come from memory.

    An op timed over and over on the same ``num_bytes`` of weights would find them in the cache, where a decoding
    step, which reads all layers before it returns to one, never does.
    """
    return cycle([make() for _ in range(num_copies(num_bytes, cache_bytes))]).__next__


def num_copies(num_bytes: int, cache_bytes: int | None = None) -> int:
    """How many operands of ``num_bytes`` are twice as large as the last-level caches (default: this machine's)."""
    if cache_bytes is None:
        cache_bytes = machine.last_level_cache_bytes(machine.usable_cpus()) or MIN_BUFFER_BYTES // 2
    return max(1, math.ceil(2 * cache_bytes / num_bytes))
