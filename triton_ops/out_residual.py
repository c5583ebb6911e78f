"""Output projection, the residual sum, and the norm that the next op reads: rules 1 and 2.

    hidden = to_dtype(hidden + to_dtype(dot(attention, wo) + bias));  x = rms_norm(hidden)

A program computes C columns of up to 8 rows. The one that finishes last of a group of rows normalises them: which one
that is changes nothing. Moves D H K weights once for every 8 rows, T H K numbers for each program, 2 T D of hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import dot, norm_rows, packed_offsets, rounded, row_pointers, to_dtype
from .launch import blocks, streaming
from .packing import to_segments

__all__ = ["linear_residual", "out_residual"]


@triton.jit
def _linear_residual_kernel(
    x_ptr, w_ptr, bias_ptr, hidden_ptr, next_norm_ptr, next_x_ptr, arrivals_ptr, slots_ptr, hidden_cache_ptr,
    stride_x, stride_next_x, T, N, steps, num_slots, eps,
    HAS_BIAS: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
    FMA: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row0 = tl.program_id(1).to(tl.int64) * ROWS
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    n = pid * C + tl.arange(0, C)
    x_ptrs = row_pointers(x_ptr, stride_x, row0, T, ROWS)
    y = dot(x_ptrs, (w_ptr + packed_offsets(n, steps),), steps, ROWS, TILES, C, AHEAD, EVEN, FMA)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    for r in tl.static_range(ROWS):
        row = row0 + r
        mask = (n < N) & (row < T)
        z = y[r]
        if HAS_BIAS:
            z = z + bias
        residual = tl.load(hidden_ptr + row * N + n, mask=mask, other=0.0).to(tl.float32)
        h = to_dtype(residual + rounded(z, dtype), dtype)
        tl.store(hidden_ptr + row * N + n, h, mask=mask)
        if KEEP:
            slot = tl.load(slots_ptr + row, mask=row < T, other=-1)
            tl.store(hidden_cache_ptr + slot * N + n, h, mask=mask & (slot >= 0) & (slot < num_slots))
    if NORM:
        tl.debug_barrier()  # all of this program's columns are written before it is counted
        arrived = tl.atomic_add(arrivals_ptr + tl.program_id(1), 1, sem="acq_rel", scope="gpu")
        if arrived == tl.num_programs(0) - 1:
            tl.store(arrivals_ptr + tl.program_id(1), 0)
            rows = row0 + tl.arange(0, ROWS)
            norm_rows(hidden_ptr, rows, rows < T, N, next_norm_ptr, eps, next_x_ptr, stride_next_x, ROWS)


def linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, num_rows: int, arrivals: Tensor,
    next_norm: Tensor | None = None, next_x: Tensor | None = None, eps: float = 0.0,
    slots: Tensor | None = None, hidden_cache: Tensor | None = None,
) -> None:  # fmt: skip
    """hidden [T, D] += x fp32 [T, row_stride(K)] times weight; next_x fp32 [T, row_stride(D)], its norm, if wanted.

    arrivals int32 [ceil(T / rows a program)], all 0, and 0 again afterwards. slots int64 [T], hidden_cache [P, S, D]:
    where the rows are kept, if wanted.
    """
    options = streaming("out_residual", num_rows, 1, weight)
    hidden_size = hidden.size(1)
    unused = hidden
    _linear_residual_kernel[(blocks(hidden_size, options["C"]), blocks(num_rows, options["ROWS"]))](
        x, weight, unused if bias is None else bias, hidden, unused if next_norm is None else next_norm,
        x if next_x is None else next_x, arrivals, arrivals if slots is None else slots,
        unused if hidden_cache is None else hidden_cache, x.stride(0), 0 if next_x is None else next_x.stride(0),
        num_rows, hidden_size, weight.size(1), 0 if hidden_cache is None else hidden_cache[:, :, 0].numel(), eps,
        HAS_BIAS=bias is not None, NORM=next_x is not None, KEEP=hidden_cache is not None, **options,
    )  # fmt: skip


def out_residual(attention: Tensor, wo: Tensor, out_bias: Tensor | None, residual: Tensor) -> Tensor:
    """reference.out_residual: [T, H*K], packed [D, H*K], [D] or None, [T, D] -> [T, D]."""
    hidden = residual.clone()
    arrivals = torch.zeros(len(hidden), dtype=torch.int32, device=hidden.device)
    linear_residual(to_segments(attention), wo, out_bias, hidden, len(hidden), arrivals)
    return hidden
