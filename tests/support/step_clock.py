"""Time that passes only in the steps of the engine, by their rows: seconds that can be compared exactly."""

from collections.abc import Callable

import pytest

from layerskip_kernels.decoding.steps import draft_step, verify_step
from layerskip_kernels.engine import forward
from layerskip_kernels.ops import memory
from layerskip_kernels.ops.cpu import CpuOps


class StepClock:
    """Stands in for perf_counter, draft_step and verify_step in the engine.

    Each draft of a batch takes ``draft`` seconds, a verification ``verify`` and ``row`` more for each row of it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, draft: float = 3.0, verify: float = 5.0, row: float = 0.0):
        self.now = 0.0
        self.drafts = self.verifications = 0
        self._costs = draft, verify, row
        monkeypatch.setattr(memory, "perf_counter", lambda: self.now)
        monkeypatch.setattr(CpuOps, "runs_cycles", False)
        monkeypatch.setattr(forward, "draft_step", self._timed(draft_step, self._draft_seconds))
        monkeypatch.setattr(forward, "verify_step", self._timed(verify_step, self._verify_seconds))

    def _timed(self, step: Callable, seconds: Callable) -> Callable:
        def timed(model, cache, *arguments):
            started = seconds(cache, *arguments)
            result = step(model, cache, *arguments)
            self.now += started(result)
            return result

        return timed

    def _draft_seconds(self, *_) -> Callable:
        self.drafts += 1
        return lambda draft: max(draft.counts) * self._costs[0]

    def _verify_seconds(self, cache, draft, samplers) -> Callable:
        self.verifications += 1
        known = sum(len(s.tokens) - cache.length(s) for s in draft.sequences)
        rows = known + sum(draft.counts) - sum(draft.num_waiting)
        return lambda _: self._costs[1] + self._costs[2] * rows
