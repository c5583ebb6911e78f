"""Final RMSNorm, LM head, argmax: rules 1, 2 and 6.

    logits = dot(x, lm_head) * multiplier, perhaps capped;  token = the lowest of the largest

A program computes two tiles of C logits of up to 8 rows and the largest of each; what follows (a draft's next token,
accept_draft) takes the largest of those. Moves V D weights once for every 8 rows, T D numbers for each program,
2 T V / C candidates and, where they are wanted, T V logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import device_function, soft_cap
from .errors import NAN_LOGITS, check_error, new_error
from .integer_dot import products
from .integer_rows import Rows, round_rows
from .launch import OPTIONS, blocks, columns_of, streaming
from .quantised import code_of
from .rms_norm import normalised

__all__ = ["Candidates", "best_token", "head_candidates", "norm_head_argmax", "take_draft", "take_targets"]

TILES = 2
COMPARED = 512  # candidates that are compared at once


@triton.jit
def _head_kernel(
    x_ptr, rows_ptr, w_ptr, logits_ptr, best_ptr, token_ptr, stride_x, T, N, steps, multiplier, cap,
    KIND: tl.constexpr, LOGITS: tl.constexpr, CAPPED: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
    FMA: tl.constexpr, PROMPT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1)
    row0 = tl.program_id(0).to(tl.int64) * ROWS  # programs that read the same weights run one after the other
    first = pid * TILES * C + tl.arange(0, C)
    last = (N + 15) // 16 * 16 - 1
    w_ptrs = ()
    columns = ()
    for t in tl.static_range(TILES):
        w_ptrs = w_ptrs + (w_ptr,)
        columns = columns + (tl.minimum(first + t * C, last),)
    y = products(
        x_ptr, stride_x, rows_ptr, row0, T, w_ptrs, columns, steps, KIND, True,
        ROWS, TILES, C, AHEAD, EVEN, FMA, PROMPT, DEPENDENT,
    )  # fmt: skip
    for r in tl.static_range(ROWS):
        if row0 + r < T:
            for t in tl.static_range(TILES):
                n = first + t * C
                z = y[t * ROWS + r] * multiplier
                if CAPPED:
                    z = soft_cap(z, cap)
                z = tl.where(n < N, z, -float("inf"))
                if LOGITS:
                    tl.store(logits_ptr + (row0 + r) * N + n, z, mask=n < N)
                best = tl.max(z)
                token = tl.min(tl.where((z == best) & (n < N), n, N)).to(tl.int32)
                no_number = tl.max((z != z).to(tl.int32))
                candidate = ((row0 + r) * tl.num_programs(1) + pid) * TILES + t
                tl.store(best_ptr + candidate, best)
                tl.store(token_ptr + candidate, tl.where(no_number > 0, -1, token))


@device_function
def best_token(best_ptr, token_ptr, rows, mask_rows, num_blocks, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Rule 6 over the candidates of rows int64 [ROWS]: tokens int32 [ROWS], -1 where a logit is NaN."""
    best = tl.full([ROWS], -float("inf"), tl.float32)
    token = tl.full([ROWS], 2147483647, tl.int32)
    lowest = tl.zeros([ROWS], tl.int32)
    for start in range(0, num_blocks, TILE):
        block = start + tl.arange(0, TILE)
        mask = mask_rows[:, None] & (block < num_blocks)[None, :]
        offs = rows[:, None] * num_blocks + block[None, :]
        values = tl.load(best_ptr + offs, mask=mask, other=-float("inf"))
        tokens = tl.load(token_ptr + offs, mask=mask, other=2147483647)
        tile_best = tl.max(values, axis=1)
        tile_token = tl.min(tl.where(values == tile_best[:, None], tokens, 2147483647), axis=1)
        lowest = tl.minimum(lowest, tl.min(tokens, axis=1))
        better = (tile_best > best) | ((tile_best == best) & (tile_token < token))
        token = tl.where(better, tile_token, token)
        best = tl.maximum(best, tile_best)
    return tl.where(lowest < 0, -1, token)


@device_function
def _token_of_row(best_ptr, token_ptr, row, error_ptr, num_blocks, TILE: tl.constexpr, NAN_LOGITS: tl.constexpr):
    rows = row + tl.arange(0, 1)
    token = tl.max(best_token(best_ptr, token_ptr, rows, rows >= 0, num_blocks, 1, TILE)).to(tl.int64)
    if token < 0:
        tl.atomic_max(error_ptr, NAN_LOGITS)
    return token


