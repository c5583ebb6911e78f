"""The stages of decoding, as plain functions: prefill, draft_step, verify_step. ``cache.commit`` is the fourth.

Each is one call into the backend. A batch may be ragged in every way: lengths, draft lengths, accepted counts.
When a step raises, the cache is as it was before it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from layerskip_kernels.decoding.kv_cache import PagedKVCache
from layerskip_kernels.decoding.sampling import Sampler, draft_sampling, judge_drafts, judge_sampling
from layerskip_kernels.decoding.types import CachedSequence, Draft, Verdict
from layerskip_kernels.model.model import Model
from layerskip_kernels.operands import Cycle, DraftRows, DraftStops, PendingRows

__all__ = ["decode_cycles", "draft_step", "prefill", "verify_step"]

PREFILL_ROWS = 256  # rows of a prompt that go through the layers at once: bounds the scratch memory

Samplers = Sequence[Sampler | None]  # one for each sequence; None: its greatest logit


def prefill(
    model: Model, cache: PagedKVCache, sequences: Sequence[CachedSequence], samplers: Samplers | None = None
) -> Verdict:
    """Bring all known tokens of the sequences into the cache, and say what follows. To be committed.

    Long prompts go through in runs of PREFILL_ROWS, all but the last committed here; when a later one raises, they
    are taken back.
    """
    with RollbackOnError(cache, sequences):
        while long := [s for s in sequences if len(s.tokens) - cache.length(s) > PREFILL_ROWS]:
            waiting = [len(s.tokens) - cache.length(s) - PREFILL_ROWS for s in long]
            cache.commit(verify_step(model, cache, Draft.joined(long, [], waiting)))
        return verify_step(model, cache, Draft.none(sequences), samplers)


def draft_step(
    model: Model,
    cache: PagedKVCache,
    sequences: Sequence[CachedSequence],
    exit_layer: int,
    num_speculations: int | Sequence[int],
    samplers: Samplers | None = None,
    stops: DraftStops | None = None,
) -> Draft:
    """Draft tokens with the first ``exit_layer`` layers (LayerSkip, arXiv 2404.16710, section 4.3).

    ``num_speculations``: how many, for all sequences or one number for each (0: that one does not draft).
    ``samplers`` (None: greedy): how each sequence's tokens are drawn; verify_step needs the same. ``stops`` (None: no
    such): where each sequence stops before its count; where a backend has no confidences, nothing stops. The drafts'
    K and V of those layers (and of exit adapters' on the way) and their hidden states at the exit stay in the cache
    for verify_step. Raises ValueError for an exit layer outside 1..L-1 or, where there are exit adapters, without one,
    for a count below 1 (or 0 in a list), for a sequence not prefilled or without positions left; CacheFull when pages
    run short.
    """
    cache.check_model(model)
    model.check_exit(exit_layer)
    counts = _draft_counts(num_speculations, len(sequences))
    for sequence, count in zip(sequences, counts, strict=True):
        _check_decoding(cache, sequence, count)
    drafting = [s for s, count in zip(sequences, counts, strict=True) if count]
    with RollbackOnError(cache, drafting):
        _append(cache, drafting, [count + 1 for count in counts if count])
        draft = _draft(model, cache, sequences, exit_layer, counts, samplers or [None] * len(sequences), stops)
        for sequence, count, drafted in zip(sequences, counts, draft.counts, strict=True):
            if drafted < count:
                cache.pool.truncate(sequence.id, cache.length(sequence) + drafted + 1)
        # The last draft has a row already, but has passed no layer yet.
        cache.pool.raise_rows([s.id for s in drafting], [cache.pool.length(s.id) - 1 for s in drafting], exit_layer)
    return draft


def verify_step(model: Model, cache: PagedKVCache, draft: Draft, samplers: Samplers | None = None) -> Verdict:
    """Raise every pending row to the last layer in one batched pass, and judge the drafts. To be committed.

    Drafted rows go on from their kept hidden states; only the last draft of each sequence still passes the early
    layers. With ``Draft.none`` this is plain decoding, and a chunk of a prompt shares the pass over the weights.
    ``samplers`` (None: greedy): how each sequence's tokens are drawn, as in draft_step.
    """
    cache.check_model(model)
    sequences = draft.sequences
    samplers = samplers or [None] * len(sequences)
    in_pass = model.ops.draws_in_verification
    with RollbackOnError(cache, sequences):
        append_rows(cache, draft)
        rows = pending_rows(model, cache, draft)
        sampling = judge_sampling(model.ops, draft, samplers, model.config.vocab_size) if in_pass else None
        num_accepted, next_tokens, logits = model.ops.verify_pass(
            model.weights, model.sizes, cache.tensors, rows, draft.num_tokens, draft.judged, sampling,
            cache.adapters_to(model.config.num_layers),
        )  # fmt: skip
        # One copy, for which the host waits once. Logits are large: only what is drawn on the host has them copied.
        wanted = [num_accepted, next_tokens, draft.tokens, *([logits] if any(samplers) and not in_pass else [])]
        num_accepted, next_tokens, drafted, *copied = model.ops.to_host(cache.k, *wanted)
        if drafted is not draft.tokens:
            draft = replace(draft, tokens=drafted)
        if copied:
            [logits] = copied
            judge_drafts(model.ops, draft, logits, samplers, num_accepted, next_tokens)
        ids = [s.id for s in sequences]
        cache.pool.raise_rows(ids, cache.pool.lengths(ids).tolist(), model.config.num_layers)
    return Verdict(draft, num_accepted, next_tokens, logits)


def decode_cycles(
    model: Model,
    cache: PagedKVCache,
    sequences: Sequence[CachedSequence],
    exit_layer: int,
    num_speculations: Sequence[int],
    num_cycles: int,
    ends: Sequence[Collection[int]],
    stops: DraftStops | None = None,
) -> list[tuple[Verdict, float, float]]:
    """Up to ``num_cycles`` greedy cycles of draft_step and verify_step in one call into the backend: their verdicts, to
    be committed together, with the seconds of both steps; without logits.

    ``num_speculations``: of each sequence; 0: it does not draft, all 0: plain decoding. ``ends``: the tokens that end
    each sequence's text; a cycle in which one comes is the last. The rest, and what is raised, as in draft_step.
    """
    cache.check_model(model)
    ids, counts = [s.id for s in sequences], list(num_speculations)
    if any(counts):
        model.check_exit(exit_layer)
    for sequence, count in zip(sequences, counts, strict=True):
        _check_decoding(cache, sequence, num_cycles * (count + 1) - 1)
    width = max(map(len, ends))
    end_ids = torch.tensor([[*of, *[-1] * (width - len(of))] for of in ends], dtype=torch.int64)
    with RollbackOnError(cache, sequences):
        _append(cache, sequences, [num_cycles * (count + 1) for count in counts])
        drafting, head, _ = model.exit_at(exit_layer)
        passed = {
            a.exit_layer: a for a in (*cache.adapters_to(model.config.num_layers), *cache.adapters_to(exit_layer))
        }
        cycles = model.ops.decode_pass(
            model.weights, drafting, model.sizes, cache.tensors, _draft_rows(cache, sequences, counts),
            head, exit_layer, num_cycles, end_ids.view(len(sequences), -1), stops,
            [passed[at] for at in sorted(passed)],
        )  # fmt: skip
        gained = torch.stack([cycle.num_accepted + 1 for cycle in cycles]).sum(0).tolist()
        lengths = [cache.length(sequence) + more for sequence, more in zip(sequences, gained, strict=True)]
        for sequence, length in zip(sequences, lengths, strict=True):
            cache.pool.truncate(sequence.id, length)
        cache.pool.raise_rows(ids, lengths, model.config.num_layers)
    return [(_verdict(sequences, cycle), cycle.draft_seconds, cycle.verify_seconds) for cycle in cycles]


def _verdict(sequences: Sequence[CachedSequence], cycle: Cycle) -> Verdict:
    waiting, confidences = (0,) * len(sequences), _confidences(cycle.confidences, cycle.num_drafted)
    draft = Draft(tuple(sequences), cycle.drafts, cycle.num_drafted, waiting, {}, confidences)
    return Verdict(draft, cycle.num_accepted, cycle.next_tokens, torch.empty(0, 0))


def _draft(
    model: Model,
    cache: PagedKVCache,
    sequences: Sequence[CachedSequence],
    exit_layer: int,
    counts: Sequence[int],
    samplers: Samplers,
    stops: DraftStops | None,
) -> Draft:
    rows = _draft_rows(cache, sequences, counts)
    rejecting = [b for b, sampler in enumerate(samplers) if sampler is not None and sampler.rejects]
    sampling = draft_sampling(samplers, [s.tokens for s in sequences])
    weights, head, _ = model.exit_at(exit_layer)
    drafted = model.ops.draft_pass(
        weights, model.sizes, cache.tensors, rows, head, exit_layer, max(counts), sampling,
        stops if model.ops.drafts_adapt else None, bool(rejecting), cache.adapters_to(exit_layer),
    )  # fmt: skip
    scores = {b: drafted.scores[b, : int(drafted.counts[b])] for b in rejecting}
    confidences = _confidences(drafted.confidences, drafted.counts) if model.ops.drafts_adapt else {}
    return Draft(tuple(sequences), drafted.tokens, drafted.counts, (0,) * len(sequences), scores, confidences)


def _draft_rows(cache: PagedKVCache, sequences: Sequence[CachedSequence], counts: Sequence[int]) -> DraftRows:
    ids = [s.id for s in sequences]
    return DraftRows(
        tokens=torch.tensor([s.tokens[-1] for s in sequences]),
        positions=torch.from_numpy(cache.pool.committed_lengths(ids)),
        num_drafts=torch.tensor(counts),
        block_table=torch.from_numpy(cache.pool.block_table(ids)),
    )


def _confidences(confidences: Tensor, counts: Tensor) -> dict[int, list[float]]:
    """Those of each sequence's own drafts."""
    kept = zip(confidences.tolist(), counts.tolist(), strict=True)
    return {b: row[:count] for b, (row, count) in enumerate(kept)}


def _check_decoding(cache: PagedKVCache, sequence: CachedSequence, count: int) -> None:
    """Raise ValueError unless a sequence was prefilled and has positions left for ``count`` tokens more."""
    if len(sequence.tokens) != cache.length(sequence) + 1:
        raise ValueError(
            f"sequence {sequence.id} has {len(sequence.tokens)} tokens and {cache.length(sequence)} of them in the "
            "cache; call prefill and commit its verdict before drafting"
        )
    if len(sequence.tokens) + count > cache.max_positions:
        raise ValueError(
            f"sequence {sequence.id} has {len(sequence.tokens)} tokens; {count} drafts would pass the model's "
            f"{cache.max_positions} positions; draft fewer"
        )


def _draft_counts(num_speculations: int | Sequence[int], num_sequences: int) -> list[int]:
    if isinstance(num_speculations, int):
        if num_speculations < 1:
            raise ValueError(f"num_speculations must be at least 1, got {num_speculations}; Draft.none drafts nothing")
        return [num_speculations] * num_sequences
    counts = [int(count) for count in num_speculations]
    if len(counts) != num_sequences or min(counts) < 0 or max(counts) < 1:
        raise ValueError(
            f"num_speculations must hold {num_sequences} counts of at least 0, one of them 1 or more, got {counts}"
        )
    return counts


def _append(cache: PagedKVCache, sequences: Sequence[CachedSequence], counts: list[int]) -> None:
    cache.pool.append([s.id for s in sequences], counts)


def append_rows(cache: PagedKVCache, draft: Draft) -> None:
    """Give a row to each known and drafted token that has none. Raises ValueError beyond the model's positions."""
    added = zip(draft.sequences, draft.counts, draft.num_waiting, strict=True)
    wanted = [len(sequence.tokens) + count - waiting for sequence, count, waiting in added]
    for sequence, length in zip(draft.sequences, wanted, strict=True):
        if length > cache.max_positions:
            raise ValueError(
                f"sequence {sequence.id} needs position {length - 1}; the model has {cache.max_positions} positions"
            )
    missing = [length - cache.pool.length(s.id) for s, length in zip(draft.sequences, wanted, strict=True)]
    _append(cache, draft.sequences, missing)


def pending_rows(model: Model, cache: PagedKVCache, draft: Draft) -> PendingRows:
    """All pending rows of a draft's sequences."""
    tokens: list[int] = []
    positions: list[int] = []
    drafted: list[tuple[int, int, int]] = []  # row, sequence, draft: on the device, perhaps, so not read here
    for b, sequence in enumerate(draft.sequences):
        start, stop = cache.length(sequence), cache.pool.length(sequence.id)
        known = sequence.tokens[start:stop]
        drafted += [(len(tokens) + len(known) + i, b, i) for i in range(stop - start - len(known))]
        tokens += known + [0] * (stop - start - len(known))
        positions += range(start, stop)
    ids = [s.id for s in draft.sequences]
    depths, query_start_loc = cache.pool.pending_depths(ids)
    row_tokens, row_positions, places, drafts, block_table = model.ops.to_device(
        torch.tensor(tokens),
        torch.tensor(positions),
        torch.tensor(drafted, dtype=torch.int64).view(-1, 3).T.contiguous(),
        draft.tokens,
        torch.from_numpy(cache.pool.block_table(ids)),
    )
    if drafted:
        rows, of, nth = places
        row_tokens = row_tokens.index_put((rows,), drafts[of, nth])
    return PendingRows(
        tokens=row_tokens,
        positions=row_positions,
        depths=torch.from_numpy(depths),
        query_start_loc=torch.from_numpy(query_start_loc),
        block_table=block_table,
    )


class RollbackOnError:
    """Cut the sequences back to what was committed before, should anything raise. (No generator: one that a Ctrl-C
    has stopped before the body would be closed whenever it is collected, after the sequences.)"""

    def __init__(self, cache: PagedKVCache, sequences: Sequence[CachedSequence]) -> None:
        self._pool = cache.pool
        self._lengths = [(sequence.id, cache.length(sequence)) for sequence in sequences]

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            for sequence_id, length in self._lengths:
                self._pool.truncate(sequence_id, length)
