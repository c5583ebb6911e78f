"""Attention over pages, in chunks of 256 positions that run in parallel and are merged in order: rule 4.

    s_j = scale * fold_d(q[d] k_j[d]), perhaps capped
    m = max s;  p_j = to_dtype(exp(s_j - m));  l = fold_j(p_j);  o = fold_j(p_j v_j)
    merged: m' = max(m, m_new);  l exp(m - m') + l_new exp(m_new - m');  o likewise;  to_dtype(o / l)

A program has chunks of one sequence's KV head and up to 8 of its rows, with all query heads of that KV head: each of
them reads what the first one loaded. Of a prompt in 16 bits it has 64 of rows times query heads, as a tile. With a
window, a row sees no more than the last positions. Moves 2 K numbers for each position, KV head and program's rows.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_chunk import attend_to_chunk
from .contract import CHUNK, INTERPRETED, exp, rounded, segment_offset
from .launch import OPTIONS, PROMPT_ROWS, blocks, exact_products, wide_dots_are_chains
from .packing import row_stride
from .rms_norm import from_segments

__all__ = ["AttentionScratch", "ScratchMemory", "attend", "paged_attention"]

MAX_ROWS = 8
TILE_ROWS = 64  # of a prompt's tile: rows times query heads of a KV head
LEAST_DOT = 16  # rows, columns and products that a dot of Triton's takes at least
TILE = 128  # positions whose scores are computed at once
WARPS = 8
ENOUGH_PROGRAMS = 256  # that have all chunks of their rows: about as many as a large GPU runs at a time
MOST_PROGRAMS = 1024  # that chunks are split over
MOST_OF_PARTS = 256 << 20  # bytes for chunks that a merge waits for


def at_once(tile_rows: int, in_turn: bool = False) -> int:
    """Loads of K or V on their way at one time, as many as registers hold: sums wait for memory, not for arithmetic.
    Where chunks are merged in the program, their sums take registers, too."""
    if INTERPRETED:
        return 1
    return 32 if tile_rows <= 8 else 4 if in_turn else 8


@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, block_table_ptr, rows_ptr, starts_ptr, positions_ptr, scores_ptr, m_ptr, l_ptr, o_ptr,
    out_ptr, stride_out, num_heads, num_kv_heads, num_pages, max_blocks, row_blocks, num_chunks, scale, cap, window,
    CAPPED: tl.constexpr, WINDOW: tl.constexpr, S: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, RATIO: tl.constexpr, R: tl.constexpr, K_PADDED: tl.constexpr,
    TILE: tl.constexpr, AT_ONCE: tl.constexpr, ONE_CHUNK: tl.constexpr, IN_TURN: tl.constexpr, FMA: tl.constexpr,
    TILED: tl.constexpr,
):  # fmt: skip
    """IN_TURN: a program has all chunks of its rows, and merges them itself."""
    sequence = (tl.program_id(0) // row_blocks).to(tl.int64)
    row_block = tl.program_id(0) % row_blocks
    kv_head = tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = k_ptr.dtype.element_ty

    # Rows of the tile: every query head of this KV head, for every row.
    r = tl.arange(0, R)[:, None]
    nth = tl.load(starts_ptr + sequence) + row_block * ROWS + r // RATIO
    in_rows = (r < ROWS * RATIO) & (nth < tl.load(starts_ptr + sequence + 1))
    row = tl.load(rows_ptr + nth, mask=in_rows, other=0).to(tl.int64)
    head = kv_head * RATIO + r % RATIO
    position = tl.load(positions_ptr + row, mask=in_rows, other=-1)
    program = (tl.program_id(0) * num_kv_heads + kv_head) * tl.num_programs(2) + tl.program_id(2)
    scores_ptrs = scores_ptr + program * (R * 256) + r * 256
    q_ptrs = q_ptr + (row * num_heads + head) * K
    table_ptr = block_table_ptr + sequence * max_blocks
    d = tl.arange(0, K_PADDED)[None, :]
    out_ptrs = out_ptr + row * stride_out + segment_offset(head * K + d, (num_heads * K + 7) // 8)

    last = tl.max(position)  # -1: there are no rows
    first_chunk = 0
    if WINDOW:
        seen = tl.where(in_rows, tl.maximum(position + 1 - window, 0), last)
        first_chunk = (tl.min(seen) // 256).to(tl.int32)
    if ONE_CHUNK:
        if last >= 0:
            m, l, o, sees = attend_to_chunk(  # noqa: E741
                0, q_ptrs, k_ptr, v_ptr, table_ptr, scores_ptrs, in_rows, position, kv_head, num_kv_heads, num_pages,
                scale, cap, window, CAPPED, WINDOW, S, K, R, K_PADDED, TILE, AT_ONCE, FMA, TILED,
            )  # fmt: skip
            out = rounded(tl.div_rn(o, tl.broadcast_to(l, [R, K_PADDED])), dtype)
            tl.store(out_ptrs, out, mask=in_rows & (d < K))
    elif IN_TURN:
        m = tl.full([R, 1], -float("inf"), tl.float32)
        l = tl.zeros([R, 1], tl.float32)  # noqa: E741
        o = tl.zeros([R, K_PADDED], tl.float32)
        begun = tl.zeros([R, 1], tl.int32)
        for chunk in range(first_chunk, ((last + 256) // 256).to(tl.int32)):
            m_new, l_new, o_new, sees = attend_to_chunk(
                chunk, q_ptrs, k_ptr, v_ptr, table_ptr, scores_ptrs, in_rows, position, kv_head, num_kv_heads,
                num_pages, scale, cap, window, CAPPED, WINDOW, S, K, R, K_PADDED, TILE, AT_ONCE, FMA, TILED,
            )  # fmt: skip
            m_max = tl.maximum(m, m_new)
            a = exp(m - m_max)
            b = exp(m_new - m_max)
            more = begun > 0  # a row's first chunk is taken as it is
            l = tl.where(sees, tl.where(more, l * a + l_new * b, l_new), l)  # noqa: E741
            o = tl.where(sees, tl.where(more, o * a + o_new * b, o_new), o)
            m = tl.where(sees, tl.where(more, m_max, m_new), m)
            begun = tl.maximum(begun, sees.to(tl.int32))
            tl.debug_barrier()  # the next chunk's scores take the place of these
        out = rounded(tl.div_rn(o, tl.broadcast_to(l, [R, K_PADDED])), dtype)
        tl.store(out_ptrs, out, mask=in_rows & (d < K))
    else:
        for chunk in range(first_chunk + tl.program_id(2), ((last + 256) // 256).to(tl.int32), tl.num_programs(2)):
            m, l, o, sees = attend_to_chunk(  # noqa: E741
                chunk, q_ptrs, k_ptr, v_ptr, table_ptr, scores_ptrs, in_rows, position, kv_head, num_kv_heads,
                num_pages, scale, cap, window, CAPPED, WINDOW, S, K, R, K_PADDED, TILE, AT_ONCE, FMA, TILED,
            )  # fmt: skip
            part = (row * num_heads + head) * num_chunks + chunk
            tl.store(m_ptr + part, m, mask=in_rows)
            tl.store(l_ptr + part, l, mask=in_rows)
            tl.store(o_ptr + part * K + d, o, mask=in_rows & (d < K))
            tl.debug_barrier()


@triton.jit
def _merge_kernel(
    rows_ptr, positions_ptr, m_ptr, l_ptr, o_ptr, out_ptr, model_ptr, stride_out, num_heads, K, num_chunks, window,
    WINDOW: tl.constexpr, K_PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64)
    if row < 0:
        return
    head = tl.program_id(1)
    d = tl.arange(0, K_PADDED)
    position = tl.load(positions_ptr + row)
    first_chunk = 0
    if WINDOW:
        first_chunk = (tl.maximum(position + 1 - window, 0) // 256).to(tl.int32)
    part = (row * num_heads + head) * num_chunks + first_chunk
    m = tl.load(m_ptr + part)
    l = tl.load(l_ptr + part)  # noqa: E741
    o = tl.load(o_ptr + part * K + d, mask=d < K, other=0.0)
    for chunk in range(1, (position // 256 + 1).to(tl.int32) - first_chunk):
        m_new = tl.load(m_ptr + part + chunk)
        m_max = tl.maximum(m, m_new)
        a = exp(m - m_max)
        b = exp(m_new - m_max)
        m = m_max
        l = l * a + tl.load(l_ptr + part + chunk) * b  # noqa: E741
        o = o * a + tl.load(o_ptr + (part + chunk) * K + d, mask=d < K, other=0.0) * b
    dtype: tl.constexpr = model_ptr.dtype.element_ty
    out = rounded(tl.div_rn(o, l + tl.zeros([K_PADDED], tl.float32)), dtype)
    offs = segment_offset(head * K + d, (num_heads * K + 7) // 8)
    tl.store(out_ptr + row * stride_out + offs, out, mask=d < K)


class ScratchMemory:
    """Memory on a device that steps use one after the other: as much as the largest of them needs."""

    def __init__(self) -> None:
        self._numbers: Tensor | None = None

    def take(self, count: int, device: torch.device) -> Tensor:
        """fp32 [count]: the memory of earlier calls while it suffices. Graphs keep what they were captured with."""
        if self._numbers is None or len(self._numbers) < count:
            held = 0 if self._numbers is None else len(self._numbers)
            self._numbers = torch.empty(max(count, 2 * held), device=device)
        return self._numbers[:count]


class AttentionScratch:
    """What programs keep between their passes, and chunks for the merge: reused by all layers of a step.

    For T rows of B sequences, at most ``max_rows`` of one, and block tables that reach ``max_positions``. A program has
    every ``programs``-th chunk of its rows. ``tiled``: of rows that are many, as tiles. ``in_turn``: it has all, and
    merges them itself: where there are enough programs without, or chunks would take too much memory.
    """

    def __init__(
        self, num_rows: int, num_sequences: int, max_rows: int, num_heads: int, num_kv_heads: int, head_dim: int,
        max_positions: int, dtype: torch.dtype, device: torch.device, memory: ScratchMemory,
    ) -> None:  # fmt: skip
        ratio = triton.next_power_of_2(num_heads // num_kv_heads)
        self.tiled = max_rows >= PROMPT_ROWS and exact_products(dtype) and head_dim >= LEAST_DOT
        self.tiled = self.tiled and ratio <= TILE_ROWS and wide_dots_are_chains()
        self.rows = min(TILE_ROWS // ratio if self.tiled else MAX_ROWS, 1 << (max_rows - 1).bit_length())
        self.row_blocks = blocks(max_rows, self.rows)
        self.num_chunks = max(1, blocks(max_positions, CHUNK))
        tile_rows = 1 << (self.rows * (num_heads // num_kv_heads) - 1).bit_length()
        of_chunk = num_sequences * self.row_blocks * num_kv_heads
        parts = num_rows, num_heads, self.num_chunks
        too_large = math.prod(parts) * (head_dim + 2) * 4 > MOST_OF_PARTS
        self.in_turn = self.num_chunks > 1 and (of_chunk >= ENOUGH_PROGRAMS or too_large)
        self.programs = 1 if self.in_turn else min(self.num_chunks, max(1, MOST_PROGRAMS // of_chunk))
        if self.in_turn or self.num_chunks == 1:
            parts = 1, 1, 1
        shapes = (of_chunk * self.programs, tile_rows, CHUNK), parts, parts, (*parts, head_dim)
        sizes = [-(-math.prod(shape) // 4) * 4 for shape in shapes]  # each begins at a multiple of 16 bytes
        pieces = memory.take(sum(sizes), device).split(sizes)
        self.scores, self.m, self.l, self.o = (
            piece[: math.prod(shape)].view(shape) for piece, shape in zip(pieces, shapes, strict=True)
        )


def attend(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, rows: Tensor, starts: Tensor, positions: Tensor,
    scale: float, scratch: AttentionScratch, out: Tensor, window: int = 0, cap: float = 0.0,
) -> None:  # fmt: skip
    """out fp32 [T, row_stride(H*K)] of some rows of q [T, H, K].

    rows int32 [N]: them, by sequence, and -1 behind; starts int32 [B+1]: sequence b has rows[starts[b]:starts[b+1]], at
    most as many as the scratch was made for; positions int64 [T] of all rows of q.
    """
    num_heads, head_dim = q.shape[1:]
    num_pages, num_kv_heads, _, page_size = k_pages.shape
    ratio, padded = num_heads // num_kv_heads, triton.next_power_of_2(head_dim)
    one_chunk = scratch.num_chunks == 1
    _attend_kernel[((len(starts) - 1) * scratch.row_blocks, num_kv_heads, scratch.programs)](
        q_ptr=q,
        k_ptr=k_pages,
        v_ptr=v_pages,
        block_table_ptr=block_table,
        rows_ptr=rows,
        starts_ptr=starts,
        positions_ptr=positions,
        scores_ptr=scratch.scores,
        m_ptr=scratch.m,
        l_ptr=scratch.l,
        o_ptr=scratch.o,
        out_ptr=out,
        stride_out=out.stride(0),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_pages=num_pages,
        max_blocks=block_table.size(1),
        row_blocks=scratch.row_blocks,
        num_chunks=scratch.num_chunks,
        scale=scale,
        cap=cap,
        window=window,
        CAPPED=cap != 0,
        WINDOW=window != 0,
        S=page_size,
        K=head_dim,
        ROWS=scratch.rows,
        RATIO=ratio,
        R=scratch.scores.size(1),
        K_PADDED=padded,
        TILE=TILE,
        AT_ONCE=at_once(scratch.scores.size(1), scratch.in_turn),
        ONE_CHUNK=one_chunk,
        IN_TURN=scratch.in_turn,
        FMA=exact_products(q.dtype),
        TILED=scratch.tiled,
        num_warps=WARPS,
        **(dict(OPTIONS, num_stages=1) if scratch.tiled else OPTIONS),
    )
    if not one_chunk and not scratch.in_turn:
        _merge_kernel[(len(rows), num_heads)](
            rows_ptr=rows,
            positions_ptr=positions,
            m_ptr=scratch.m,
            l_ptr=scratch.l,
            o_ptr=scratch.o,
            out_ptr=out,
            model_ptr=q,
            stride_out=out.stride(0),
            num_heads=num_heads,
            K=head_dim,
            num_chunks=scratch.num_chunks,
            window=window,
            WINDOW=window != 0,
            K_PADDED=padded,
            num_warps=1,
            **OPTIONS,
        )


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, query_start_loc: Tensor, positions: Tensor,
    scale: float, window: int = 0, cap: float = 0.0,
) -> Tensor:  # fmt: skip
    """reference.paged_attention: q [T, H, K] -> [T, H*K]. Waits for query_start_loc, to know the most rows."""
    num_rows, num_heads, head_dim = q.shape
    scratch = AttentionScratch(
        num_rows, len(query_start_loc) - 1, int(query_start_loc.diff().max()), num_heads, k_pages.size(1), head_dim,
        block_table.size(1) * k_pages.size(3), q.dtype, q.device, ScratchMemory(),
    )  # fmt: skip
    out = torch.zeros(num_rows, row_stride(num_heads * head_dim), device=q.device)
    rows = torch.arange(num_rows, dtype=torch.int32, device=q.device)
    attend(q, k_pages, v_pages, block_table, rows, query_start_loc.int(), positions, scale, scratch, out, window, cap)
    return from_segments(out, num_heads * head_dim, q.dtype)
