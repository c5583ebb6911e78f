"""RMSNorm, the three projections, RoPE on q and k, and k and v into their pages: rules 1 to 3.

    y = to_dtype(dot(x, w) + bias);  q, k: to_dtype(a cos - b sin), to_dtype(b cos + a sin);  v: y

A program computes C pairs of heads' columns, a tile for each half, so that RoPE has both: (d, d + R / 2), or, of the
columns behind the R that are rotated, any two. Moves (H + 2G) K D weights once for each group of rows, T D numbers of
x for each program, and T (H + 2G) K results. Where q and k are normed, a second kernel does that and the rest, as norms
need whole heads: T (H + G) K numbers more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import device_function, inverse_norm_of, rounded, to_dtype
from .integer_dot import products
from .integer_rows import Rows
from .launch import OPTIONS, blocks, streaming
from .prompt_dot import row_of
from .prompt_rows import rows_for
from .quantised import code_of
from .rms_norm import normalised

__all__ = ["norm_qkv_rope_append", "qkv_rope_append"]


@device_function
def _store_pair(target, step, a, b, mask):
    """a at target, b a step further."""
    dtype: tl.constexpr = target.dtype.scalar.element_ty
    tl.store(target, to_dtype(a, dtype), mask=mask)
    tl.store(target + step, to_dtype(b, dtype), mask=mask)


@device_function
def _columns(pair, HALF_HEAD, half_rotary, PARTIAL: tl.constexpr):
    """The two columns of a head that a pair stands for: the second is the first and a step."""
    if PARTIAL:
        turned = pair < half_rotary
        return tl.where(turned, pair, half_rotary + pair), tl.where(turned, half_rotary, HALF_HEAD - half_rotary)
    else:
        return pair, HALF_HEAD


@device_function
def _turned(a, b, cos_ptr, sin_ptr, position, pair, inside, half_rotary, PARTIAL: tl.constexpr):
    """Rule 3 on pairs (a, b), those that are rotated."""
    mask = inside & (pair < half_rotary)
    cos = tl.load(cos_ptr + position * half_rotary + pair, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + position * half_rotary + pair, mask=mask, other=0.0)
    if PARTIAL:
        return tl.where(mask, a * cos - b * sin, a), tl.where(mask, b * cos + a * sin, b)
    else:
        return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _qkv_rope_append_kernel(
    xq_ptr, xk_ptr, xv_ptr, wq_ptr, wk_ptr, wv_ptr, bias_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr,
    q_ptr, k_ptr, v_ptr, raw_k_ptr,
    stride_x, T, steps, num_heads, num_kv_heads, HALF_HEAD, half_rotary, num_pages, S,
    Q_KIND: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROPE: tl.constexpr, PARTIAL: tl.constexpr, NORMED: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
    FMA: tl.constexpr, PROMPT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1)
    row0 = tl.program_id(0).to(tl.int64) * ROWS  # programs that read the same weights run one after the other
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    K = 2 * HALF_HEAD
    q_blocks = tl.cdiv(num_heads * HALF_HEAD, C)
    kv_blocks = tl.cdiv(num_kv_heads * HALF_HEAD, C)
    is_q = pid < q_blocks
    is_v = pid >= q_blocks + kv_blocks
    first_block = tl.where(is_q, 0, tl.where(is_v, q_blocks + kv_blocks, q_blocks))
    heads = tl.where(is_q, num_heads, num_kv_heads)

    pair = (pid - first_block) * C + tl.arange(0, C)
    inside = pair < heads * HALF_HEAD
    head = pair // HALF_HEAD
    pair = pair % HALF_HEAD
    d, step = _columns(pair, HALF_HEAD, half_rotary, PARTIAL)
    n = tl.where(inside, head * K + d, 0)
    n_other = n + step
    columns = n, n_other
    if Q_KIND == K_KIND and Q_KIND == V_KIND:
        w_ptr = tl.where(is_q, wq_ptr, tl.where(is_v, wv_ptr, wk_ptr))
        y = products(
            xq_ptr, stride_x, xq_ptr, row0, T, (w_ptr, w_ptr), columns, steps, Q_KIND, False,
            ROWS, TILES, C, AHEAD, EVEN, FMA, PROMPT, DEPENDENT,
        )  # fmt: skip
    elif is_q:
        y = products(
            xq_ptr, stride_x, xq_ptr, row0, T, (wq_ptr, wq_ptr), columns, steps, Q_KIND, False,
            ROWS, TILES, C, AHEAD, EVEN, FMA, PROMPT, DEPENDENT,
        )  # fmt: skip
    elif is_v:
        y = products(
            xv_ptr, stride_x, xv_ptr, row0, T, (wv_ptr, wv_ptr), columns, steps, V_KIND, False,
            ROWS, TILES, C, AHEAD, EVEN, FMA, PROMPT, DEPENDENT,
        )  # fmt: skip
    else:
        y = products(
            xk_ptr, stride_x, xk_ptr, row0, T, (wk_ptr, wk_ptr), columns, steps, K_KIND, False,
            ROWS, TILES, C, AHEAD, EVEN, FMA, PROMPT, DEPENDENT,
        )  # fmt: skip
    if HAS_BIAS:
        bias_ptrs = bias_ptr + tl.where(is_q, 0, tl.where(is_v, num_heads + num_kv_heads, num_heads)) * K
        bias_a = tl.load(bias_ptrs + n).to(tl.float32)
        bias_b = tl.load(bias_ptrs + n_other).to(tl.float32)
    TIMES: tl.constexpr = 1 if PROMPT else ROWS
    for r in tl.static_range(TIMES):
        row = row_of(row0, r, ROWS, PROMPT)
        mask = inside & (row < T)
        a = y[r]
        b = y[TIMES + r]
        if HAS_BIAS:
            a = a + bias_a
            b = b + bias_b
        a = rounded(a, dtype)
        b = rounded(b, dtype)
        if ROPE and not NORMED:
            if not is_v:
                position = tl.load(positions_ptr + row, mask=row < T, other=0)
                a, b = _turned(a, b, cos_ptr, sin_ptr, position, pair, inside, half_rotary, PARTIAL)
        # Each stores for itself: Triton's passes for AMD fail on pointers that leave a branch.
        if is_q:
            _store_pair(q_ptr + (row * num_heads + head) * K + d, step, a, b, mask)
        elif NORMED and not is_v:
            _store_pair(raw_k_ptr + (row * num_kv_heads + head) * K + d, step, a, b, mask)
        else:
            slot = tl.load(slots_ptr + row, mask=row < T, other=-1).to(tl.int32)
            mask = mask & (slot >= 0) & (slot < num_pages * S)
            page_head = (slot // S).to(tl.int64) * num_kv_heads + head
            if is_v:
                _store_pair(v_ptr + (page_head * S + slot % S) * K + d, step, a, b, mask)
            else:
                _store_pair(k_ptr + (page_head * K + d) * S + slot % S, step * S, a, b, mask)


@triton.jit
def _norm_rope_append_kernel(
    q_ptr, raw_k_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, k_ptr,
    num_heads, num_kv_heads, HALF_HEAD, half_rotary, num_pages, S, heads_of_q, heads_of_k, eps, norm_offset,
    ROPE: tl.constexpr, PARTIAL: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A program norms, of one row, the heads of q or k that are normed as one, and does what follows for them."""
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    K = 2 * HALF_HEAD
    q_units = num_heads // heads_of_q
    is_q = unit < q_units
    heads = tl.where(is_q, heads_of_q, heads_of_k)
    first_head = tl.where(is_q, unit * heads_of_q, (unit - q_units) * heads_of_k)
    source = tl.where(is_q, q_ptr, raw_k_ptr)
    weight = tl.where(is_q, q_norm_ptr, k_norm_ptr)
    base = (row * tl.where(is_q, num_heads, num_kv_heads) + first_head) * K
    rows = base + tl.zeros([1], tl.int64)
    inv = tl.max(inverse_norm_of(source, rows[:, None], rows >= 0, heads * K, eps, 1))
    tl.debug_barrier()  # all of it is read before any of it is written
    pair = tl.arange(0, PAIRS)
    inside = pair < HALF_HEAD
    d, step = _columns(pair, HALF_HEAD, half_rotary, PARTIAL)
    position = tl.load(positions_ptr + row)
    slot = tl.load(slots_ptr + row).to(tl.int32)
    kept = inside & (slot >= 0) & (slot < num_pages * S)
    for h in range(0, heads):
        at = h * K
        a = tl.load(source + base + at + d, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        b = tl.load(source + base + at + d + step, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        w_a = tl.load(weight + at + d, mask=inside, other=0.0).to(tl.float32) + norm_offset
        w_b = tl.load(weight + at + d + step, mask=inside, other=0.0).to(tl.float32) + norm_offset
        a = rounded(rounded(a * inv, dtype) * w_a, dtype)
        b = rounded(rounded(b * inv, dtype) * w_b, dtype)
        if ROPE:
            a, b = _turned(a, b, cos_ptr, sin_ptr, position, pair, inside, half_rotary, PARTIAL)
        if is_q:
            _store_pair(q_ptr + base + at + d, step, a, b, inside)
        else:
            page_head = (slot // S).to(tl.int64) * num_kv_heads + first_head + h
            _store_pair(k_ptr + (page_head * K + d) * S + slot % S, step * S, a, b, kept)


def qkv_rope_append(
    x: Rows, wq: Tensor, wk: Tensor, wv: Tensor, qkv_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    positions: Tensor, slots: Tensor, q: Tensor, k_pages: Tensor, v_pages: Tensor, num_rows: int, eps: float = 0.0,
    norm_offset: float = 0.0, q_norm: Tensor | None = None, k_norm: Tensor | None = None, raw_k: Tensor | None = None,
) -> None:  # fmt: skip
    """The same of rows that are normalised already: x [T, D] -> q [T, H, K], and pages.

    raw_k [T, G, K]: k before its norm, where it has one.
    """
    normed = q_norm is not None and k_norm is not None and raw_k is not None
    half_rotary = 0 if cos is None else cos.size(1)
    num_pages, num_kv_heads, head_dim, page_size = k_pages.shape
    num_heads = q.size(1)
    options = streaming("norm_qkv_rope_append", num_rows, 2, x.k, wq, wk, wv)
    x_for_q, x_for_k, x_for_v = rows_for(x, num_rows, options, wq, wk, wv)
    grid = (
        blocks(num_rows, options["ROWS"]),
        blocks(num_heads * head_dim // 2, options["C"]) + 2 * blocks(num_kv_heads * head_dim // 2, options["C"]),
    )
    _qkv_rope_append_kernel[grid](
        xq_ptr=x_for_q,
        xk_ptr=x_for_k,
        xv_ptr=x_for_v,
        wq_ptr=wq,
        wk_ptr=wk,
        wv_ptr=wv,
        bias_ptr=q if qkv_bias is None else qkv_bias,
        cos_ptr=x.numbers if cos is None else cos,
        sin_ptr=x.numbers if sin is None else sin,
        positions_ptr=positions,
        slots_ptr=slots,
        q_ptr=q,
        k_ptr=k_pages,
        v_ptr=v_pages,
        raw_k_ptr=raw_k if normed else q,
        stride_x=x.stride,
        T=num_rows,
        steps=x.steps,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        HALF_HEAD=head_dim // 2,
        half_rotary=half_rotary,
        num_pages=num_pages,
        S=page_size,
        Q_KIND=code_of(wq),
        K_KIND=code_of(wk),
        V_KIND=code_of(wv),
        HAS_BIAS=qkv_bias is not None,
        ROPE=cos is not None,
        PARTIAL=cos is not None and half_rotary != head_dim // 2,
        NORMED=normed,
        **options,
    )
    if q_norm is None or k_norm is None:
        return
    heads_of_q, heads_of_k = q_norm.numel() // head_dim, k_norm.numel() // head_dim
    _norm_rope_append_kernel[(num_rows, num_heads // heads_of_q + num_kv_heads // heads_of_k)](
        q_ptr=q,
        raw_k_ptr=raw_k,
        q_norm_ptr=q_norm,
        k_norm_ptr=k_norm,
        cos_ptr=x.numbers if cos is None else cos,
        sin_ptr=x.numbers if sin is None else sin,
        positions_ptr=positions,
        slots_ptr=slots,
        k_ptr=k_pages,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        HALF_HEAD=head_dim // 2,
        half_rotary=half_rotary,
        num_pages=num_pages,
        S=page_size,
        heads_of_q=heads_of_q,
        heads_of_k=heads_of_k,
        eps=eps,
        norm_offset=norm_offset,
        ROPE=cos is not None,
        PARTIAL=cos is not None and half_rotary != head_dim // 2,
        PAIRS=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
        **OPTIONS,
    )


def norm_qkv_rope_append(
    hidden: Tensor, norm_weight: Tensor | None, wq: Tensor, wk: Tensor, wv: Tensor, qkv_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, positions: Tensor, slot_mapping: Tensor, k_pages: Tensor, v_pages: Tensor,
    num_heads: int, eps: float, norm_offset: float = 0.0, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """reference.norm_qkv_rope_append. In a step the norm is computed by the kernel before, which has the rows."""
    q = torch.empty(hidden.size(0), num_heads, k_pages.size(2), dtype=hidden.dtype, device=hidden.device)
    raw_k = torch.empty(hidden.size(0), *k_pages.shape[1:3], dtype=hidden.dtype, device=hidden.device)
    x = normalised(hidden, norm_weight, eps, norm_offset, wq, wk, wv)
    qkv_rope_append(
        x, wq, wk, wv, qkv_bias, cos, sin, positions, slot_mapping, q, k_pages, v_pages, hidden.size(0), eps,
        norm_offset, q_norm, k_norm, raw_k,
    )  # fmt: skip
    return q
