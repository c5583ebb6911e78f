"""Keep a draft with probability min(1, p / q), or draw from max(p - q, 0) in its place (rule 7).

    q, p = masses / their sum, in fp64;  kept if u * q[draft] < p[draft];  else argmax(log(max(p - q, 0)) + noise)

Masses are integers, so their sums have one value in any order. Moves two rows of scores twice for each draft.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import log
from .errors import BAD_SCORES, check_error, new_error
from .filters import BLOCK, mass_of, maximum_of, scale_rows
from .launch import OPTIONS, blocks
from .random import ACCEPT_STREAM, RESIDUAL_STREAM, noise_of, philox_words

__all__ = ["Rejection", "rejection_sample"]


@triton.jit
def _add_masses_kernel(
    draft_scores_ptr, draft_maxima_ptr, scores_ptr, maxima_ptr, rows_ptr, totals_ptr, error_ptr, N, num_blocks,
    BAD_SCORES: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The sums of a draft's masses: of q, and of p."""
    draft = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + draft).to(tl.int64)
    if row < 0:
        return
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    q_maximum = maximum_of(draft_maxima_ptr, draft, num_blocks, BLOCKS)
    p_maximum = maximum_of(maxima_ptr, row, num_blocks, BLOCKS)
    least, most = tl.minimum(q_maximum, p_maximum), tl.maximum(q_maximum, p_maximum)
    if not ((least > -float("inf")) & (most < float("inf"))):
        tl.atomic_max(error_ptr, BAD_SCORES)
    q = tl.load(draft_scores_ptr + draft * N + n, mask=n < N, other=-float("inf"))
    p = tl.load(scores_ptr + row * N + n, mask=n < N, other=-float("inf"))
    tl.atomic_add(totals_ptr + draft * 2, tl.sum(mass_of(q, q_maximum)))
    tl.atomic_add(totals_ptr + draft * 2 + 1, tl.sum(mass_of(p, p_maximum)))


