"""What a step computes: drafts and verifications of a plan's requests, one cycle of them or several in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from layerskip_kernels.decoding.early_exit import early_exit_step
from layerskip_kernels.decoding.kv_cache import PagedKVCache
from layerskip_kernels.decoding.steps import decode_cycles, draft_step, verify_step
from layerskip_kernels.decoding.types import Draft, Verdict
from layerskip_kernels.engine.drafts import Drafts
from layerskip_kernels.engine.scheduler import Work, samplers, sequences
from layerskip_kernels.model.model import Model

__all__ = ["Passed", "forward"]


class Passed(NamedTuple):
    """One cycle: its verdict, the seconds of both steps, and its share of what its call took besides."""

    verdict: Verdict
    draft_seconds: float
    verify_seconds: float
    besides: float = 0.0


def forward(model: Model, cache: PagedKVCache, plan: Sequence[Work]) -> list[Passed]:
    """Draft and verify for requests of one depth. To be committed together."""
    return _cycles(model, cache, plan) if plan[0].cycles else [_one_cycle(model, cache, plan)]


def _cycles(model: Model, cache: PagedKVCache, plan: Sequence[Work]) -> list[Passed]:
    """As many as the plan says in one call."""
    start = model.ops.mark()
    drafts, ends = [work.drafts for work in plan], [work.request.ends for work in plan]
    exit_layer = max((d.exit_layer for d in drafts if d.count), default=0)  # there is but one
    counts = [d.count for d in drafts]
    cycles = decode_cycles(
        model, cache, sequences(plan), exit_layer, counts, plan[0].cycles, ends, Drafts.stops(drafts)
    )  # fmt: skip
    besides = model.ops.mark() - start - sum(drafting + verifying for _, drafting, verifying in cycles)
    return [Passed(*cycle, besides / len(cycles)) for cycle in cycles]


def _one_cycle(model: Model, cache: PagedKVCache, plan: Sequence[Work]) -> Passed:
    start = model.ops.mark()  # a device may begin to draft after draft_step has returned
    draft = _draft(model, cache, plan)
    drafted = model.ops.mark()
    depth = plan[0].request.depth
    if depth < model.config.num_layers:
        waiting = [work.waiting for work in plan]
        verdict = early_exit_step(model, cache, sequences(plan), depth, waiting, samplers(plan))
    else:
        verdict = verify_step(model, cache, draft, samplers(plan))
    return Passed(verdict, drafted - start, model.ops.mark() - drafted)


def _draft(model: Model, cache: PagedKVCache, plan: Sequence[Work]) -> Draft:
    """One draft_step for each exit layer, joined."""
    parts = []
    drafting = [work for work in plan if work.drafts.count]
    for exit_layer in sorted({work.drafts.exit_layer for work in drafting}):
        group = [work for work in drafting if work.drafts.exit_layer == exit_layer]
        counts, stops = [work.drafts.count for work in group], Drafts.stops([work.drafts for work in group])
        parts.append(draft_step(model, cache, sequences(group), exit_layer, counts, samplers(group), stops))
    return Draft.joined(sequences(plan), parts, [work.waiting for work in plan])
