"""RMSNorm, the three projections, RoPE on q and k, and k and v into their pages: rules 1 to 3.

    y = to_dtype(dot(x, w) + bias);  q, k: to_dtype(a cos - b sin), to_dtype(b cos + a sin);  v: y

A program computes C pairs (d, d + K / 2) of heads' columns, a tile for each half, so that RoPE has both. Moves
(H + 2G) K D weights once for every 8 rows, T D numbers of x for each program, and T (H + 2G) K results.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import device_function, dot, packed_offsets, rounded, row_pointers, to_dtype
from .launch import blocks, streaming

__all__ = ["norm_qkv_rope_append", "qkv_rope_append"]


@device_function
def _store_pair(target, step, a, b, mask):
    """a at target, b a step further."""
    dtype: tl.constexpr = target.dtype.scalar.element_ty
    tl.store(target, to_dtype(a, dtype), mask=mask)
    tl.store(target + step, to_dtype(b, dtype), mask=mask)


@triton.jit
def _qkv_rope_append_kernel(
    x_ptr, wq_ptr, wk_ptr, wv_ptr, bias_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, q_ptr, k_ptr, v_ptr,
    stride_x, T, steps, num_heads, num_kv_heads, HALF_HEAD, num_pages, S,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
    FMA: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row0 = tl.program_id(1).to(tl.int64) * ROWS
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    K = 2 * HALF_HEAD
    q_blocks = tl.cdiv(num_heads * HALF_HEAD, C)
    kv_blocks = tl.cdiv(num_kv_heads * HALF_HEAD, C)
    is_q = pid < q_blocks
    is_v = pid >= q_blocks + kv_blocks
    first_block = tl.where(is_q, 0, tl.where(is_v, q_blocks + kv_blocks, q_blocks))
    heads = tl.where(is_q, num_heads, num_kv_heads)
    w_ptr = tl.where(is_q, wq_ptr, tl.where(is_v, wv_ptr, wk_ptr))

    pair = (pid - first_block) * C + tl.arange(0, C)
    inside = pair < heads * HALF_HEAD
    head = pair // HALF_HEAD
    d = pair % HALF_HEAD
    n = tl.where(inside, head * K + d, 0)
    x_ptrs = row_pointers(x_ptr, stride_x, row0, T, ROWS)
    w_ptrs = (w_ptr + packed_offsets(n, steps), w_ptr + packed_offsets(n + HALF_HEAD, steps))
    y = dot(x_ptrs, w_ptrs, steps, ROWS, TILES, C, AHEAD, EVEN, FMA)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + tl.where(is_q, 0, tl.where(is_v, num_heads + num_kv_heads, num_heads)) * K + n
        bias_a = tl.load(bias_ptrs).to(tl.float32)
        bias_b = tl.load(bias_ptrs + HALF_HEAD).to(tl.float32)
    for r in tl.static_range(ROWS):
        row = row0 + r
        mask = inside & (row < T)
        a = y[r]
        b = y[ROWS + r]
        if HAS_BIAS:
            a = a + bias_a
            b = b + bias_b
        a = rounded(a, dtype)
        b = rounded(b, dtype)
        if not is_v:
            position = tl.load(positions_ptr + row, mask=row < T, other=0)
            cos = tl.load(cos_ptr + position * HALF_HEAD + d, mask=inside, other=0.0)
            sin = tl.load(sin_ptr + position * HALF_HEAD + d, mask=inside, other=0.0)
            a, b = a * cos - b * sin, b * cos + a * sin
        # Each stores for itself: Triton's passes for AMD fail on pointers that leave a branch.
        if is_q:
            _store_pair(q_ptr + (row * num_heads + head) * K + d, HALF_HEAD, a, b, mask)
        else:
            slot = tl.load(slots_ptr + row, mask=row < T, other=-1).to(tl.int32)
            mask = mask & (slot >= 0) & (slot < num_pages * S)
            page_head = (slot // S).to(tl.int64) * num_kv_heads + head
            if is_v:
                _store_pair(v_ptr + (page_head * S + slot % S) * K + d, HALF_HEAD, a, b, mask)
            else:
                _store_pair(k_ptr + (page_head * K + d) * S + slot % S, HALF_HEAD * S, a, b, mask)


def qkv_rope_append(
    x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, qkv_bias: Tensor | None, cos: Tensor, sin: Tensor,
    positions: Tensor, slots: Tensor, q: Tensor, k_pages: Tensor, v_pages: Tensor, num_rows: int,
) -> None:  # fmt: skip
    """The same of rows that are normalised already: x fp32 [T, row_stride(D)] -> q [T, H, K], and pages."""
    num_pages, num_kv_heads, head_dim, page_size = k_pages.shape
    num_heads = q.size(1)
    options = streaming("norm_qkv_rope_append", num_rows, 2, wq)
    grid = (
        blocks(num_heads * head_dim // 2, options["C"]) + 2 * blocks(num_kv_heads * head_dim // 2, options["C"]),
        blocks(num_rows, options["ROWS"]),
    )
    _qkv_rope_append_kernel[grid](
        x, wq, wk, wv, q if qkv_bias is None else qkv_bias, cos, sin, positions, slots, q, k_pages, v_pages,
        x.stride(0), num_rows, wq.size(1), num_heads, num_kv_heads, head_dim // 2, num_pages, page_size,
        HAS_BIAS=qkv_bias is not None, **options,
    )  # fmt: skip


def norm_qkv_rope_append(
    hidden: Tensor, norm_weight: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, qkv_bias: Tensor | None, cos: Tensor,
    sin: Tensor, positions: Tensor, slot_mapping: Tensor, k_pages: Tensor, v_pages: Tensor, num_heads: int, eps: float,
) -> Tensor:  # fmt: skip
    """reference.norm_qkv_rope_append. In a step the norm is computed by the kernel before, which has the rows."""
    from .rms_norm import normalised

    q = torch.empty(hidden.size(0), num_heads, k_pages.size(2), dtype=hidden.dtype, device=hidden.device)
    x = normalised(hidden, norm_weight, eps)
    qkv_rope_append(
        x, wq, wk, wv, qkv_bias, cos, sin, positions, slot_mapping, q, k_pages, v_pages, hidden.size(0)
    )  # fmt: skip
    return q
