"""When a measured speed-up is not a result: it cannot be true, rounds differ too much, or the machine was busy."""

from __future__ import annotations

import os
from time import perf_counter

__all__ = ["MAX_OTHERS", "MAX_SPREAD", "MIN_ROUNDS", "OtherWork", "doubt_of", "plural"]

MIN_ROUNDS = 2  # one round shows no spread
MAX_SPREAD = 0.25  # of the median: the distance between the slowest and the fastest round
MAX_OTHERS = 0.5  # CPUs that other processes may use meanwhile


def doubt_of(
    speedup: float,
    tokens_per_cycle: float | None = None,
    spread: tuple[float, float] | None = None,
    rounds: int | None = None,
    other_cpus: float | None = None,
) -> str | None:
    """Why a speed-up over plain decoding is not to be trusted, in a few words; None where nothing speaks against it.

    A verification is at least one pass of the whole model, so that a cycle cannot gain more than its tokens.
    ``spread``: the lowest and the highest speed-up of the rounds. What is None is not judged.
    """
    if tokens_per_cycle is not None and speedup > tokens_per_cycle:
        return f"impossible: {speedup:.2f}x with {tokens_per_cycle:.2f} tokens per verification"
    if rounds is not None and rounds < MIN_ROUNDS:
        return "one round shows no spread"
    if spread is not None and spread[1] - spread[0] > MAX_SPREAD * speedup:
        return f"rounds differ from {spread[0]:.2f}x to {spread[1]:.2f}x"
    if other_cpus is not None and other_cpus > MAX_OTHERS:
        return f"other processes used {other_cpus:.1f} CPUs meanwhile"
    return None


class OtherWork:
    """How many CPUs other processes used between making it and ``cpus()``: the load of everybody else."""

    def __init__(self) -> None:
        self._start = _busy(), _own(), perf_counter()

    def cpus(self) -> float | None:
        """On average; None where the system does not tell (no /proc/stat)."""
        (busy, own, start), now = self._start, _busy()
        if busy is None or now is None:
            return None
        seconds = max(perf_counter() - start, 1e-9)
        return round(max(0.0, (now - busy - (_own() - own)) / seconds), 2)


def _busy() -> float | None:
    """CPU seconds that this machine has spent on anything."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, irq, soft, *_ = map(int, file.readline().split()[1:])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def plural(count: int, noun: str) -> str:
    """ "1 prompt", "2 prompts"."""
    return f"{count} {noun}" + "s" * (count != 1)
