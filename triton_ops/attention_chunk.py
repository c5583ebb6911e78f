"""Attention to one chunk of 256 positions, of rows that a program holds: rule 4 without the merge.

s_j = scale * fold_d(q[d] k_j[d]), perhaps capped
m = max s;  p_j = to_dtype(exp(s_j - m));  l = fold_j(p_j);  o = fold_j(p_j v_j)

TILED, for the many rows of a prompt: sixteen of a fold's products at a time are a dot's chain (prompt_dot.py), whose
operands the threads of a program share; but for positions that not all rows see.
"""

import triton.language as tl

from .contract import device_function, exp, multiply_add, rounded, soft_cap
from .prompt_dot import add_products

__all__ = ["attend_to_chunk"]


@device_function
def _add_dimensions(
    s, q_ptrs, k_ptrs, in_rows, paged,
    S: tl.constexpr, K: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, AT_ONCE: tl.constexpr, FMA: tl.constexpr,
):  # fmt: skip
    """s [R, TILE] after all products of q and k, AT_ONCE of which are loaded together."""
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
    return s


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


@device_function
def _add_tiles_of_positions(
    l, o, seen_by_all, chunk, n, table_ptr, v_ptrs, page_size, scores_ptrs, num_pages, d,  # noqa: E741
    S: tl.constexpr, K: tl.constexpr, R: tl.constexpr, K_PADDED: tl.constexpr,
):  # fmt: skip
    """l and o after the first positions of a chunk, sixteen at a time, all of which all rows see."""
    for first in range(0, seen_by_all, 16):
        j = first + tl.arange(0, 16)
        at = chunk * 256 + j
        page = tl.load(table_ptr + at // S, mask=j < n, other=-1).to(tl.int64)[:, None]
        offs = page * page_size + (at % S * K)[:, None]
        v = tl.load(v_ptrs + offs, mask=(page >= 0) & (page < num_pages) & (d < K), other=0.0).to(tl.float32)
        p = tl.load(scores_ptrs + j[None, :])
        for i in tl.static_range(16):
            l = l + tl.load(scores_ptrs + first + i)  # noqa: E741
        o = add_products(o, p, v, R, K_PADDED)
    return l, o


@device_function
def attend_to_chunk(
    chunk, q_ptrs, k_ptr, v_ptr, table_ptr, scores_ptrs, in_rows, position, kv_head, num_kv_heads, num_pages, scale,
    cap, window,
    CAPPED: tl.constexpr, WINDOW: tl.constexpr, S: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    K_PADDED: tl.constexpr, TILE: tl.constexpr, AT_ONCE: tl.constexpr, FMA: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """m, l [R, 1] and o [R, K_PADDED] of one chunk, and which rows [R, 1] see any of it."""
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    visible = tl.minimum(tl.maximum(position + 1 - chunk * 256, 0), 256).to(tl.int32)
    unseen = tl.zeros_like(visible)  # positions of the chunk before those that a row sees
    if WINDOW:
        unseen = tl.maximum(position + 1 - window - chunk * 256, 0).to(tl.int32)
    n = tl.max(tl.where(unseen < visible, visible, 0))
    seen_by_all = 0  # as many positions, from the first on, need no look at who sees them
    if not WINDOW:
        EACH_TIME: tl.constexpr = 16 if TILED else AT_ONCE
        seen_by_all = tl.min(tl.where(in_rows, visible, 256)) // EACH_TIME * EACH_TIME
        seen_by_all = tl.minimum(seen_by_all, n)
    m = tl.full([R, 1], -float("inf"), tl.float32)
    for start in range(0, n, TILE):
        j = start + tl.arange(0, TILE)[None, :]
        at = chunk * 256 + j
        page = tl.load(table_ptr + at // S, mask=j < n, other=-1).to(tl.int64)
        paged = (page >= 0) & (page < num_pages)
        k_ptrs = k_ptr + (page * num_kv_heads + kv_head) * K * S + at % S
        s = tl.zeros([R, TILE], tl.float32)
        if TILED:
            for first in range(0, K, 16):
                d = first + tl.arange(0, 16)
                q = tl.load(q_ptrs + d[None, :], mask=in_rows & (d < K)[None, :], other=0.0)
                k = tl.load(k_ptrs + (d * S)[:, None], mask=paged & (d < K)[:, None], other=0.0)
                s = add_products(s, q.to(tl.float32), k.to(tl.float32), R, TILE)
        else:
            s = _add_dimensions(s, q_ptrs, k_ptrs, in_rows, paged, S, K, R, TILE, AT_ONCE, FMA)
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
    v_ptrs = v_ptr + kv_head * (S * K) + d
    page_size = num_kv_heads * (S * K)
    if TILED:
        l, o = _add_tiles_of_positions(  # noqa: E741
            l, o, seen_by_all, chunk, n, table_ptr, v_ptrs, page_size, scores_ptrs, num_pages, d, S, K, R, K_PADDED
        )
    else:
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
    return m, l, o, unseen < visible
