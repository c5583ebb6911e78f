"""Random numbers (rule 7), and what is chosen by them."""

import math

import torch
from torch import Tensor

from layerskip_kernels.operands import LogitEdits
from layerskip_kernels.ops.reference.arithmetic import _log_of, _log_parts, exp, log

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
# The third word of a counter: what the numbers are for.
TOKEN_STREAM, ACCEPT_STREAM, RESIDUAL_STREAM = 0, 1, 2
MASS_ONE = 2**40  # the probability of the likeliest token, in the integers that probabilities are summed in


def _multiply_words(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low word of a product; int64 wraps, which leaves its bits right."""
    product = a * b
    return (product >> 32) & WORD, product & WORD


def philox(counters: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011): counters int64 [N, 4] of 32-bit words -> as many random words.

    ``seed`` is the key, its low 32 bits first.
    """
    c0, c1, c2, c3 = (counters & WORD).unbind(1)
    key = [seed & WORD, (seed >> 32) & WORD]
    for _ in range(10):
        high0, low0 = _multiply_words(PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_words(PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(k + step) & WORD for k, step in zip(key, PHILOX_KEY_STEPS, strict=True)]
    return torch.stack([c0, c1, c2, c3], dim=1)


def gumbel(words: Tensor) -> Tensor:
    """Gumbel noise -log(-log(1 - v)) of random words, int64 [N] of 32 bits -> fp32 [N].

    v = (31 bits + 1/2) / 2^31 in fp32. The inner logarithm starts from v, not from 1 - v, where that is near 1:
    great noise, which decides, comes from small v and so keeps 31 bits of resolution.
    """
    v = (((words >> 1).to(torch.float32) + 0.5) * 2.0**-31).clamp(max=1.0 - 2.0**-24)
    f, e = _log_parts((1.0 - v).view(torch.int32))
    return -log(-_log_of(torch.where(e == 0.0, -v, f), e))


def _noise(vocab_size: int, position: int, seed: int, stream: int, sample: int) -> Tensor:
    """The noise of every token id at a position: word id % 4 of the counter (id / 4, position, stream, sample)."""
    counters = torch.tensor([[0, position, stream, sample]]).repeat(-(-vocab_size // 4), 1)
    counters[:, 0] = torch.arange(len(counters))
    return gumbel(philox(counters, seed).view(-1)[:vocab_size])


def _masses(scores: Tensor) -> Tensor:
    """exp(scores - their maximum) as integers, int64: sums of them are exact, so no order has to be fixed."""
    return (exp(scores - scores.max()) * MASS_ONE).to(torch.int64)


def edit_logits(
    logits: Tensor, sequences: Tensor, positions: Tensor, preceding: Tensor, edits: LogitEdits
) -> Tensor:  # fmt: skip
    """Add biases, then apply the penalties, then exclude what ends a text too early: fp32 [T, V] -> fp32 [T, V].

    Row r is that of the token at positions[r] of sequence sequences[r], both int64 [T]; preceding int64 [T, D]: tokens
    generated before it that the edits do not count (drafts), -1 beyond them. A token's score s becomes

        s + bias;  if it was seen, s < 0 ? s * repetition : s / repetition;
        if it was generated n times, (s - frequency * n) - presence;  if it ends the text too early, -inf
    """
    rows = zip(logits, sequences.tolist(), positions, preceding, strict=True)
    return torch.stack([_edit_row(row.clone(), b, position, before, edits) for row, b, position, before in rows])


def _edit_row(row: Tensor, b: int, position: Tensor, preceding: Tensor, edits: LogitEdits) -> Tensor:
    drafted, listed = preceding[preceding >= 0], edits.ids[b] >= 0
    new = drafted[~torch.isin(drafted, edits.ids[b])].unique()
    ids = torch.cat([edits.ids[b, listed], new])
    biases = torch.cat([edits.biases[b, listed], torch.full(new.shape, -0.0)])
    counts = torch.cat([edits.counts[b, listed], torch.full_like(new, -1)])
    ends = torch.cat([edits.ends[b, listed], torch.zeros_like(new, dtype=torch.bool)])
    times = (ids[:, None] == drafted).sum(1)
    seen, generated = (counts >= 0) | (times > 0), counts.clamp(min=0) + times
    s, repetition = row[ids] + biases, edits.repetitions[b]
    s = torch.where(seen, torch.where(s < 0, s * repetition, s / repetition), s)
    penalised = (s - edits.frequencies[b] * generated.float()) - edits.presences[b]
    s = torch.where(generated > 0, penalised, s)
    row[ids] = torch.where(ends & (position < edits.least_positions[b]), -torch.inf, s)
    return row


def filter_logits(scores: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor) -> Tensor:
    """Divide by temperature, then keep what top-k, top-p and min-p leave; the rest becomes -inf.

    scores fp32 [T, V]; for each row temperatures fp32 [T] (0: the row stays as it is), top_ks int64 [T] (0: all),
    top_ps fp64 [T] (1: all), min_ps fp32 [T] (0: all) -> fp32 [T, V]. Tokens are ordered by falling score, then
    rising id; top-k and top-p keep the first of them, at least one. Raises RuntimeError for NaN or +inf, and for a
    row that is -inf throughout.
    """
    rows = [_filter_row(*row) for row in zip(scores, temperatures, top_ks, top_ps, min_ps, strict=True)]
    return torch.stack(rows)


def _filter_row(row: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    if temperature == 0:
        return row.clone()
    row = row / temperature
    _check_scores(row)
    order = row.argsort(descending=True, stable=True)
    kept = len(row) if top_k == 0 else min(int(top_k), len(row))
    masses = _masses(row)[order]
    if top_p < 1:
        limit = max(1, math.ceil(float(top_p) * float(masses[:kept].sum())))
        kept = int((masses[:kept].cumsum(0) - masses[:kept] < limit).sum())
    filtered = torch.full_like(row, -torch.inf)
    filtered[order[:kept]] = row[order[:kept]]
    return torch.where(exp(row - row.max()) >= min_p, filtered, -torch.inf)


def _check_scores(scores: Tensor) -> None:
    if scores.isnan().any() or not -torch.inf < scores.max() < torch.inf:
        raise RuntimeError(BAD_SCORES)


BAD_SCORES = (
    "no token can be chosen: a score is NaN or +infinite, or all are -infinite. The logits overflowed, or every token "
    "was excluded: check temperature, penalties and logit_bias"
)


def gumbel_argmax(scores: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor, noisy: Tensor) -> Tensor:
    """Draw a token of each row: argmax(scores + noise), which has the distribution softmax(scores).

    scores fp32 [T, V]; positions int64 [T] of the tokens to be drawn; seeds, samples int64 [T]; noisy bool [T]:
    False takes the greatest score. Returns int64 [T]. Raises RuntimeError as filter_logits does.
    """
    tokens = []
    for row, position, seed, sample, noise in zip(scores, positions, seeds, samples, noisy, strict=True):
        _check_scores(row)
        if noise:
            row = row + _noise(len(row), int(position), int(seed), TOKEN_STREAM, int(sample))
        tokens.append((row == row.max()).nonzero()[0, 0])
    return torch.stack(tokens)


def rejection_sample(
    draft_scores: Tensor, scores: Tensor, drafts: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor
) -> Tensor:
    """Keep a draft with probability min(1, p / q), or else draw from max(p - q, 0): the token has distribution p.

    draft_scores, scores fp32 [T, V]: the logarithms of q, which the drafts int64 [T] were drawn from, and of p, up
    to a constant; positions, seeds, samples as in gumbel_argmax. Returns int64 [T], the draft where it was kept; a
    token drawn instead is another one. (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2.)
    """
    tokens = []
    for q_row, p_row, draft, position, seed, sample in zip(
        draft_scores, scores, drafts, positions.tolist(), seeds.tolist(), samples.tolist(), strict=True
    ):
        _check_scores(q_row)
        _check_scores(p_row)
        q, p = (masses.double() / masses.sum().double() for masses in (_masses(q_row), _masses(p_row)))
        word = philox(torch.tensor([[0, position, ACCEPT_STREAM, sample]]), seed)[0, 0]
        u = ((word >> 1).double() + 0.5) * 2.0**-31
        if u * q[draft] < p[draft]:
            tokens.append(draft)
            continue
        residual = (p - q).clamp(min=0.0).float()
        # Nothing is left only where p and q are equal up to rounding.
        weights = log(residual) if residual.any() else p_row
        noisy = weights + _noise(len(weights), position, seed, RESIDUAL_STREAM, sample)
        tokens.append((noisy == noisy.max()).nonzero()[0, 0])
    return torch.stack(tokens)
