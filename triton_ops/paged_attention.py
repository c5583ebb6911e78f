"""Attention over pages, in chunks of 256 positions that run in parallel and are merged in order: rule 4.

    s_j = scale * fold_d(q[d] k_j[d]), perhaps capped
    m = max s;  p_j = to_dtype(exp(s_j - m));  l = fold_j(p_j);  o = fold_j(p_j v_j)
    merged: m' = max(m, m_new);  l exp(m - m') + l_new exp(m_new - m');  o likewise;  to_dtype(o / l)

A program has a chunk of one sequence's KV head and up to 8 of its rows, with all query heads of that KV head: each of
them reads what the first one loaded. With a window, a row sees no more than the last positions. Moves 2 K numbers for
each position, KV head and 8 rows of a sequence.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import CHUNK, INTERPRETED, device_function, exp, multiply_add, rounded, segment_offset, soft_cap
from .launch import OPTIONS, blocks, exact_products
from .packing import row_stride
from .rms_norm import from_segments

__all__ = ["AttentionScratch", "ScratchMemory", "attend", "paged_attention"]

MAX_ROWS = 8
TILE = 128  # positions whose scores are computed at once
WARPS = 8


def at_once(tile_rows: int) -> int:
    """Loads of K or V on their way at one time, as many as registers hold: sums wait for memory, not for arithmetic."""
    if INTERPRETED:
        return 1
    return 32 if tile_rows <= 8 else 8


@device_function
def _add_positions(
    l, o, first, chunk, unseen, visible, n, table_ptr, v_ptrs, page_size, scores_ptrs, num_pages, d,  # noqa: E741
    S: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr, AT_ONCE: tl.constexpr, SOME: tl.constexpr,
    FMA: tl.constexpr,
):  # fmt: skip
    """l and o after AT_ONCE more positions of a chunk, from ``first`` on; SOME: not every row sees each of them.

    Where pages and AT_ONCE divide one another, a page is looked up once and all offsets are constants.
    """
    start = chunk * 256 + first
    ALIGNED: tl.constexpr = AT_ONCE % S == 0 or S % AT_ONCE == 0
    LOOKED_UP: tl.constexpr = (AT_ONCE + S - 1) // S if ALIGNED else AT_ONCE
    bases = ()
    valid = ()
    for b in tl.static_range(LOOKED_UP):
        at = first + b * S if ALIGNED else first + b
        page = tl.load(table_ptr + (chunk * 256 + at) // S, mask=at < n, other=-1).to(tl.int64)
        bases = bases + (v_ptrs + page * page_size + (start % S * K if ALIGNED else (start + b) % S * K),)
        valid = valid + ((page >= 0) & (page < num_pages),)
    ps = ()
    vs = ()
    for i in tl.static_range(AT_ONCE):
        v_of_i = bases[i // S if ALIGNED else i] + (i % S * K if ALIGNED else 0)
        if K == K_PADDED:
            vs = vs + (tl.load(v_of_i, mask=valid[i // S if ALIGNED else i], other=0.0),)
        else:
            vs = vs + (tl.load(v_of_i, mask=valid[i // S if ALIGNED else i] & (d < K), other=0.0),)
        ps = ps + (tl.load(scores_ptrs + first + i),)  # 0 where a row does not see the position
    for i in tl.static_range(AT_ONCE):
        l = l + ps[i]  # noqa: E741
        added = multiply_add(tl.broadcast_to(ps[i], o.shape), tl.broadcast_to(vs[i].to(tl.float32), o.shape), o, FMA)
        if SOME:  # 0 times an infinite v that a row must not see is NaN
            o = tl.where((first + i >= unseen) & (first + i < visible), added, o)
        else:
            o = added
    return l, o


@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, block_table_ptr, rows_ptr, starts_ptr, positions_ptr, scores_ptr, m_ptr, l_ptr, o_ptr,
    out_ptr, stride_out, num_heads, num_kv_heads, num_pages, max_blocks, row_blocks, scale, cap, window,
    CAPPED: tl.constexpr, WINDOW: tl.constexpr, S: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, RATIO: tl.constexpr, R: tl.constexpr, K_PADDED: tl.constexpr,
    TILE: tl.constexpr, AT_ONCE: tl.constexpr, ONE_CHUNK: tl.constexpr, FMA: tl.constexpr,
):  # fmt: skip
    sequence = (tl.program_id(0) // row_blocks).to(tl.int64)
    row_block = tl.program_id(0) % row_blocks
    kv_head = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(2)
    dtype: tl.constexpr = k_ptr.dtype.element_ty

    # Rows of the tile: every query head of this KV head, for every row.
    r = tl.arange(0, R)[:, None]
    nth = tl.load(starts_ptr + sequence) + row_block * ROWS + r // RATIO
    in_rows = (r < ROWS * RATIO) & (nth < tl.load(starts_ptr + sequence + 1))
    row = tl.load(rows_ptr + nth, mask=in_rows, other=0).to(tl.int64)
    head = kv_head * RATIO + r % RATIO
    position = tl.load(positions_ptr + row, mask=in_rows, other=-1)
    visible = tl.minimum(tl.maximum(position + 1 - chunk * 256, 0), 256).to(tl.int32)
    unseen = tl.zeros_like(visible)  # positions of the chunk before those that a row sees
    if WINDOW:
        unseen = tl.maximum(position + 1 - window - chunk * 256, 0).to(tl.int32)
    n = tl.max(tl.where(unseen < visible, visible, 0))
    seen_by_all = 0  # as many positions, from the first on, need no look at who sees them
    if not WINDOW:
        seen_by_all = tl.min(tl.where(in_rows, visible, 256)) // AT_ONCE * AT_ONCE
    if n > 0:
        program = (tl.program_id(0) * num_kv_heads + kv_head) * tl.num_programs(2) + chunk
        scores_ptrs = scores_ptr + program * (R * 256) + r * 256
        q_ptrs = q_ptr + (row * num_heads + head) * K
        m = tl.full([R, 1], -float("inf"), tl.float32)
        for start in range(0, n, TILE):
            j = start + tl.arange(0, TILE)[None, :]
            at = chunk * 256 + j
            page = tl.load(block_table_ptr + sequence * max_blocks + at // S, mask=j < n, other=-1).to(tl.int64)
            paged = (page >= 0) & (page < num_pages)
            k_ptrs = k_ptr + (page * num_kv_heads + kv_head) * K * S + at % S
            s = tl.zeros([R, TILE], tl.float32)
            for first in range(0, K, AT_ONCE):
                qs = ()
                ks = ()
                for i in tl.static_range(AT_ONCE):
                    d = first + i
                    if K % AT_ONCE == 0:
                        qs = qs + (tl.load(q_ptrs + d, mask=in_rows, other=0.0),)
                        ks = ks + (tl.load(k_ptrs + d * S, mask=paged, other=0.0),)
                    else:
                        qs = qs + (tl.load(q_ptrs + d, mask=in_rows & (d < K), other=0.0),)
                        ks = ks + (tl.load(k_ptrs + d * S, mask=paged & (d < K), other=0.0),)
                for i in tl.static_range(AT_ONCE):
                    q = tl.broadcast_to(qs[i].to(tl.float32), [R, TILE])
                    s = multiply_add(q, tl.broadcast_to(ks[i].to(tl.float32), [R, TILE]), s, FMA)
            s = s * scale
            if CAPPED:
                s = soft_cap(s, cap)
            s = tl.where((j >= unseen) & (j < visible), s, -float("inf"))
            m = tl.maximum(m, tl.max(s, axis=1, keep_dims=True))
            tl.store(scores_ptrs + j, s)
        tl.debug_barrier()
        for start in range(0, n, TILE):
            j = start + tl.arange(0, TILE)[None, :]
            p = rounded(exp(tl.load(scores_ptrs + j) - m), dtype)
            tl.store(scores_ptrs + j, tl.where((j >= unseen) & (j < visible), p, 0.0))
        tl.debug_barrier()
        d = tl.arange(0, K_PADDED)[None, :]
        l = tl.zeros([R, 1], tl.float32)  # noqa: E741
        o = tl.zeros([R, K_PADDED], tl.float32)
        table_ptr = block_table_ptr + sequence * max_blocks
        v_ptrs = v_ptr + kv_head * (S * K) + d
        page_size = num_kv_heads * (S * K)
        for first in range(0, seen_by_all, AT_ONCE):
            l, o = _add_positions(  # noqa: E741
                l, o, first, chunk, unseen, visible, n, table_ptr, v_ptrs, page_size, scores_ptrs, num_pages, d, S, K,
                K_PADDED, AT_ONCE, False, FMA,
            )  # fmt: skip
        for first in range(seen_by_all, n, AT_ONCE):
            l, o = _add_positions(  # noqa: E741
                l, o, first, chunk, unseen, visible, n, table_ptr, v_ptrs, page_size, scores_ptrs, num_pages, d, S, K,
                K_PADDED, AT_ONCE, True, FMA,
            )  # fmt: skip
        if ONE_CHUNK:
            out = rounded(tl.div_rn(o, tl.broadcast_to(l, [R, K_PADDED])), dtype)
            offs = segment_offset(head * K + d, (num_heads * K + 7) // 8)
            tl.store(out_ptr + row * stride_out + offs, out, mask=in_rows & (d < K))
        else:
            part = (row * num_heads + head) * tl.num_programs(2) + chunk
            tl.store(m_ptr + part, m, mask=in_rows)
            tl.store(l_ptr + part, l, mask=in_rows)
            tl.store(o_ptr + part * K + d, o, mask=in_rows & (d < K))


@triton.jit
def _merge_kernel(
    rows_ptr, positions_ptr, m_ptr, l_ptr, o_ptr, out_ptr, model_ptr, stride_out, num_heads, K, num_chunks, window,
    WINDOW: tl.constexpr, K_PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64)
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

    For T rows of B sequences, at most ``max_rows`` of one, and block tables that reach ``max_positions``.
    """

    def __init__(
        self, num_rows: int, num_sequences: int, max_rows: int, num_heads: int, num_kv_heads: int, head_dim: int,
        max_positions: int, device: torch.device, memory: ScratchMemory,
    ) -> None:  # fmt: skip
        self.rows = min(MAX_ROWS, 1 << (max_rows - 1).bit_length())
        self.row_blocks = blocks(max_rows, self.rows)
        self.num_chunks = max(1, blocks(max_positions, CHUNK))
        tile_rows = 1 << (self.rows * (num_heads // num_kv_heads) - 1).bit_length()
        programs = num_sequences * self.row_blocks * num_kv_heads * self.num_chunks
        parts = (num_rows, num_heads, self.num_chunks) if self.num_chunks > 1 else (1, 1, 1)
        shapes = (programs, tile_rows, CHUNK), parts, parts, (*parts, head_dim)
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

    rows int32 [N]: them, by sequence; starts int32 [B+1]: sequence b has rows[starts[b]:starts[b+1]], at most as many
    as the scratch was made for; positions int64 [T] of all rows of q.
    """
    num_heads, head_dim = q.shape[1:]
    num_pages, num_kv_heads, _, page_size = k_pages.shape
    ratio, padded = num_heads // num_kv_heads, triton.next_power_of_2(head_dim)
    one_chunk = scratch.num_chunks == 1
    _attend_kernel[((len(starts) - 1) * scratch.row_blocks, num_kv_heads, scratch.num_chunks)](
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
        AT_ONCE=at_once(scratch.scores.size(1)),
        ONE_CHUNK=one_chunk,
        FMA=exact_products(q.dtype),
        num_warps=WARPS,
        **OPTIONS,
    )
    if not one_chunk:
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
        block_table.size(1) * k_pages.size(3), q.device, ScratchMemory(),
    )  # fmt: skip
    out = torch.zeros(num_rows, row_stride(num_heads * head_dim), device=q.device)
    rows = torch.arange(num_rows, dtype=torch.int32, device=q.device)
    attend(q, k_pages, v_pages, block_table, rows, query_start_loc.int(), positions, scale, scratch, out, window, cap)
    return from_segments(out, num_heads * head_dim, q.dtype)
