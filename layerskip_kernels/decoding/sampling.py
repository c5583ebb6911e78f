"""How tokens are chosen from logits, and which tokens end a text: samplers, log-probabilities.

A sampler is a function of logits and of the tokens before them, nothing else: no step, batch or draft leaves a
trace in it. That is why speculation in the mode "exact" gives the text of plain sampling bit for bit.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.decoding.types import Draft
from layerskip_kernels.model.model import Model
from layerskip_kernels.operands import DraftSampling, JudgeSampling, LogitEdits
from layerskip_kernels.ops import Backend
from layerskip_kernels.ops.reference import MASS_ONE

__all__ = [
    "Sampler",
    "TokenLogprobs",
    "choose_tokens",
    "draft_sampling",
    "judge_drafts",
    "judge_sampling",
    "logit_edits",
    "make_sampler",
    "top_logprobs",
]


@dataclass(frozen=True, eq=False)
class Sampler:
    """How one sequence's tokens are chosen (GenerationConfig says what each setting does); make_sampler makes it.

    ``seed`` and ``sample`` (which of the texts of a prompt) select the noise; ``prompt_length`` tells the prompt
    from what was generated; ``end_ids`` are the tokens that may not come before min_new_tokens.
    """

    config: GenerationConfig
    seed: int
    sample: int
    prompt_length: int
    end_ids: frozenset[int]

    @property
    def draws(self) -> bool:
        """Whether there is noise; without, it takes the greatest of the processed logits."""
        return self.config.temperature > 0

    @property
    def rejects(self) -> bool:
        """Whether drafts are judged by the classical rejection rule."""
        return self.draws and self.config.acceptance == "rejection"

    @property
    def _counts(self) -> bool:
        """Whether it matters how often a token was generated."""
        return bool(self.config.frequency_penalty or self.config.presence_penalty)

    def edits(self, tokens: Sequence[int]) -> bool:
        """Whether logits of what follows ``tokens`` may be edited: by bias, penalties or a least length."""
        c = self.config
        too_short = len(tokens) - self.prompt_length < c.min_new_tokens
        return bool(c.logit_bias) or c.repetition_penalty != 1 or self._counts or too_short

    def listed(self, tokens: Sequence[int]) -> dict[int, int]:
        """The tokens that may be edited in what follows ``tokens``, and how often each was generated; -1: not seen."""
        listed = dict.fromkeys(self.config.logit_bias, -1)
        if len(tokens) - self.prompt_length < self.config.min_new_tokens:
            listed |= dict.fromkeys(self.end_ids, -1)
        if self.config.repetition_penalty != 1:
            listed |= dict.fromkeys(tokens, 0)
        if self._counts:
            listed.update(Counter(tokens[self.prompt_length :]))
        return listed


def make_sampler(model: Model, config: GenerationConfig, prompt_length: int, sample: int = 0) -> Sampler | None:
    """The sampler of a sequence, or None where the config asks for the model's greatest logit and nothing else.

    ``sample``: which of the prompt's texts this is. A config without a seed gets a new one: resolve_seed gives
    several sequences the same. Raises ValueError for a token id outside the model's vocabulary.
    """
    _check_stop_strings(model, config)
    vocab_size = model.config.vocab_size
    for token_id in [*config.logit_bias, *config.stop_token_ids, *(config.eos_token_ids or ())]:
        if token_id >= vocab_size:
            raise ValueError(
                f"logit_bias, stop_token_ids and eos_token_ids must name tokens in 0..{vocab_size - 1}, got {token_id}"
            )
    plain = not (config.logit_bias or config.presence_penalty or config.frequency_penalty or config.min_new_tokens)
    if plain and config.temperature == 0 and config.repetition_penalty == 1:
        return None
    seed = resolve_seed(config).seed
    assert seed is not None
    return Sampler(
        config,
        seed,
        sample,
        prompt_length,
        frozenset(end_token_ids(model, config)),
    )


def resolve_seed(config: GenerationConfig) -> GenerationConfig:
    """The config with a seed: its own, or a new one."""
    return config if config.seed is not None else replace(config, seed=secrets.randbits(63))


def end_token_ids(model: Model, config: GenerationConfig) -> set[int]:
    """The tokens that end a text: end-of-text tokens and stop tokens."""
    eos = model.config.eos_token_ids if config.eos_token_ids is None else config.eos_token_ids
    return {*eos, *stop_token_ids(model, config)}


def stop_token_ids(model: Model, config: GenerationConfig) -> set[int]:
    """The stop tokens: those of the config, and special tokens that are stop strings, since the text lacks them."""
    special = {} if model.tokenizer is None or not config.stop else model.tokenizer.special_tokens
    return {*config.stop_token_ids, *(special[text] for text in config.stop_strings if text in special)}


def _check_stop_strings(model: Model, config: GenerationConfig) -> None:
    """Refuse stop strings that could never be found in a text of this model."""
    if not config.stop:
        return
    if model.tokenizer is None:
        raise ValueError("this model came without a tokenizer, so stop strings can't be found; use stop_token_ids")
    if not config.skip_special_tokens:
        return
    for text in config.stop_strings:
        for token in model.tokenizer.special_tokens:
            if token in text and token != text:
                raise ValueError(
                    f"the stop string {text!r} contains the special token {token!r}, which texts don't show; give "
                    f"{token!r} alone, or set skip_special_tokens=False"
                )


# ---- choosing ----


def choose_tokens(
    ops: Backend, logits: Tensor, samplers: Sequence[Sampler], positions: Sequence[int]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draw a token of each row of edited logits fp32 [T, V], for its position.

    Returns tokens int64 [T] and the scores fp32 [T, V] that they were drawn from: divided by the temperature,
    filtered. Raises RuntimeError where nothing can be chosen (NaN, or every token excluded).
    """
    configs = [sampler.config for sampler in samplers]
    scores = ops.filter_logits(
        logits,
        torch.tensor([c.temperature for c in configs], dtype=torch.float32),
        torch.tensor([c.top_k for c in configs]),
        torch.tensor([c.top_p for c in configs], dtype=torch.float64),
        torch.tensor([c.min_p for c in configs], dtype=torch.float32),
    )
    noisy = torch.tensor([sampler.draws for sampler in samplers])
    return ops.gumbel_argmax(scores, *_places(samplers, positions), noisy), scores


