"""The passes that the two steps of decoding are made of: run_layers, draft_pass, verify_pass, and accept_draft."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from layerskip_kernels.operands import (
    AdapterLayers,
    CacheTensors,
    Drafted,
    DraftHead,
    DraftRows,
    DraftSampling,
    DraftStops,
    JudgeSampling,
    ModelSizes,
    ModelWeights,
    PendingRows,
)
from layerskip_kernels.ops.reference.layers import (
    down_residual,
    embed_tokens,
    norm_gate_up_act,
    norm_head_argmax,
    norm_qkv_rope_append,
    out_residual,
    paged_attention,
)
from layerskip_kernels.ops.reference.sampling import (
    MASS_ONE,
    _masses,
    edit_logits,
    filter_logits,
    gumbel_argmax,
    rejection_sample,
)


def run_layers(
    weights: ModelWeights, sizes: ModelSizes, cache: CacheTensors, rows: PendingRows, stop: int
) -> None:  # fmt: skip
    """The one move of the staircase: raise every row from its own depth to layer ``stop``, in 1..L.

    A row of depth 0 starts from its embedding, any other from its kept hidden state. Writes K and V of the layers
    passed, and the hidden states at ``stop``.
    """
    S, D = cache.hidden.shape[1:]
    sequence_of_row = torch.repeat_interleave(rows.query_start_loc.diff().long())
    page = rows.block_table[sequence_of_row, rows.positions // S].long()
    slots = page * S + rows.positions % S
    embedded = embed_tokens(rows.tokens, weights.embedding, D, cache.hidden.dtype, sizes.embedding_multiplier)
    hidden = torch.where((rows.depths == 0)[:, None], embedded, cache.hidden.view(-1, D)[slots])
    for layer in range(int(rows.depths.min()), stop):
        w = weights.layers[layer]
        active = rows.depths <= layer
        rows_of_sequence = torch.bincount(sequence_of_row[active], minlength=len(rows.query_start_loc) - 1)
        active_start_loc = torch.nn.functional.pad(rows_of_sequence.cumsum(0), (1, 0))
        h, norm = hidden[active], (sizes.eps, sizes.norm_offset)
        if w.attends:
            positions, k_pages, v_pages = rows.positions[active], cache.k[layer], cache.v[layer]
            cos, sin = weights.rope(sizes.ropes[layer])
            q = norm_qkv_rope_append(
                h, w.attn_norm, w.wq, w.wk, w.wv, w.qkv_bias, cos, sin, positions, slots[active], k_pages, v_pages,
                sizes.num_heads, *norm, w.q_norm, w.k_norm,
            )  # fmt: skip
            attention = paged_attention(
                q, k_pages, v_pages, rows.block_table, active_start_loc, positions, sizes.scale, sizes.windows[layer],
                sizes.score_cap,
            )  # fmt: skip
            h = out_residual(attention, w.wo, w.out_bias, h, w.attn_post_norm, *norm, sizes.residual_multiplier)
        activation = norm_gate_up_act(
            h, w.mlp_norm, w.w_gate, w.w_up, sizes.intermediate_size, *norm, w.gate_up_bias, sizes.gelu
        )
        hidden[active] = down_residual(
            activation, w.w_down, h, w.down_bias, w.mlp_post_norm, *norm, sizes.residual_multiplier
        )
    cache.hidden.view(-1, D)[slots] = hidden


def draft_pass(
    weights: ModelWeights,
    sizes: ModelSizes,
    cache: CacheTensors,
    rows: DraftRows,
    head: DraftHead | None,
    exit_layer: int,
    max_drafts: int,
    sampling: DraftSampling | None = None,
    stops: DraftStops | None = None,
    keep_scores: bool = False,
    adapters: Sequence[AdapterLayers] = (),
) -> Drafted:
    """Draft up to num_drafts[b] tokens for each sequence with the first ``exit_layer`` layers, one row at a time.

    On its way a row passes the layers of ``adapters`` at their exits and leaves its K and V there; the head sees what
    comes of one at ``exit_layer``, and of no other. The kept hidden states stay those of the exit. ``head`` restricts
    what drafts can be; None: all tokens. ``sampling``: how they are drawn; None:
    the greatest logit. ``stops``: where a sequence stops before; None: nowhere. ``keep_scores``: return what drafts
    were drawn from. Raises RuntimeError where a logit is NaN or nothing can be drawn.
    """
    sequences = len(rows.tokens)
    drafts, counts = torch.full((sequences, max_drafts), -1), torch.zeros(sequences, dtype=torch.int64)
    confidences, expected = torch.zeros(sequences, max_drafts), torch.ones(sequences)
    scores = torch.full((sequences if keep_scores else 0, max_drafts, sizes.vocab_size), -torch.inf)
    head_weight = weights.lm_head if head is None else head.weight
    ids = torch.arange(sizes.vocab_size) if head is None else head.ids
    tokens, S = rows.tokens.clone(), cache.hidden.size(1)
    going_on = rows.num_drafts > 0
    for i in range(max_drafts):
        drafting = going_on.nonzero()[:, 0]
        count = len(drafting)
        if count == 0:
            break
        positions, table = rows.positions[drafting] + i, rows.block_table[drafting]
        pending = PendingRows(
            tokens[drafting], positions, torch.zeros(count, dtype=torch.int32), torch.arange(count + 1), table
        )
        for adapter in adapters:
            run_layers(weights, sizes, cache, pending, adapter.exit_layer)
            hidden = adapted(adapter, pending)
            pending = pending.raised_to(adapter.exit_layer)
        if not adapters or adapters[-1].exit_layer < exit_layer:
            run_layers(weights, sizes, cache, pending, exit_layer)
            hidden = cache.hidden[table[torch.arange(count), positions // S].long(), positions % S]
        chosen, logits = norm_head_argmax(hidden, weights.final_norm, head_weight, len(ids), *sizes.head)
        tokens[drafting] = ids[chosen]
        for b, row, position in zip(drafting.tolist(), logits, positions.tolist(), strict=True):
            if sampling is not None and sampling.changes(b):
                everywhere = torch.full((sizes.vocab_size,), -torch.inf)
                everywhere[ids] = row
                tokens[b], drawn_from = _draw(everywhere, sampling, b, position + 1, drafts[b, :i])
                if keep_scores:
                    scores[b, i] = drawn_from
            confidences[b, i] = confidence(row)
            if stops is not None:
                expected[b] *= stops.acceptance[b, (stops.edges <= confidences[b, i]).sum()]
                going_on[b] = expected[b] >= stops.least[b, i]
        drafts[drafting, i] = tokens[drafting]
        counts[drafting] = i + 1
        going_on &= rows.num_drafts > i + 1
    return Drafted(drafts, counts, confidences, scores)


def adapted(adapter: AdapterLayers, rows: PendingRows) -> Tensor:
    """The hidden states of rows at the exit after an adapter's layers, [T, D]. Writes its K and V; the kept hidden
    states stay those of the exit."""
    S = adapter.cache.hidden.size(1)
    sequence_of_row = torch.repeat_interleave(rows.query_start_loc.diff().long())
    slots = rows.block_table[sequence_of_row, rows.positions // S].long(), rows.positions % S
    at_exit = adapter.cache.hidden[slots]
    placed = replace(rows, depths=torch.ones_like(rows.depths))
    run_layers(adapter.weights, adapter.sizes, adapter.cache, placed, adapter.depth)
    hidden = adapter.cache.hidden[slots]
    adapter.cache.hidden[slots] = at_exit
    return hidden


def confidence(logits: Tensor) -> Tensor:
    """The greatest of a row's probabilities, fp32: 2^40 over the sum of integer masses; 0 if no logit is finite.

    Integers, so the sum has one value in any order. It decides how much is drafted, and never what.
    """
    if not logits.max().isfinite():
        return torch.tensor(0.0)
    return (MASS_ONE / _masses(logits).sum().double()).float()


def _draw(
    logits: Tensor, sampling: DraftSampling, b: int, position: int, drafted: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A token drawn with sequence b's settings from logits fp32 [V], and the scores fp32 [V] that it was drawn from.

    drafted int64: the drafts before it.
    """
    one, logits = slice(b, b + 1), logits[None]
    if sampling.edits is not None:
        logits = edit_logits(logits, torch.tensor([b]), torch.tensor([position]), drafted[None], sampling.edits)
    scores = filter_logits(
        logits, sampling.temperatures[one], sampling.top_ks[one], sampling.top_ps[one], sampling.min_ps[one]
    )
    noisy = sampling.temperatures[one] != 0
    tokens = gumbel_argmax(scores, torch.tensor([position]), sampling.seeds[one], sampling.samples[one], noisy)
    return tokens[0], scores[0]