@triton.jit
def _residual_kernel(
    draft_scores_ptr, draft_maxima_ptr, scores_ptr, maxima_ptr, rows_ptr, totals_ptr, tokens_ptr, places_ptr,
    positions_ptr, seeds_ptr, samples_ptr, kept_ptr, best_ptr, token_ptr, N, num_blocks,
    ACCEPT_STREAM: tl.constexpr, RESIDUAL_STREAM: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Whether a draft is kept; if not, the best token of each block by the residual and by p, which counts where
    nothing is left of the residual: p and q are equal up to rounding."""
    pid = tl.program_id(0)
    draft = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + draft).to(tl.int64)
    if row < 0:
        return
    n = pid * BLOCK + tl.arange(0, BLOCK)
    q_maximum = maximum_of(draft_maxima_ptr, draft, num_blocks, BLOCKS)
    p_maximum = maximum_of(maxima_ptr, row, num_blocks, BLOCKS)
    q_total = tl.load(totals_ptr + draft * 2).to(tl.float64)
    p_total = tl.load(totals_ptr + draft * 2 + 1).to(tl.float64)
    position, seed, sample = tl.load(positions_ptr + row), tl.load(seeds_ptr + row), tl.load(samples_ptr + row)

    one = tl.arange(0, 1)
    token = tl.load(tokens_ptr + tl.load(places_ptr + draft) + one)
    token = tl.minimum(tl.maximum(token, 0), N - 1)
    zero = one.to(tl.uint32)
    words = philox_words(zero, zero + position.to(tl.uint32), zero + ACCEPT_STREAM, zero + sample.to(tl.uint32), seed)
    u = ((words[0] >> 1).to(tl.int32).to(tl.float64) + 0.5) * 4.656612873077393e-10  # 2^-31
    q_draft = mass_of(tl.load(draft_scores_ptr + draft * N + token), q_maximum).to(tl.float64) / q_total
    p_draft = mass_of(tl.load(scores_ptr + row * N + token), p_maximum).to(tl.float64) / p_total
    kept = tl.max((u * q_draft < p_draft).to(tl.int32))
    if pid == 0:
        tl.store(kept_ptr + draft, kept)
    if kept == 0:
        q = tl.load(draft_scores_ptr + draft * N + n, mask=n < N, other=-float("inf"))
        p = tl.load(scores_ptr + row * N + n, mask=n < N, other=-float("inf"))
        difference = mass_of(p, p_maximum).to(tl.float64) / p_total - mass_of(q, q_maximum).to(tl.float64) / q_total
        residual = log(tl.where(difference > 0.0, difference, 0.0).to(tl.float32))
        noise = noise_of(pid * BLOCK, position, RESIDUAL_STREAM, sample, seed, BLOCK)
        for i in tl.static_range(2):
            noisy = tl.where(n < N, (residual if i == 0 else p) + noise, -float("inf"))
            best = tl.max(noisy)
            place = (draft * 2 + i) * num_blocks + pid
            tl.store(best_ptr + place, best)
            tl.store(token_ptr + place, tl.min(tl.where((noisy == best) & (n < N), n, N - 1)))


@triton.jit
def _settle_kernel(
    tokens_ptr, places_ptr, rows_ptr, kept_ptr, best_ptr, token_ptr, targets_ptr, num_blocks, BLOCKS: tl.constexpr
):
    """The draft, or what was drawn in its place -> targets."""
    draft = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + draft)
    if row < 0:
        return
    if tl.load(kept_ptr + draft) > 0:
        tl.store(targets_ptr + row, tl.load(tokens_ptr + tl.load(places_ptr + draft)))
    else:
        block = tl.arange(0, BLOCKS)
        mask = block < num_blocks
        place = draft * 2 * num_blocks + block
        best = tl.load(best_ptr + place, mask=mask, other=-float("inf"))
        if tl.max(best) == -float("inf"):
            place += num_blocks
            best = tl.load(best_ptr + place, mask=mask, other=-float("inf"))
        token = tl.load(token_ptr + place, mask=mask & (best == tl.max(best)), other=2147483647)
        tl.store(targets_ptr + row, tl.min(token).to(tl.int64))


class Rejection:
    """Buffers to judge drafts by the rejection rule.

    rows int32 [R]: which row of scores judges each draft, -1: none; places int32 [R]: where among the tokens it is.
    """

    def __init__(self, rows: Tensor, places: Tensor, size: int) -> None:
        self.rows, self.places, self.num_blocks = rows, places, blocks(size, BLOCK)
        device = rows.device
        self.maxima = torch.empty(len(rows), self.num_blocks, device=device)
        self.totals = torch.zeros(len(rows), 2, dtype=torch.int64, device=device)
        self.kept = torch.zeros(len(rows), dtype=torch.int32, device=device)
        self.best = torch.empty(len(rows), 2, self.num_blocks, device=device)
        self.tokens = torch.zeros(len(rows), 2, self.num_blocks, dtype=torch.int32, device=device)

    def run(
        self, draft_scores: Tensor, scores: Tensor, maxima: Tensor, tokens: Tensor, positions: Tensor, seeds: Tensor,
        samples: Tensor, targets: Tensor, error: Tensor,
    ) -> None:  # fmt: skip
        """Overwrites targets int64 [T] of the rows that judge drafts. Notes what cannot be drawn.

        draft_scores fp32 [R, V]; scores fp32 [T, V] and the greatest of each of their blocks, maxima fp32 [T, blocks];
        tokens int64: the drafts are among them; positions, seeds, samples int64 [T].
        """
        self.totals.zero_()
        scale_rows(draft_scores, None, self.rows, draft_scores, self.maxima)
        size, block_count = scores.size(1), triton.next_power_of_2(self.num_blocks)
        grid = self.num_blocks, len(self.rows)
        both = dict(
            draft_scores_ptr=draft_scores, draft_maxima_ptr=self.maxima, scores_ptr=scores, maxima_ptr=maxima,
            rows_ptr=self.rows, totals_ptr=self.totals, N=size, num_blocks=self.num_blocks, BLOCK=BLOCK,
            BLOCKS=block_count, num_warps=4, **OPTIONS,
        )  # fmt: skip
        _add_masses_kernel[grid](error_ptr=error, BAD_SCORES=BAD_SCORES, **both)
        _residual_kernel[grid](
            tokens_ptr=tokens, places_ptr=self.places, positions_ptr=positions, seeds_ptr=seeds, samples_ptr=samples,
            kept_ptr=self.kept, best_ptr=self.best, token_ptr=self.tokens, ACCEPT_STREAM=ACCEPT_STREAM,
            RESIDUAL_STREAM=RESIDUAL_STREAM, **both,
        )  # fmt: skip
        _settle_kernel[(len(self.rows),)](
            tokens_ptr=tokens, places_ptr=self.places, rows_ptr=self.rows, kept_ptr=self.kept, best_ptr=self.best,
            token_ptr=self.tokens, targets_ptr=targets, num_blocks=self.num_blocks, BLOCKS=block_count, num_warps=4,
            **OPTIONS,
        )  # fmt: skip


def rejection_sample(
    draft_scores: Tensor, scores: Tensor, drafts: Tensor, positions: Tensor, seeds: Tensor, samples: Tensor
) -> Tensor:
    """reference.rejection_sample of tensors on the device. Waits for it, to raise."""
    scores, error = scores.contiguous(), new_error(scores.device)
    rows = torch.arange(len(scores), dtype=torch.int32, device=scores.device)
    rejection = Rejection(rows, rows, scores.size(1))
    maxima, targets = torch.empty_like(rejection.maxima), torch.empty_like(drafts)
    scale_rows(scores, None, rows, scores, maxima)
    rejection.run(draft_scores.contiguous(), scores, maxima, drafts, positions, seeds, samples, targets, error)
    check_error(error)
    return targets
