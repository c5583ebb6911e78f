"""Cycles of decoding one after the other, by the passes of any backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip_kernels.operands import (
    AdapterLayers,
    CacheTensors,
    Cycle,
    Drafted,
    DraftHead,
    DraftRows,
    DraftStops,
    ModelSizes,
    ModelWeights,
    PendingRows,
)
from layerskip_kernels.ops.backend import Backend

__all__ = ["cycles_by_passes"]


def cycles_by_passes(
    ops: Backend,
    weights: ModelWeights,
    drafting: ModelWeights,
    sizes: ModelSizes,
    cache: CacheTensors,
    rows: DraftRows,
    head: DraftHead | None,
    exit_layer: int,
    num_cycles: int,
    ends: Tensor,
    stops: DraftStops | None = None,
    adapters: Sequence[AdapterLayers] = (),
) -> list[Cycle]:
    """What a backend's decode_pass does: up to ``num_cycles`` greedy cycles, in each of which a sequence drafts
    num_drafts[b] tokens (0: plain decoding) and goes on after those that the whole model accepts and the token that
    follows them.

    ``weights``: the model's; ``drafting``: those that draft_pass takes. ``ends`` int64 [B, E], -1 where there is none:
    the tokens that end each sequence's text; a cycle in which one comes is the last. ``adapters``: those up to the exit
    and all that attend. ``rows.block_table`` needs pages for num_cycles * (num_drafts[b] + 1) positions. The rest as in
    draft_pass. What is returned is on the host.
    """
    tokens, positions, most = rows.tokens, rows.positions, int(rows.num_drafts.max())
    judged = torch.ones(len(tokens), dtype=torch.bool)
    to_exit = [adapter for adapter in adapters if adapter.exit_layer <= exit_layer]
    attending = [adapter for adapter in adapters if len(adapter.cache.k) > 1]  # one alone has neither K nor V
    cycles: list[Cycle] = []
    while len(cycles) < num_cycles and not (cycles and _ended(cycles[-1], ends.tolist())):
        begun, drafted = ops.mark(), Drafted.none(len(tokens))
        if most:
            at = DraftRows(tokens, positions, rows.num_drafts, rows.block_table)
            drafted = ops.draft_pass(
                drafting, sizes, cache, at, head, exit_layer, most, stops=stops, adapters=to_exit
            )  # fmt: skip
        [drafts] = ops.to_host(cache.k, drafted.tokens)
        verifying = ops.mark()
        pending = _pending(ops, tokens, positions, drafts, drafted.counts, exit_layer, rows.block_table)
        judgement = ops.verify_pass(weights, sizes, cache, pending, drafted.counts, judged, adapters=attending)
        num_accepted, next_tokens = ops.to_host(cache.k, *judgement[:2])
        seconds = verifying - begun, ops.mark() - verifying
        cycles.append(Cycle(drafts, drafted.counts, drafted.confidences, num_accepted, next_tokens, *seconds))
        tokens, positions = next_tokens, positions + num_accepted + 1
    return cycles


def _pending(
    ops: Backend,
    tokens: Tensor,
    positions: Tensor,
    drafts: Tensor,
    counts: Tensor,
    exit_layer: int,
    block_table: Tensor,
) -> PendingRows:
    """Each sequence's last token and its drafts, of which the last has passed no layer yet."""
    ids: list[int] = []
    places: list[int] = []
    depths: list[int] = []
    starts = [0]
    of_each = zip(tokens.tolist(), positions.tolist(), drafts.tolist(), counts.tolist(), strict=True)
    for token, position, row, count in of_each:
        ids += [token, *row[:count]]
        places += range(position, position + count + 1)
        depths += [exit_layer] * count + [0]
        starts.append(len(ids))
    row_tokens, row_positions, table = ops.to_device(torch.tensor(ids), torch.tensor(places), block_table)
    return PendingRows(
        row_tokens, row_positions, torch.tensor(depths, dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32), table,
    )  # fmt: skip


def _ended(cycle: Cycle, ends: Sequence[Sequence[int]]) -> bool:
    """Whether a sequence has gained a token that ends its text."""
    gained = zip(cycle.drafts.tolist(), cycle.num_accepted.tolist(), cycle.next_tokens.tolist(), strict=True)
    return any(
        not {*drafts[:accepted], next_token}.isdisjoint(of)
        for (drafts, accepted, next_token), of in zip(gained, ends, strict=True)
    )