@triton.jit
def _take_target_kernel(
    best_ptr, token_ptr, rows_ptr, targets_ptr, error_ptr, num_blocks, TILE: tl.constexpr, NAN_LOGITS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(rows_ptr + row) < 0:
        return
    tl.store(targets_ptr + row, _token_of_row(best_ptr, token_ptr, row, error_ptr, num_blocks, TILE, NAN_LOGITS))


@triton.jit
def _take_draft_kernel(
    best_ptr, token_ptr, ids_ptr, order_ptr, counts_ptr, columns_ptr, drafts_ptr, tokens_ptr, positions_ptr, error_ptr,
    num_blocks, max_drafts, HAS_IDS: tl.constexpr, TILE: tl.constexpr, NAN_LOGITS: tl.constexpr,
):  # fmt: skip
    """All is read before the token is found, which takes barriers, and written after it."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(order_ptr + row) < 0:
        return
    count, column = tl.load(counts_ptr + row), tl.load(columns_ptr + row)
    position = tl.load(positions_ptr + row)
    token = _token_of_row(best_ptr, token_ptr, row, error_ptr, num_blocks, TILE, NAN_LOGITS)
    if HAS_IDS:
        if token >= 0:
            token = tl.load(ids_ptr + token)
    tl.store(drafts_ptr + row * max_drafts + column, token)
    tl.store(tokens_ptr + row, token)
    tl.store(positions_ptr + row, position + 1)
    tl.store(columns_ptr + row, column + 1)
    if column + 1 >= count:
        tl.store(order_ptr + row, -1)


class Candidates:
    """What is left of each row: best fp32 and token int32 of each of its blocks."""

    def __init__(self, num_rows: int, num_blocks: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.best = torch.empty(num_rows, self.num_blocks, device=device)
        self.tokens = torch.empty(num_rows, self.num_blocks, dtype=torch.int32, device=device)

    @classmethod
    def of_head(cls, num_rows: int, head: Tensor, size: int, device: torch.device) -> Candidates:
        """Those of a packed LM head of ``size`` columns: its blocks are a program's tiles."""
        return cls(num_rows, blocks(size, TILES * columns_of("norm_head_argmax", head)) * TILES, device)


def head_candidates(
    x: Rows, rows: Tensor, lm_head: Tensor, vocab_size: int, candidates: Candidates, logits: Tensor | None,
    multiplier: float = 1.0, cap: float = 0.0,
) -> None:  # fmt: skip
    """The candidates of rows int32 [T] of x, and logits fp32 [T, V] if wanted."""
    num_rows = len(rows)
    options = streaming("norm_head_argmax", num_rows, TILES, x.k, lm_head)
    round_rows(x, num_rows, lm_head, rows=rows, dependent=options["DEPENDENT"])
    _head_kernel[(blocks(num_rows, options["ROWS"]), candidates.num_blocks // TILES)](
        x_ptr=x.of(lm_head),
        rows_ptr=rows,
        w_ptr=lm_head,
        logits_ptr=x.numbers if logits is None else logits,
        best_ptr=candidates.best,
        token_ptr=candidates.tokens,
        stride_x=x.stride,
        T=num_rows,
        N=vocab_size,
        steps=x.steps,
        KIND=code_of(lm_head),
        multiplier=multiplier,
        cap=cap,
        CAPPED=cap != 0,
        LOGITS=logits is not None,
        **options,
    )


def take_draft(
    candidates: Candidates, draft_ids: Tensor | None, order: Tensor, counts: Tensor, columns: Tensor, drafts: Tensor,
    tokens: Tensor, positions: Tensor, error: Tensor,
) -> None:  # fmt: skip
    """The token of each row of candidates becomes the next draft of its sequence, which has the same number.

    order int32 [T]: -1 where a row drafts nothing, and, afterwards, nothing more; counts int32 [B]: how many drafts a
    sequence takes; columns int32 [B]: how many it has; drafts int64 [B, max_drafts]. tokens, positions int64 [B]: the
    next row to draft from. draft_ids int64: the token ids that the head's columns stand for (None: themselves).
    """
    _take_draft_kernel[(len(order),)](
        best_ptr=candidates.best,
        token_ptr=candidates.tokens,
        ids_ptr=drafts if draft_ids is None else draft_ids,
        order_ptr=order,
        counts_ptr=counts,
        columns_ptr=columns,
        drafts_ptr=drafts,
        tokens_ptr=tokens,
        positions_ptr=positions,
        error_ptr=error,
        num_blocks=candidates.num_blocks,
        max_drafts=drafts.size(1),
        HAS_IDS=draft_ids is not None,
        TILE=COMPARED,
        NAN_LOGITS=NAN_LOGITS,
        num_warps=4,
        **OPTIONS,
    )


def take_targets(candidates: Candidates, rows: Tensor, targets: Tensor, error: Tensor) -> None:
    """The token of each row of candidates -> targets int64 [T]. rows int32 [T]: -1 where there is none."""
    _take_target_kernel[(len(rows),)](
        best_ptr=candidates.best,
        token_ptr=candidates.tokens,
        rows_ptr=rows,
        targets_ptr=targets,
        error_ptr=error,
        num_blocks=candidates.num_blocks,
        TILE=COMPARED,
        NAN_LOGITS=NAN_LOGITS,
        num_warps=4,
        **OPTIONS,
    )


def norm_head_argmax(
    hidden: Tensor, norm_weight: Tensor, lm_head: Tensor, vocab_size: int, eps: float, norm_offset: float = 0.0,
    multiplier: float = 1.0, cap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """reference.norm_head_argmax: [T, D] -> tokens int64 [T], logits fp32 [T, V]. Waits for the device, to raise."""
    num_rows, device = len(hidden), hidden.device
    candidates = Candidates.of_head(num_rows, lm_head, vocab_size, device)
    logits = torch.empty(num_rows, vocab_size, device=device)
    rows = torch.arange(num_rows, dtype=torch.int32, device=device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    error = new_error(device)
    x = normalised(hidden, norm_weight, eps, norm_offset, lm_head)
    head_candidates(x, rows, lm_head, vocab_size, candidates, logits, multiplier, cap)
    take_targets(candidates, rows, tokens, error)
    check_error(error)
    return tokens, logits
