"""Draw a token of each row: filters, noise (rule 7) and the greatest of each block.

    token = argmax(kept scores + noise), among equals the lowest id

A program has a block of a row's tokens and leaves the best of them, as the LM head's kernel does: what follows (a
draft's next token, accept_draft) takes the best of those. Moves a row of scores once, twice where it is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerskip_kernels.operands import DraftSampling, LogitEdits

from .contract import exp
from .errors import BAD_SCORES, check_error, new_error
from .filters import BLOCK, Cuts, find_cuts, is_kept, maximum_of, scale_rows
from .launch import OPTIONS, blocks
from .norm_head_argmax import Candidates, take_targets
from .random import TOKEN_STREAM, noise_of, noise_of_ids

__all__ = ["Chooser", "Drawing", "filter_logits", "gumbel_argmax"]


@triton.jit
def _choose_kernel(
    scores_ptr, maxima_ptr, sequence_ptr, cut_ptr, ties_ptr, temperatures_ptr, min_ps_ptr, positions_ptr, seeds_ptr,
    samples_ptr, ids_ptr, kept_ptr, best_ptr, token_ptr, error_ptr, N, num_blocks, position_step, kept_rows,
    columns_ptr, kept_size,
    FILTER: tl.constexpr, CUT: tl.constexpr, KEEP: tl.constexpr, DRAW: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    STREAM: tl.constexpr, BAD_SCORES: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """KEEP: write the filtered scores to row kept_rows * sequence + columns[sequence]; DRAW: add noise, leave the
    best."""
    pid = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    sequence = tl.load(sequence_ptr + row).to(tl.int64)
    if sequence < 0:
        return
    n = pid * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores_ptr + row * N + n, mask=n < N, other=-float("inf"))
    maximum = maximum_of(maxima_ptr, row, num_blocks, BLOCKS)
    temperature = tl.load(temperatures_ptr + sequence)
    if not ((maximum > -float("inf")) & (maximum < float("inf"))):
        if DRAW or temperature != 0.0:
            tl.atomic_max(error_ptr, BAD_SCORES)
    if FILTER:
        least = tl.where(temperature == 0.0, -1.0, tl.load(min_ps_ptr + sequence))
        kept = ~(exp(score - maximum) < least)
        if CUT:
            kept = kept & is_kept(score, n, N, cut_ptr, ties_ptr, row, pid, num_blocks, BLOCKS)
        score = tl.where(kept, score, -float("inf"))
    column = n
    if HAS_IDS:
        column = tl.load(ids_ptr + n, mask=n < N, other=0).to(tl.int32)
    if KEEP:
        kept_row = sequence * kept_rows
        if HAS_COLUMNS:
            kept_row += tl.load(columns_ptr + sequence)
        tl.store(kept_ptr + kept_row * kept_size + column, score, mask=n < N)
    if DRAW:
        if temperature != 0.0:
            position = tl.load(positions_ptr + sequence) + position_step
            sample, seed = tl.load(samples_ptr + sequence), tl.load(seeds_ptr + sequence)
            if HAS_IDS:
                score = score + noise_of_ids(column, position, STREAM, sample, seed, BLOCK)
            else:
                score = score + noise_of(pid * BLOCK, position, STREAM, sample, seed, BLOCK)
        best = tl.max(score)
        token = tl.minimum(tl.min(tl.where((score == best) & (n < N), n, N)), N - 1).to(tl.int32)
        tl.store(best_ptr + row * num_blocks + pid, best)
        tl.store(token_ptr + row * num_blocks + pid, token)


class Chooser:
    """Buffers to draw from up to ``num_rows`` rows of ``size`` tokens, and what is left of each row: ``candidates``.

    top_k, top_p: whether any row is filtered by these.
    """

    def __init__(self, num_rows: int, size: int, top_k: bool, top_p: bool, device: torch.device) -> None:
        self.size = size
        self.num_blocks = blocks(size, BLOCK)
        self.maxima = torch.empty(num_rows, self.num_blocks, device=device)
        self.cuts = Cuts(num_rows, size, top_k, top_p, device) if top_k or top_p else None
        self.candidates = Candidates(num_rows, self.num_blocks, device)

    def run(
        self, logits: Tensor, scores: Tensor | None, sequences: Tensor, sampling: DraftSampling, positions: Tensor,
        error: Tensor, position_step: int = 0, draw: bool = True, ids: Tensor | None = None, kept: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The candidates of rows of logits fp32 [T, N], row r with the settings and position of sequences[r] int32;
        -1: that row is left out.

        scores fp32 [T, N]: where the logits go, divided by the temperature (None: there are no filters); may be they.
        draw: add noise where the temperature is not 0. ids int64 [N]: the tokens that columns stand for, ascending.
        kept fp32 [B, rows, V]: where the filtered scores go, to [sequence, columns[sequence] int32 (None: 0)]; may be
        scores. Notes what cannot be drawn.
        """
        s = sampling
        filtered, scores = scores is not None, logits if scores is None else scores
        scale_rows(logits, s.temperatures if filtered else None, sequences, scores, self.maxima)
        if self.cuts is not None:
            find_cuts(self.cuts, scores, self.maxima, sequences, s.temperatures, s.top_ks, s.top_ps)
        _choose_kernel[(self.num_blocks, len(sequences))](
            scores_ptr=scores,
            maxima_ptr=self.maxima,
            sequence_ptr=sequences,
            cut_ptr=sequences if self.cuts is None else self.cuts.cut(len(sequences)),
            ties_ptr=sequences if self.cuts is None else self.cuts.ties,
            temperatures_ptr=s.temperatures,
            min_ps_ptr=s.min_ps,
            positions_ptr=positions,
            seeds_ptr=s.seeds,
            samples_ptr=s.samples,
            ids_ptr=sequences if ids is None else ids,
            kept_ptr=scores if kept is None else kept,
            best_ptr=self.candidates.best,
            token_ptr=self.candidates.tokens,
            error_ptr=error,
            N=self.size,
            num_blocks=self.num_blocks,
            position_step=position_step,
            kept_rows=0 if kept is None else kept.size(1),
            columns_ptr=sequences if columns is None else columns,
            kept_size=0 if kept is None else kept.size(2),
            FILTER=filtered,
            CUT=self.cuts is not None,
            KEEP=kept is not None,
            DRAW=draw,
            HAS_IDS=ids is not None,
            HAS_COLUMNS=columns is not None,
            STREAM=TOKEN_STREAM,
            BAD_SCORES=BAD_SCORES,
            BLOCK=BLOCK,
            BLOCKS=triton.next_power_of_2(self.num_blocks),
            num_warps=4,
            **OPTIONS,
        )


