"""How many tokens each request of a step drafts, and what the steps say about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal
from weakref import WeakKeyDictionary

import torch

from layerskip_kernels.decoding.types import Verdict
from layerskip_kernels.engine.acceptance import Pool
from layerskip_kernels.engine.costs import StepCosts
from layerskip_kernels.engine.draft_lengths import DraftLengths
from layerskip_kernels.engine.drafts import Drafts
from layerskip_kernels.engine.request import Request
from layerskip_kernels.engine.scheduler import Work
from layerskip_kernels.model.model import Model
from layerskip_kernels.operands import DraftHead, ModelWeights

__all__ = ["DraftPlanner", "DraftPolicy"]

DraftPolicy = Literal["measured", "fixed", "auto"]


class Known:
    """What one engine tells the next about a model. It changes how much is drafted, and never a token."""

    def __init__(self) -> None:
        self.pool = Pool()
        self._costs: dict[int, StepCosts] = {}

    def costs_of_threads(self) -> StepCosts:
        """The costs with the present number of threads."""
        return self._costs.setdefault(torch.get_num_threads(), StepCosts())


_known: WeakKeyDictionary[ModelWeights | DraftHead, Known] = WeakKeyDictionary()


def known_of(model: Model) -> Known:
    """What is known of a model: of what drafts with one head, or up to one adapter. It goes when that goes."""
    what = model.exit_adapters[-1] if model.exit_adapters else model
    return _known.setdefault(what.draft_head or what.weights, Known())


class DraftPlanner:
    """Fixed numbers of drafts, or those that pay by the times and acceptance of earlier steps (see Engine).

    Where none pay, it rests for some steps of the same requests: they draft nothing, and are not measured. Steps that
    would be alike are taken as cycles of one, as many as fit into CALL_SECONDS: what stands between two calls is time.
    """

    CALL_SECONDS, MOST_CYCLES = 0.03, 8

    def __init__(self, model: Model, policy: DraftPolicy) -> None:
        self._policy = policy
        self._num_layers = model.config.num_layers
        known = known_of(model)
        self._lengths = DraftLengths(model, known.costs_of_threads(), known.pool)
        self._resting: list[int] = []  # the requests that draft nothing for
        self._rest = self._rested = 0  # steps to come, and gone by
        self._paced: list[int] = []  # the requests that the pace is of
        self._pace = 0.0  # seconds of a cycle

    def prompt_seconds(self, rows: int) -> float | None:
        """How long this many rows of a prompt take; None before anything was measured."""
        return self._lengths.prompt_seconds(rows)

    def choose(self, plan: Sequence[Work]) -> list[Work]:
        """The plan, with a number of drafts for each request that decodes, and of cycles."""
        plan = self._with_drafts(plan)
        cycles = self._num_cycles(plan)
        more = max(0, cycles - 1)
        if self._rested:
            self._rest, self._rested = self._rest - more, self._rested + more
        elif any(self._measures(work.request) for work in plan):
            self._lengths.repeated(more)
        return [replace(work, cycles=cycles) for work in plan] if cycles else plan

    def _num_cycles(self, plan: Sequence[Work]) -> int:
        """How many cycles of this plan one call may pass; 0: it takes steps of its own."""
        requests = [work.request for work in plan]
        if not requests or not requests[0].model.ops.runs_cycles:
            return 0
        if not all(work.decodes and work.request.runs and work.request.depth == self._num_layers for work in plan):
            return 0
        if len({work.drafts.exit_layer for work in plan if work.drafts.count}) > 1:
            return 0
        if self._pace <= 0 or [request.id for request in requests] != self._paced:
            return 1
        most = min(self.MOST_CYCLES, int(self.CALL_SECONDS / self._pace))
        if self._rested:
            most = min(most, self._rest + 1)
        elif any(request.exits and self._measures(request) for request in requests):
            most = min(most, self._lengths.repeats() + 1)
        return max(1, min(most, *(work.request.num_left // (work.drafts.count + 1) for work in plan)))

    def _with_drafts(self, plan: Sequence[Work]) -> list[Work]:
        if self._rest and [work.request.id for work in plan] == self._resting and all(work.decodes for work in plan):
            self._rest, self._rested = self._rest - 1, self._rested + 1
            return list(plan)
        self._lengths.rested(self._rested)
        self._rest = self._rested = 0
        decoding = [work for work in plan if work.decodes]
        measured = [work for work in decoding if self._measures(work.request)]
        chosen = {id(work): Drafts((*work.request.exits, 0)[0], work.request.max_drafts) for work in decoding}
        if measured:
            others = len(decoding) - len(measured)
            rows, complete = _prompt_rows(plan)
            requests = [work.request.draft_request for work in measured]
            best = self._lengths.choose(requests, rows + others, complete + others)
            if len(measured) == len(plan) and not any(drafts.count for drafts in best):
                self._resting, self._rest = [work.request.id for work in plan], self._lengths.rest()
            chosen |= {id(work): drafts for work, drafts in zip(measured, best, strict=True)}
        return [replace(work, drafts=chosen.get(id(work), work.drafts)) for work in plan]

    def record(
        self,
        plan: Sequence[Work],
        verdict: Verdict,
        draft_seconds: float,
        verify_seconds: float,
        besides: float = 0.0,
    ) -> None:
        """Take note of what a cycle cost and gained, for each request and for the next choice, which does not regard
        what its call took ``besides``: that is shared by more cycles or fewer."""
        self._paced, self._pace = [work.request.id for work in plan], draft_seconds + verify_seconds + besides
        decoding = [b for b, work in enumerate(plan) if work.decodes]
        for work in plan:
            generation = work.request.generation
            generation.cycles += not work.waiting and bool(generation.token_ids)
            if not work.decodes:
                generation.prefill_seconds += draft_seconds + verify_seconds + besides
        for b in decoding:
            generation = plan[b].request.generation
            generation.drafted += verdict.draft.counts[b]
            generation.accepted += verdict.accepted[b]
            generation.draft_seconds += draft_seconds
            generation.verify_seconds += verify_seconds + besides
        if not self._rested:
            self._learn(plan, decoding, verdict, draft_seconds, verify_seconds)

    def _learn(
        self,
        plan: Sequence[Work],
        decoding: Sequence[int],
        verdict: Verdict,
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        """Where nobody chooses drafts, only what prompts cost is asked for; an early exit says nothing about either."""
        prompt = _prompt_rows(plan)
        asked = prompt[0] > 0 or any(self._measures(plan[b].request) for b in decoding)
        if asked and plan[0].request.depth == self._num_layers:
            draft = verdict.draft
            self._lengths.learn(
                [plan[b].request.draft_request for b in decoding],
                [(plan[b].drafts.exit_layer, draft.counts[b]) for b in decoding],
                [verdict.accepted[b] for b in decoding],
                prompt,
                draft_seconds,
                verify_seconds,
                [draft.confidences.get(b) for b in decoding],
            )

    def _measures(self, request: Request) -> bool:
        if self._policy == "auto":
            return request.leaves_drafting_open
        return self._policy == "measured" or request.config.asks_for_auto


def _prompt_rows(plan: Sequence[Work]) -> tuple[int, int]:
    """Rows of prompts, and how many of these prompts are complete with them: as StepRows counts them."""
    prompts = [work for work in plan if not work.decodes]
    return sum(work.rows for work in prompts), sum(not work.waiting for work in prompts)