def logit_edits(samplers: Sequence[Sampler | None], histories: Sequence[Sequence[int]]) -> LogitEdits | None:
    """The edits of what follows each history, and of what is drafted after it; None where there are none."""
    pairs = enumerate(zip(samplers, histories, strict=True))
    listed = {b: s.listed(tokens) for b, (s, tokens) in pairs if s is not None and s.edits(tokens)}
    if not listed:
        return None
    count, width = len(samplers), max(map(len, listed.values()))
    edits = LogitEdits(
        repetitions=torch.ones(count),
        frequencies=torch.zeros(count),
        presences=torch.zeros(count),
        least_positions=torch.zeros(count, dtype=torch.int64),
        ids=torch.full((count, width), -1),
        biases=torch.full((count, width), -0.0),
        counts=torch.full((count, width), -1),
        ends=torch.zeros(count, width, dtype=torch.bool),
    )
    for b, tokens in listed.items():
        sampler = samplers[b]
        assert sampler is not None
        c, those = sampler.config, slice(len(tokens))
        edits.repetitions[b] = c.repetition_penalty
        edits.frequencies[b], edits.presences[b] = c.frequency_penalty, c.presence_penalty
        edits.least_positions[b] = sampler.prompt_length + c.min_new_tokens
        edits.ids[b, those] = torch.tensor(list(tokens))
        edits.biases[b, : len(c.logit_bias)] = torch.tensor(list(c.logit_bias.values()), dtype=torch.float32)
        edits.counts[b, those] = torch.tensor(list(tokens.values()))
        edits.ends[b, those] = torch.tensor([token in sampler.end_ids for token in tokens])
    return edits


def draft_sampling(samplers: Sequence[Sampler | None], histories: Sequence[Sequence[int]]) -> DraftSampling | None:
    """How what follows the histories is drafted; None where all take the greatest logit."""
    edits = logit_edits(samplers, histories)
    return replace(_draws(samplers), edits=edits) if edits is not None or _any_draws(samplers) else None


def judge_sampling(
    ops: Backend, draft: Draft, samplers: Sequence[Sampler | None], vocab_size: int
) -> JudgeSampling | None:  # fmt: skip
    """How a draft is judged; None where all samplers take the greatest logit."""
    judged = [b for b, waiting in enumerate(draft.num_waiting) if not waiting]
    rows = [(b, i) for b in judged for i in range(draft.counts[b] + 1)]
    edits = logit_edits([samplers[b] if b in judged else None for b in range(len(samplers))],
                        [sequence.tokens for sequence in draft.sequences])  # fmt: skip
    row_samplers = [samplers[b] for b, _ in rows]
    if edits is None and not _any_draws(row_samplers):
        return None
    positions = torch.tensor([len(draft.sequences[b].tokens) + i for b, i in rows])
    rejecting = tuple(sampler is not None and sampler.rejects for sampler in samplers)
    scores = [draft.scores_of(b, vocab_size) for b in judged if rejecting[b] and draft.counts[b]]
    draft_scores = torch.cat(ops.to_device(*scores)) if scores else torch.empty(0, vocab_size)
    return JudgeSampling(_draws(row_samplers), positions, rejecting, draft_scores, edits)


def _any_draws(samplers: Sequence[Sampler | None]) -> bool:
    return any(sampler is not None and sampler.draws for sampler in samplers)


def _draws(samplers: Sequence[Sampler | None]) -> DraftSampling:
    """How they draw from edited logits."""
    settings = [
        (0.0, 0, 1.0, 0.0, 0, 0) if s is None or not s.draws
        else (s.config.temperature, s.config.top_k, s.config.top_p, s.config.min_p, s.seed, s.sample)
        for s in samplers
    ]  # fmt: skip
    dtypes = torch.float32, torch.int64, torch.float64, torch.float32, torch.int64, torch.int64
    columns = zip(*settings, strict=True)
    return DraftSampling.of_flat([torch.tensor(c, dtype=dtype) for c, dtype in zip(columns, dtypes, strict=True)])