@dataclass(frozen=True)
class Drawing:
    """What decides the launches that draw tokens: whether any row is cut by top-k, or by top-p, and how many tokens'
    logits of each sequence may be edited."""

    top_k: bool
    top_p: bool
    edits: int = 0

    @classmethod
    def of(cls, sampling: DraftSampling | None, edits: LogitEdits | None) -> Drawing | None:
        """Reads the settings, which are on the host."""
        if sampling is None:
            return None
        listed = 0 if edits is None else edits.ids.size(1)
        return cls(bool((sampling.top_ks > 0).any()), bool((sampling.top_ps < 1).any()), listed)

    def chooser(self, num_rows: int, size: int, device: torch.device) -> Chooser:
        return Chooser(num_rows, size, self.top_k, self.top_p, device)


def filter_logits(scores: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor) -> Tensor:
    """reference.filter_logits of tensors on the device. Waits for it, to raise."""
    rows, size = scores.shape
    filtered, error = torch.empty(rows, size, device=scores.device), new_error(scores.device)
    sequences = torch.arange(rows, dtype=torch.int32, device=scores.device)
    sampling = DraftSampling(temperatures, top_ks, top_ps, min_ps, top_ks, top_ks)
    chooser, kept = Chooser(rows, size, True, True, scores.device), filtered.view(rows, 1, size)
    chooser.run(scores.contiguous(), filtered, sequences, sampling, top_ks, error, draw=False, kept=kept)
    check_error(error)
    return filtered


def gumbel_argmax(scores: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor, noisy: Tensor) -> Tensor:
    """reference.gumbel_argmax of tensors on the device. Waits for it, to raise."""
    rows, size = scores.shape
    error = new_error(scores.device)
    sequences = torch.arange(rows, dtype=torch.int32, device=scores.device)
    sampling = DraftSampling(noisy.float(), samples, samples, samples, seeds, samples)
    chooser = Chooser(rows, size, False, False, scores.device)
    chooser.run(scores.contiguous(), None, sequences, sampling, positions, error)
    tokens = torch.empty(rows, dtype=torch.int64, device=scores.device)
    take_targets(chooser.candidates, sequences, tokens, error)
    check_error(error)
    return tokens
