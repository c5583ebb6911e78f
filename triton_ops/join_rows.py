"""Rows join a move of the staircase: their first hidden state, its norm, and where their K and V go.

    hidden[t] = embedding[token] * multiplier (depth 0) or hidden_cache[slot];  x[t] = rms_norm(hidden[t]) (rule 2)

Moves one row of D numbers in, two out, for each joining row.
"""

import triton
import triton.language as tl
from torch import Tensor

from .contract import norm_rows, rounded, to_dtype
from .errors import BAD_PAGE, BAD_POSITION, BAD_TOKEN
from .integer_rows import Rows
from .launch import OPTIONS, norm_layout
from .quantised import code_of
from .stored_rows import stored_number

__all__ = ["join_rows"]


@triton.jit
def _join_rows_kernel(
    tokens_ptr, given_positions_ptr, order_ptr, sequence_ptr, block_table_ptr, embedding_ptr, hidden_cache_ptr,
    norm_ptr, positions_ptr, slots_ptr, hidden_ptr, x_ptr, error_ptr,
    first_row, vocab_size, max_positions, max_blocks, num_pages, S, D, steps, stride_x, eps,
    norm_offset, multiplier,
    HAS_NORM: tl.constexpr, FROM_EMBEDDING: tl.constexpr, KIND: tl.constexpr,
    BAD_TOKEN: tl.constexpr, BAD_POSITION: tl.constexpr, BAD_PAGE: tl.constexpr,
    THREADS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = first_row + tl.program_id(0).to(tl.int64)
    given = tl.load(order_ptr + row)
    real = given >= 0
    position = tl.load(given_positions_ptr + given, mask=real, other=0).to(tl.int32)
    sequence = tl.load(sequence_ptr + row).to(tl.int64)
    block = position // S
    placed = real & (position >= 0) & (position < max_positions) & (block < max_blocks)
    page = tl.load(block_table_ptr + sequence * max_blocks + block, mask=placed, other=-1).to(tl.int64)
    paged = (page >= 0) & (page < num_pages)
    if real:
        if not placed:
            tl.atomic_max(error_ptr, BAD_POSITION)
        elif not paged:
            tl.atomic_max(error_ptr, BAD_PAGE)
    slot = tl.where(paged, page * S + position % S, -1)
    tl.store(positions_ptr + row, tl.where(placed, position, 0).to(tl.int64))
    tl.store(slots_ptr + row, slot)

    token = tl.load(tokens_ptr + given, mask=real, other=-1)
    known = (token >= 0) & (token < vocab_size)
    if FROM_EMBEDDING:
        if real & ~known:
            tl.atomic_max(error_ptr, BAD_TOKEN)
    length = (D + 7) // 8
    for start in range(0, D, 256):
        i = start + tl.arange(0, 256)
        if FROM_EMBEDDING:
            if KIND == 0:
                k = i % length
                offs = token // 16 * (steps * 1024) + k // 8 * 1024 + i // length * 128 + token % 16 * 8 + k % 8
                value = tl.load(embedding_ptr + offs, mask=(i < D) & known, other=0.0).to(tl.float32)
            else:
                inside = (i < D) & known
                value = stored_number(embedding_ptr, tl.where(known, token, 0), i, inside, (D + 255) // 256, KIND)
                value = rounded(value, hidden_ptr.dtype.element_ty)
            value = to_dtype(value * multiplier, hidden_ptr.dtype.element_ty)
        else:
            value = tl.load(hidden_cache_ptr + slot * D + i, mask=(i < D) & paged, other=0.0)
        tl.store(hidden_ptr + row * D + i, value, mask=i < D)
    tl.debug_barrier()  # the norm's threads read what others of this program wrote
    rows = row + tl.arange(0, 1)
    norm_rows(hidden_ptr, rows, rows >= 0, D, norm_ptr, eps, norm_offset, x_ptr, stride_x, 1, HAS_NORM, THREADS, WHOLE)


def join_rows(
    tokens: Tensor, positions: Tensor, order: Tensor, sequence_of_row: Tensor, block_table: Tensor, embedding: Tensor,
    hidden_cache: Tensor, norm_weight: Tensor | None, row_positions: Tensor, slots: Tensor, hidden: Tensor, x: Rows,
    error: Tensor, first_row: int, num_rows: int, vocab_size: int, max_positions: int, eps: float,
    from_embedding: bool, norm_offset: float = 0.0, multiplier: float = 1.0,
) -> None:  # fmt: skip
    """Rows first_row .. first_row + num_rows - 1 of the step's buffers join.

    tokens, positions int64, as given to the step; order int32 [T]: which given row each is, -1: none, a row that has
    no slot and notes nothing; sequence_of_row int32 [T]; block_table int32 [B, max_blocks]; embedding packed [V, D];
    hidden_cache [P, S, D]. Writes row_positions, slots int64 [T] (-1 where the table names no page), hidden [T, D] and
    the numbers of x [T, D].
    """
    num_pages, page_size, hidden_size = hidden_cache.shape
    _join_rows_kernel[(num_rows,)](
        tokens_ptr=tokens,
        given_positions_ptr=positions,
        order_ptr=order,
        sequence_ptr=sequence_of_row,
        block_table_ptr=block_table,
        embedding_ptr=embedding,
        hidden_cache_ptr=hidden_cache,
        norm_ptr=hidden if norm_weight is None else norm_weight,
        positions_ptr=row_positions,
        slots_ptr=slots,
        hidden_ptr=hidden,
        x_ptr=x.numbers,
        error_ptr=error,
        first_row=first_row,
        vocab_size=vocab_size,
        max_positions=max_positions,
        max_blocks=block_table.size(1),
        num_pages=num_pages,
        S=page_size,
        D=hidden_size,
        steps=x.steps,
        stride_x=x.stride,
        eps=eps,
        norm_offset=norm_offset,
        multiplier=multiplier,
        HAS_NORM=norm_weight is not None,
        FROM_EMBEDDING=from_embedding,
        KIND=code_of(embedding),
        BAD_TOKEN=BAD_TOKEN,
        BAD_POSITION=BAD_POSITION,
        BAD_PAGE=BAD_PAGE,
        **norm_layout(hidden_size, 4),
        num_warps=4,
        **OPTIONS,
    )