def verify_pass(
    weights: ModelWeights,
    sizes: ModelSizes,
    cache: CacheTensors,
    rows: PendingRows,
    num_drafts: Tensor,
    judged: Tensor,
    sampling: JudgeSampling | None = None,
    adapters: Sequence[AdapterLayers] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Raise every pending row to the last layer in one batched pass, and judge the drafts.

    num_drafts int64 [B]: how many of a sequence's last rows are its drafts; judged bool [B]: False for a sequence whose
    rows are only raised (a chunk of a prompt), which has no drafts and no logits. Returns num_accepted int64 [B],
    next_tokens int64 [B] as accept_draft does and, for the last num_drafts[b] + 1 rows of each judged sequence, logits
    fp32 [sum(num_drafts + 1), V]. With no drafts this is plain decoding, and with many rows prefill. ``sampling``: how
    the tokens are chosen from them; None: the greatest logit. Rows that come to the exits of ``adapters`` leave their K
    and V there on their way.
    """
    for adapter in adapters:
        if (lower := rows.below(adapter.exit_layer)) is not None:
            run_layers(weights, sizes, cache, lower, adapter.exit_layer)
            adapted(adapter, lower)
            rows = rows.raised_to(adapter.exit_layer)
    run_layers(weights, sizes, cache, rows, len(weights.layers))
    S = cache.hidden.size(1)
    sequence_of_row = torch.repeat_interleave(rows.query_start_loc.diff().long())
    first_judged = rows.query_start_loc[1:] - judged_rows(num_drafts, judged)
    in_head = torch.arange(len(rows.tokens)) >= first_judged[sequence_of_row]
    page = rows.block_table[sequence_of_row, rows.positions // S].long()
    hidden = cache.hidden[page[in_head], (rows.positions % S)[in_head]]
    targets, logits = norm_head_argmax(hidden, weights.final_norm, weights.lm_head, sizes.vocab_size, *sizes.head)
    if sampling is not None:
        targets = _draw_targets(logits, rows, num_drafts, judged, sampling)
    return *accept_draft(rows.tokens, targets, rows.query_start_loc, num_drafts, judged), logits


def _draw_targets(
    logits: Tensor, rows: PendingRows, num_drafts: Tensor, judged: Tensor, sampling: JudgeSampling
) -> Tensor:  # fmt: skip
    """What is drawn from the logits of each judged row, or made of its draft by the rejection rule: int64 [J]."""
    draws = sampling.draws
    if sampling.edits is not None:
        sequences, preceding = _drafts_before(rows, num_drafts, judged)
        logits = edit_logits(logits, sequences, sampling.positions, preceding, sampling.edits)
    scores = filter_logits(logits, draws.temperatures, draws.top_ks, draws.top_ps, draws.min_ps)
    noisy = draws.temperatures != 0
    targets = gumbel_argmax(scores, sampling.positions, draws.seeds, draws.samples, noisy)
    first, first_draft = 0, 0
    for b in judged.nonzero()[:, 0].tolist():
        count, end = int(num_drafts[b]), int(rows.query_start_loc[b + 1])
        theirs = slice(first, first + count)
        first += count + 1
        if sampling.rejecting[b] and count:
            draft_scores = sampling.draft_scores[first_draft : first_draft + count]
            first_draft += count
            targets[theirs] = rejection_sample(
                draft_scores, scores[theirs], rows.tokens[end - count : end], sampling.positions[theirs],
                draws.seeds[theirs], draws.samples[theirs],
            )  # fmt: skip
    return targets


def _drafts_before(rows: PendingRows, num_drafts: Tensor, judged: Tensor) -> tuple[Tensor, Tensor]:
    """Of each judged row its sequence, int64 [J], and the drafts up to it, int64 [J, most drafts], -1 beyond them."""
    sequences = torch.repeat_interleave(judged_rows(num_drafts, judged))
    nth = torch.cat([torch.arange(int(count) + 1) for count in num_drafts[judged]])
    drafts = torch.arange(int(num_drafts.max()))
    places = (rows.query_start_loc[1:] - num_drafts)[sequences, None] + drafts
    before = drafts < nth[:, None]
    return sequences, torch.where(before, rows.tokens[torch.where(before, places, 0)], -1)


def judged_rows(num_drafts: Tensor, judged: Tensor) -> Tensor:
    """How many rows of each sequence are judged, int64 [B]: its drafts and the row before them, or none."""
    return torch.where(judged, num_drafts + 1, 0)


def accept_draft(
    tokens: Tensor, targets: Tensor, query_start_loc: Tensor, num_drafts: Tensor, judged: Tensor
) -> tuple[Tensor, Tensor]:
    """The longest agreeing prefix of each sequence's drafts, and the token that follows it.

    tokens int64 [T]: pending rows, of which the last num_drafts[b] of sequence b are drafts; targets int64: what the
    full model says after the last num_drafts[b] + 1 rows of each judged sequence; query_start_loc int32 [B + 1];
    num_drafts int64 [B]; judged bool [B]. Returns num_accepted int64 [B] and next_tokens int64 [B]: 0 and -1, which
    mean nothing, for a sequence that is not judged.
    """
    num_accepted, next_tokens = torch.zeros_like(num_drafts), torch.full_like(num_drafts, -1)
    first_target = 0
    for b in judged.nonzero()[:, 0].tolist():
        drafts, end = int(num_drafts[b]), int(query_start_loc[b + 1])
        target = targets[first_target : first_target + drafts + 1]
        agreed = int((tokens[end - drafts : end] == target[:drafts]).long().cumprod(0).sum())
        num_accepted[b], next_tokens[b] = agreed, target[agreed]
        first_target += drafts + 1
    return num_accepted, next_tokens