def _places(samplers: Sequence[Sampler], positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """What selects each row's noise: the position of the token to be chosen, the seed and the sample."""
    return torch.tensor(positions), torch.tensor([s.seed for s in samplers]), torch.tensor([s.sample for s in samplers])


def judge_drafts(
    ops: Backend,
    draft: Draft,
    logits: Tensor,
    samplers: Sequence[Sampler | None],
    num_accepted: Tensor,
    next_tokens: Tensor,
) -> None:
    """What the samplers make of drafts and of the full model's logits [sum(num_tokens + 1), V].

    Overwrites num_accepted and next_tokens int64 [B] of the sequences that have a sampler.
    """
    if not any(samplers):
        return
    judged = [
        _Judged(b, sampler, draft.of(b), sequence.tokens, draft.logit_rows[b])
        for b, (sequence, sampler) in enumerate(zip(draft.sequences, samplers, strict=True))
        if sampler is not None and not draft.num_waiting[b]
    ]
    if not judged:
        return
    rows = [row for j in judged for row in range(j.first_row, j.first_row + len(j.drafts) + 1)]
    row_samplers = [j.sampler for j in judged for _ in range(len(j.drafts) + 1)]
    positions = [len(j.tokens) + i for j in judged for i in range(len(j.drafts) + 1)]
    edited = _edited(ops, logits[rows], judged, positions)
    chosen, scores = choose_tokens(ops, edited, row_samplers, positions)
    start = 0
    for j in judged:
        targets, theirs = chosen[start : start + len(j.drafts) + 1], slice(start, start + len(j.drafts))
        start += len(j.drafts) + 1
        drafts = torch.tensor(j.drafts, dtype=torch.int64)
        if j.sampler.rejects and j.drafts:
            draft_scores = draft.scores_of(j.b, logits.size(1))
            places = _places(row_samplers[theirs], positions[theirs])
            targets[:-1] = ops.rejection_sample(draft_scores, scores[theirs], drafts, *places)
        agreed = int((targets[:-1] == drafts).long().cumprod(0).sum())
        num_accepted[j.b], next_tokens[j.b] = agreed, targets[agreed]


class _Judged(NamedTuple):
    """A sequence with a sampler: its index in the batch, its drafts, the tokens before, its first row of logits."""

    b: int
    sampler: Sampler
    drafts: list[int]
    tokens: list[int]
    first_row: int


def _edited(ops: Backend, logits: Tensor, judged: Sequence[_Judged], positions: Sequence[int]) -> Tensor:
    """The logits [T, V] after each sequence's tokens and after each of its drafts, edited."""
    edits = logit_edits([j.sampler for j in judged], [j.tokens for j in judged])
    if edits is None:
        return logits
    sequences = [n for n, j in enumerate(judged) for _ in range(len(j.drafts) + 1)]
    most = max(len(j.drafts) for j in judged)
    preceding = [j.drafts[:i] + [-1] * (most - i) for j in judged for i in range(len(j.drafts) + 1)]
    numbers = (
        torch.tensor(sequences),
        torch.tensor(positions),
        torch.tensor(preceding, dtype=torch.int64).view(len(sequences), most),
    )
    return ops.edit_logits(logits, *numbers, edits)


# ---- log-probabilities ----


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's natural log-probability by the model's own logits, and the likeliest tokens with theirs."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def top_logprobs(ops: Backend, logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Of each row of logits fp32 [T, V] the log-probability of its token and of the ``count`` likeliest.

    Equal ones are in order of their ids. The sum over the vocabulary is exact in integers, so a row's result
    does not depend on its neighbours or on threads.
    """
    x = logits - logits.amax(dim=1, keepdim=True)
    totals = (ops.exp(x) * MASS_ONE).to(torch.int64).sum(dim=1)
    logprobs = x - ops.log((totals.double() / MASS_ONE).float())[:, None]
    chosen = torch.tensor(tokens, dtype=torch.int64).to(logits.device)
    ids = torch.cat([chosen[:, None], _greatest(logprobs, min(count, logits.size(1)))], dim=1)
    # One copy of both, if they are on a device: fp64 holds any of them.
    ids, values = torch.stack([ids.double(), logprobs.gather(1, ids).double()]).cpu()
    pairs = [list(zip(*row, strict=True)) for row in zip(ids.long().tolist(), values.tolist(), strict=True)]
    return [TokenLogprobs(*first, tuple(others)) for first, *others in pairs]


def _greatest(rows: Tensor, count: int) -> Tensor:
    """The ids of the ``count`` greatest of each row, equal ones in order: int64 [T, count]."""
    if count == 0:
        return torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    if rows.is_cpu:  # which sorts slowly
        return torch.stack([_greatest_of(row, count) for row in rows])
    return rows.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _greatest_of(row: Tensor, count: int) -> Tensor:
    ids = (row >= row.topk(count).values[-1]).nonzero()[:, 0]  # topk promises no order of equal values
    return ids[row[ids].argsort(descending=True, stable=True)[:count]]
