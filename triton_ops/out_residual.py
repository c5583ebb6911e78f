"""Output projection, the residual sum, and the norm that the next op reads: rules 1 and 2.

    hidden = to_dtype(hidden + to_dtype(dot(attention, wo) + bias));  x = rms_norm(hidden)

A program computes C columns of up to 8 rows, of a prompt up to 64. The one that finishes last of a group of rows
normalises them: which one that is changes nothing. Where what is added has a norm of its own, that program adds it,
too. Moves D H K weights once for each group of rows, T H K numbers for each program, 2 T D of hidden.

Split (tuned.Config): a program has two of the eight segments of four times the columns, and the last of a tile's four
adds their sums up, so that a quarter of the numbers of x comes to each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import (
    INTERPRETED,
    add_normed_rows,
    device_function,
    dot,
    norm_rows,
    packed_offsets,
    rounded,
    to_dtype,
)
from .integer_dot import products
from .integer_rows import Rows
from .launch import SPLIT, blocks, is_split, norm_layout, split_memory, streaming
from .prompt_dot import row_of
from .prompt_rows import rows_for
from .quantised import code_of

__all__ = ["linear_residual", "out_residual"]


COMPILED = tl.constexpr(not INTERPRETED)


@device_function
def _wait_for_stores():
    """On AMD's GPUs each wave waits until its stores are there: the one that counts its program waits for its own
    alone, and a barrier for none. On NVIDIA's, counting comes after what a barrier has put before it."""
    if COMPILED and tl.target_info.is_hip():
        tl.inline_asm_elementwise("s_waitcnt vmcnt(0)", "=v,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1)


@device_function
def _normalise(
    projected_ptr, hidden_ptr, row0, T, N, post_norm_ptr, next_norm_ptr, next_x_ptr, slots_ptr, hidden_cache_ptr,
    stride_next_x, num_slots, eps, norm_offset, multiplier, ROWS: tl.constexpr,
    NORM: tl.constexpr, HAS_NORM: tl.constexpr, POST: tl.constexpr, KEEP: tl.constexpr,
    THREADS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What follows for ROWS rows from row0 on when all their columns are there."""
    rows = row0 + tl.arange(0, ROWS)
    if POST:
        add_normed_rows(
            projected_ptr, hidden_ptr, rows, rows < T, N, post_norm_ptr, eps, norm_offset, multiplier,
            slots_ptr, hidden_cache_ptr, num_slots, ROWS, KEEP, THREADS,
        )  # fmt: skip
        tl.debug_barrier()  # the next norm's threads read what others of this program wrote
    if NORM:
        norm_rows(
            hidden_ptr, rows, rows < T, N, next_norm_ptr, eps, norm_offset, next_x_ptr, stride_next_x, ROWS, HAS_NORM,
            THREADS, WHOLE,
        )  # fmt: skip


@device_function
def _is_last(arrivals_ptr, programs):
    """Whether all the other of so many programs have counted themselves; what they had stored before, is there."""
    _wait_for_stores()
    tl.debug_barrier()  # all that this program stored is there before it is counted
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(arrivals_ptr, 0)
    return last


@device_function
def _pairs_of_segments(
    x_ptr, stride_x, row0, T, w_ptr, columns, steps, partials_ptr, part,
    ROWS: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr, FMA: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Segments 2 part and 2 part + 1 of C columns -> partials fp32 [ROWS, 4, C]: their sums, as [:, part]."""
    x_ptrs = ()
    for r in tl.static_range(ROWS):
        x_ptrs = x_ptrs + (x_ptr + tl.minimum(row0 + r, T - 1) * stride_x + part * 2 * (steps * 8),)
    w_ptrs = (w_ptr + part * 256 + packed_offsets(columns, steps, C, 2),)
    y = dot(x_ptrs, w_ptrs, steps, ROWS, 1, C, AHEAD, EVEN, FMA, DEPENDENT, 2)
    for r in tl.static_range(ROWS):
        tl.store(partials_ptr + (r * 4 + part) * C + tl.arange(0, C), y[r])


@device_function
def _rest_of_tree(partials_ptr, ROWS: tl.constexpr, C: tl.constexpr):
    """partials fp32 [ROWS, 4, C], which other programs wrote -> a tuple of fp32 [C]."""
    y = ()
    for r in tl.static_range(ROWS):
        ptrs = partials_ptr + r * 4 * C + tl.arange(0, C)
        a = tl.load(ptrs, cache_modifier=".cg")
        b = tl.load(ptrs + C, cache_modifier=".cg")
        c = tl.load(ptrs + 2 * C, cache_modifier=".cg")
        d = tl.load(ptrs + 3 * C, cache_modifier=".cg")
        y = y + ((a + b) + (c + d),)
    return y


@triton.jit
def _linear_residual_kernel(
    x_ptr, w_ptr, bias_ptr, hidden_ptr, next_norm_ptr, next_x_ptr, arrivals_ptr, slots_ptr, hidden_cache_ptr,
    post_norm_ptr, projected_ptr, partials_ptr, stride_x, stride_next_x, T, N, steps, num_slots, eps, norm_offset,
    multiplier,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr, HAS_NORM: tl.constexpr, POST: tl.constexpr, KEEP: tl.constexpr,
    THREADS: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
    FMA: tl.constexpr, PROMPT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1) // SPLIT
    tiles = tl.num_programs(1) // SPLIT
    row0 = tl.program_id(0).to(tl.int64) * ROWS  # programs that read the same weights run one after the other
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    n = pid * C + tl.arange(0, C)
    packed = tl.minimum(n, (N + 15) // 16 * 16 - 1)
    if SPLIT == 1:
        y = products(
            x_ptr, stride_x, x_ptr, row0, T, (w_ptr,), (packed,), steps, KIND, False,
            ROWS, TILES, C, AHEAD, EVEN, FMA, PROMPT, DEPENDENT,
        )  # fmt: skip
    else:
        tile = tl.program_id(0) * tiles + pid
        partials_ptr += tile.to(tl.int64) * (ROWS * SPLIT * C)
        _pairs_of_segments(
            x_ptr, stride_x, row0, T, w_ptr, packed, steps, partials_ptr, tl.program_id(1) % SPLIT,
            ROWS, C, AHEAD, EVEN, FMA, DEPENDENT,
        )  # fmt: skip
        if not _is_last(arrivals_ptr + tl.num_programs(0) + tile, SPLIT):
            return
        y = _rest_of_tree(partials_ptr, ROWS, C)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    for r in tl.static_range(1 if PROMPT else ROWS):
        row = row_of(row0, r, ROWS, PROMPT)
        mask = (n < N) & (row < T)
        z = y[r]
        if HAS_BIAS:
            z = z + bias
        if POST:
            tl.store(projected_ptr + row * N + n, to_dtype(z, dtype), mask=mask)
        else:
            residual = tl.load(hidden_ptr + row * N + n, mask=mask, other=0.0).to(tl.float32)
            h = to_dtype(residual + rounded(rounded(z, dtype) * multiplier, dtype), dtype)
            tl.store(hidden_ptr + row * N + n, h, mask=mask)
            if KEEP:
                slot = tl.load(slots_ptr + row, mask=row < T, other=-1)
                tl.store(hidden_cache_ptr + slot * N + n, h, mask=mask & (slot >= 0) & (slot < num_slots))
    if NORM or POST:
        if _is_last(arrivals_ptr + tl.program_id(0), tiles):
            if PROMPT:
                for first in range(0, ROWS, 8):
                    _normalise(
                        projected_ptr, hidden_ptr, row0 + first, T, N, post_norm_ptr, next_norm_ptr, next_x_ptr,
                        slots_ptr, hidden_cache_ptr, stride_next_x, num_slots, eps, norm_offset, multiplier, 8,
                        NORM, HAS_NORM, POST, KEEP, THREADS, WHOLE,
                    )  # fmt: skip
            else:
                _normalise(
                    projected_ptr, hidden_ptr, row0, T, N, post_norm_ptr, next_norm_ptr, next_x_ptr,
                    slots_ptr, hidden_cache_ptr, stride_next_x, num_slots, eps, norm_offset, multiplier, ROWS,
                    NORM, HAS_NORM, POST, KEEP, THREADS, WHOLE,
                )  # fmt: skip


def linear_residual(
    x: Rows, weight: Tensor, bias: Tensor | None, hidden: Tensor, num_rows: int, arrivals: Tensor,
    next_norm: Tensor | None = None, next_x: Rows | None = None, eps: float = 0.0,
    slots: Tensor | None = None, hidden_cache: Tensor | None = None, post_norm: Tensor | None = None,
    projected: Tensor | None = None, norm_offset: float = 0.0, multiplier: float = 1.0,
    partials: Tensor | None = None,
) -> None:  # fmt: skip
    """hidden [T, D] += x [T, K] times weight; next_x [T, D], its norm, if wanted.

    next_norm None: next_x is hidden as it is. What is added is normed by post_norm [D], if given, for which there is
    projected [T, D], and multiplied.

    arrivals int32, all 0, and 0 again afterwards, and partials fp32: launch.split_memory's, for as many rows or more;
    without partials, no segments are split. slots int64 [T], hidden_cache [P, S, D]: where the rows are kept, if
    wanted.
    """
    options = streaming("out_residual", num_rows, 1, x.k, weight)
    (x_for_w,) = rows_for(x, num_rows, options, weight)
    hidden_size = hidden.size(1)
    unused = hidden
    split = 1
    if partials is not None and is_split(num_rows, weight):
        split, options = SPLIT, options | {"C": SPLIT * options["C"]}
    _linear_residual_kernel[(blocks(num_rows, options["ROWS"]), split * blocks(hidden_size, options["C"]))](
        x_ptr=x_for_w,
        w_ptr=weight,
        bias_ptr=unused if bias is None else bias,
        hidden_ptr=hidden,
        next_norm_ptr=unused if next_norm is None else next_norm,
        next_x_ptr=x.numbers if next_x is None else next_x.numbers,
        arrivals_ptr=arrivals,
        slots_ptr=arrivals if slots is None else slots,
        hidden_cache_ptr=unused if hidden_cache is None else hidden_cache,
        post_norm_ptr=unused if post_norm is None else post_norm,
        projected_ptr=unused if projected is None else projected,
        partials_ptr=x.numbers if partials is None else partials,
        stride_x=x.stride,
        stride_next_x=0 if next_x is None else next_x.stride,
        T=num_rows,
        N=hidden_size,
        steps=x.steps,
        num_slots=0 if hidden_cache is None else hidden_cache[:, :, 0].numel(),
        eps=eps,
        norm_offset=norm_offset,
        multiplier=multiplier,
        KIND=code_of(weight),
        HAS_BIAS=bias is not None,
        NORM=next_x is not None,
        HAS_NORM=next_norm is not None,
        POST=post_norm is not None,
        KEEP=hidden_cache is not None,
        SPLIT=split,
        **norm_layout(hidden_size, options["num_warps"]),
        **options,
    )


def out_residual(
    attention: Tensor, wo: Tensor, out_bias: Tensor | None, residual: Tensor, post_norm: Tensor | None = None,
    eps: float = 0.0, norm_offset: float = 0.0, multiplier: float = 1.0,
) -> Tensor:  # fmt: skip
    """reference.out_residual: [T, H*K], packed [D, H*K], [D] or None, [T, D] -> [T, D]."""
    hidden = residual.clone()
    arrivals, partials = split_memory(len(hidden), hidden.size(1), hidden.device)
    linear_residual(
        Rows.of_numbers(attention, wo), wo, out_bias, hidden, len(hidden), arrivals, eps=eps, post_norm=post_norm,
        projected=torch.empty_like(hidden), norm_offset=norm_offset, multiplier=multiplier, partials=partials,
    )  # fmt: skip
    return hidden
