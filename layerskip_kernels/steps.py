"""The stages of decoding, as plain functions: prefill, draft_step, verify_step. ``cache.commit`` is the fourth.

Each is one call into the backend. A batch may be ragged in every way: lengths, draft lengths, accepted counts.
When a step raises, the cache is as it was before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as ListLike
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from layerskip_kernels.kv_cache import PagedKVCache, Sequence
from layerskip_kernels.model import Model
from layerskip_kernels.sampling import Sampler, choose_tokens, judge_drafts

__all__ = ["Draft", "Verdict", "draft_step", "prefill", "verify_step"]

PREFILL_ROWS = 256  # rows of a prompt that go through the layers at once: bounds the scratch memory


@dataclass(frozen=True)
class Draft:
    """Guessed continuations: tokens int64 [B, max_drafts] (-1 beyond a sequence's own), num_tokens int64 [B].

    A negative num_tokens[b] stands for a chunk of a prompt: the last -num_tokens[b] known tokens wait for a later
    verification, so this one brings the known tokens before them into the cache and says nothing about what follows.

    ``scores``: what the drafts of sampled sequences were drawn from, fp32 [num_tokens[b], V] by the sequence's
    index b; the rejection rule needs it.
    """

    sequences: tuple[Sequence, ...]
    tokens: Tensor
    num_tokens: Tensor
    scores: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def none(cls, sequences: ListLike[Sequence]) -> Draft:
        """No guess at all: verifying it is plain decoding."""
        num_sequences = len(sequences)
        return cls(
            tuple(sequences),
            torch.empty(num_sequences, 0, dtype=torch.int64),
            torch.zeros(num_sequences, dtype=torch.int64),
        )

    @classmethod
    def joined(cls, sequences: ListLike[Sequence], num_tokens: ListLike[int], parts: ListLike[Draft]) -> Draft:
        """One draft of ``sequences``: their drafts out of ``parts``, and for all others the count given."""
        counts = torch.tensor(num_tokens, dtype=torch.int64)
        tokens = torch.full((len(sequences), max((part.tokens.size(1) for part in parts), default=0)), -1)
        row_of = {id(sequence): b for b, sequence in enumerate(sequences)}
        for part in parts:
            rows = [row_of[id(sequence)] for sequence in part.sequences]
            tokens[rows, : part.tokens.size(1)] = part.tokens
            counts[rows] = part.num_tokens
        scores = {row_of[id(part.sequences[b])]: kept for part in parts for b, kept in part.scores.items()}
        return cls(tuple(sequences), tokens, counts, scores)

    def of(self, b: int) -> list[int]:
        """The drafted tokens of sequence ``b``."""
        return list(self._lists[b])

    @cached_property
    def _lists(self) -> list[list[int]]:
        """All sequences' drafts, read out of the tensors once: a read of each element alone takes a microsecond."""
        counts = self.num_tokens.tolist()
        return [row[: max(0, count)] for row, count in zip(self.tokens.tolist(), counts, strict=True)]

    def scores_of(self, b: int, vocab_size: int) -> Tensor:
        """The scores that sequence ``b``'s drafts were drawn from; a draft of unknown origin was certain."""
        if b in self.scores:
            return self.scores[b]
        scores = torch.full((int(self.num_tokens[b]), vocab_size), -torch.inf)
        return scores.scatter_(1, self.tokens[b, : len(scores), None], 0.0)


@dataclass(frozen=True)
class Verdict:
    """What the full model made of a draft.

    num_accepted int64 [B]: drafts that agree; next_tokens int64 [B]: the token after them; logits fp32
    [sum(num_tokens + 1), V]: for each sequence, of the row before each draft and of the last draft. A chunk of a
    prompt keeps its negative count and gains nothing.
    """

    draft: Draft
    num_accepted: Tensor
    next_tokens: Tensor
    logits: Tensor

    def new_tokens(self, b: int) -> list[int]:
        """What sequence ``b`` gains: its accepted drafts and one token more."""
        if self.accepted[b] < 0:
            return []
        return [*self.draft.of(b)[: self.accepted[b]], self._next[b]]

    def new_logits(self, b: int) -> Tensor:
        """The logits [num_accepted + 1, V] that new_tokens were chosen by."""
        first = self._first_rows[b]
        return self.logits[first : first + max(0, self.accepted[b] + 1)]

    @cached_property
    def accepted(self) -> list[int]:
        """num_accepted, read out of its tensor once."""
        return self.num_accepted.tolist()

    @cached_property
    def _next(self) -> list[int]:
        return self.next_tokens.tolist()

    @cached_property
    def _first_rows(self) -> list[int]:
        """Of each sequence's logits."""
        return [0, *accumulate(max(0, count + 1) for count in self.draft.num_tokens.tolist())]


Samplers = ListLike[Sampler | None]  # one for each sequence; None: its greatest logit


def prefill(
    model: Model, cache: PagedKVCache, sequences: ListLike[Sequence], samplers: Samplers | None = None
) -> Verdict:
    """Bring all known tokens of the sequences into the cache, and say what follows. To be committed.

    Long prompts go through in runs of PREFILL_ROWS, all but the last committed here.
    """
    with _rollback_on_error(cache, sequences):
        while long := [s for s in sequences if len(s.tokens) - cache.length(s) > PREFILL_ROWS]:
            left = [cache.length(s) + PREFILL_ROWS - len(s.tokens) for s in long]
            cache.commit(verify_step(model, cache, Draft.joined(long, left, [])))
        return verify_step(model, cache, Draft.none(sequences), samplers)


def draft_step(
    model: Model,
    cache: PagedKVCache,
    sequences: ListLike[Sequence],
    exit_layer: int,
    num_speculations: int | ListLike[int],
    samplers: Samplers | None = None,
) -> Draft:
    """Draft tokens with the first ``exit_layer`` layers (LayerSkip, arXiv 2404.16710, section 4.3).

    ``num_speculations``: how many, for all sequences or one number for each (0: that one does not draft).
    ``samplers`` (None: greedy): how each sequence's tokens are drawn; verify_step needs the same. The drafts' K and
    V of those layers and their hidden states stay in the cache for verify_step. Raises ValueError for an exit layer
    outside 1..L-1, for a count below 1 (or 0 in a list), for a sequence not prefilled or without positions left;
    CacheFull when pages run short.
    """
    if not 1 <= exit_layer < model.config.num_layers:
        raise ValueError(f"exit_layer must be in 1..{model.config.num_layers - 1}, got {exit_layer}")
    counts = _draft_counts(num_speculations, len(sequences))
    for sequence, count in zip(sequences, counts, strict=True):
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
    drafting = [s for s, count in zip(sequences, counts, strict=True) if count]
    with _rollback_on_error(cache, drafting):
        _append(cache, drafting, [count + 1 for count in counts if count])
        if samplers is None or not any(samplers):
            draft = _draft_greedily(model, cache, sequences, exit_layer, counts)
        else:
            draft = _draft_with_samplers(model, cache, sequences, exit_layer, counts, samplers)
        # The last draft has a row already, but has passed no layer yet.
        cache.pool.raise_rows([s.id for s in drafting], [cache.pool.length(s.id) - 1 for s in drafting], exit_layer)
    return draft


def verify_step(model: Model, cache: PagedKVCache, draft: Draft, samplers: Samplers | None = None) -> Verdict:
    """Raise every pending row to the last layer in one batched pass, and judge the drafts. To be committed.

    Drafted rows go on from their kept hidden states; only the last draft of each sequence still passes the early
    layers. With ``Draft.none`` this is plain decoding, and a chunk of a prompt shares the pass over the weights.
    ``samplers`` (None: greedy): how each sequence's tokens are drawn, as in draft_step.
    """
    sequences = draft.sequences
    with _rollback_on_error(cache, sequences):
        wanted = [len(s.tokens) + n for s, n in zip(sequences, draft.num_tokens.tolist(), strict=True)]
        for sequence, length in zip(sequences, wanted, strict=True):
            if length > cache.max_positions:
                raise ValueError(
                    f"sequence {sequence.id} needs position {length - 1}; the model has {cache.max_positions} positions"
                )
        missing = [length - cache.pool.length(s.id) for s, length in zip(sequences, wanted, strict=True)]
        _append(cache, sequences, missing)
        rows = _pending_rows(cache, draft)
        *positions, block_table = rows
        num_accepted, next_tokens, logits = model.ops.verify_step(
            model.weights, *cache.tensors, *positions, draft.num_tokens, block_table, *model.sizes
        )
        num_accepted, next_tokens, drafted = model.ops.to_host(num_accepted, next_tokens, draft.tokens)
        if drafted is not draft.tokens:
            draft = replace(draft, tokens=drafted)
        if samplers is not None:
            (logits,) = model.ops.to_host(logits)
            judge_drafts(model.ops, draft, logits, samplers, num_accepted, next_tokens)
        ids = [s.id for s in sequences]
        cache.pool.raise_rows(ids, cache.pool.lengths(ids).tolist(), model.config.num_layers)
    return Verdict(draft, num_accepted, next_tokens, logits)


def _draft_greedily(
    model: Model, cache: PagedKVCache, sequences: ListLike[Sequence], exit_layer: int, counts: list[int]
) -> Draft:
    """All drafts in one call of the backend."""
    ids = [s.id for s in sequences]
    tokens = model.ops.draft_step(
        model.weights,
        *cache.tensors,
        torch.tensor([s.tokens[-1] for s in sequences]),
        torch.from_numpy(cache.pool.committed_lengths(ids)),
        torch.tensor(counts),
        torch.from_numpy(cache.pool.block_table(ids)),
        model.draft_head,
        model.draft_ids,
        exit_layer,
        max(counts),
        *model.sizes,
    )
    return Draft(tuple(sequences), tokens, torch.tensor(counts))


def _draft_with_samplers(
    model: Model,
    cache: PagedKVCache,
    sequences: ListLike[Sequence],
    exit_layer: int,
    counts: list[int],
    samplers: Samplers,
) -> Draft:
    """One draft of each sequence at a time, since what a sampler does depends on the drafts before."""
    tokens = torch.full((len(sequences), max(counts)), -1)
    scores: dict[int, list[Tensor]] = {}
    histories = [list(sequence.tokens) for sequence in sequences]
    for i in range(max(counts)):
        rows = [b for b, count in enumerate(counts) if count > i]
        tokens[rows, i], logits = _exit_logits(
            model, cache, [sequences[b] for b in rows], [histories[b] for b in rows], exit_layer
        )
        drawing = [(r, b, sampler) for r, b in enumerate(rows) if (sampler := samplers[b]) is not None]
        if drawing:
            logit_rows, drawn, their_samplers = map(list, zip(*drawing, strict=True))
            tokens[drawn, i], drawn_from = choose_tokens(
                model.ops, logits[logit_rows], their_samplers, [histories[b] for b in drawn]
            )
            for b, row in zip(drawn, drawn_from, strict=True):
                scores.setdefault(b, []).append(row)
        for b in rows:
            histories[b].append(int(tokens[b, i]))
    stacked = {b: torch.stack(rows) for b, rows in scores.items()}
    return Draft(tuple(sequences), tokens, torch.tensor(counts), stacked)


def _exit_logits(
    model: Model,
    cache: PagedKVCache,
    sequences: ListLike[Sequence],
    histories: ListLike[ListLike[int]],
    exit_layer: int,
) -> tuple[Tensor, Tensor]:
    """Each history's last row through the first layers: its best token [T] and logits fp32 [T, V].

    Tokens outside a draft vocabulary are -inf.
    """
    count, page_size = len(sequences), cache.pool.page_size
    positions = torch.tensor([len(history) - 1 for history in histories])
    table = torch.from_numpy(cache.pool.block_table([s.id for s in sequences]))
    model.ops.run_layers(
        model.weights,
        *cache.tensors,
        torch.tensor([history[-1] for history in histories]),
        positions,
        torch.zeros(count, dtype=torch.int32),
        torch.arange(count + 1, dtype=torch.int32),
        table,
        exit_layer,
        *model.sizes,
    )
    page = table[torch.arange(count), positions // page_size].long()
    hidden = cache.hidden[page.to(cache.hidden.device), (positions % page_size).to(cache.hidden.device)]
    head = model.weights[2] if model.draft_head is None else model.draft_head
    size = model.config.vocab_size if model.draft_ids is None else len(model.draft_ids)
    tokens, logits = model.ops.to_host(
        *model.ops.norm_head_argmax(hidden, model.weights[1], head, size, model.config.rms_norm_eps)
    )
    if model.draft_ids is None:
        return tokens, logits
    everywhere = torch.full((count, model.config.vocab_size), -torch.inf)
    everywhere[:, model.draft_ids] = logits
    return model.draft_ids[tokens], everywhere


def _draft_counts(num_speculations: int | ListLike[int], num_sequences: int) -> list[int]:
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


def _append(cache: PagedKVCache, sequences: ListLike[Sequence], counts: list[int]) -> None:
    cache.pool.append([s.id for s in sequences], counts)


def _pending_rows(cache: PagedKVCache, draft: Draft) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All pending rows: tokens [T], positions [T], depths [T], query_start_loc [B+1], block_table."""
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
    row_tokens = torch.tensor(tokens)
    if drafted:
        rows, of, nth = torch.tensor(drafted).T.to(draft.tokens.device)
        row_tokens = row_tokens.to(draft.tokens.device).index_put_((rows,), draft.tokens[of, nth])
    return (
        row_tokens,
        torch.tensor(positions),
        torch.from_numpy(depths),
        torch.from_numpy(query_start_loc),
        torch.from_numpy(cache.pool.block_table(ids)),
    )


@contextmanager
def _rollback_on_error(cache: PagedKVCache, sequences: ListLike[Sequence]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        cache.rollback(sequences)
        raise
