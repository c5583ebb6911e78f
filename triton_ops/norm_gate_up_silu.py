"""RMSNorm, gate and up projections, silu(gate) * up: rules 1, 2 and 5.

    to_dtype(to_dtype(silu(to_dtype(dot(x, w_gate)))) * to_dtype(dot(x, w_up)))

A program computes C columns of both, a tile each. Moves 2 F D weights once for every 8 rows, T D numbers for each
program, T F results.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import dot, packed_offsets, rounded, row_pointers, segment_offset, silu
from .launch import blocks, streaming
from .packing import row_stride
from .rms_norm import from_segments, normalised

__all__ = ["gate_up_silu", "norm_gate_up_silu"]


@triton.jit
def _gate_up_silu_kernel(
    x_ptr, gate_ptr, up_ptr, hidden_ptr, activation_ptr, stride_x, stride_activation, T, F, steps,
    ROWS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
    FMA: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row0 = tl.program_id(1).to(tl.int64) * ROWS
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    n = pid * C + tl.arange(0, C)
    offs = packed_offsets(tl.minimum(n, (F + 15) // 16 * 16 - 1), steps)
    x_ptrs = row_pointers(x_ptr, stride_x, row0, T, ROWS)
    y = dot(x_ptrs, (gate_ptr + offs, up_ptr + offs), steps, ROWS, TILES, C, AHEAD, EVEN, FMA)
    for r in tl.static_range(ROWS):
        gate = rounded(y[r], dtype)
        up = rounded(y[ROWS + r], dtype)
        activation = rounded(rounded(silu(gate), dtype) * up, dtype)
        target = activation_ptr + (row0 + r) * stride_activation + segment_offset(n, (F + 7) // 8)
        tl.store(target, activation, mask=(n < F) & (row0 + r < T))


def gate_up_silu(
    x: Tensor, w_gate: Tensor, w_up: Tensor, hidden: Tensor, activation: Tensor, intermediate_size: int, num_rows: int
) -> None:
    """x fp32 [T, row_stride(D)] -> activation fp32 [T, row_stride(F)]; hidden only says the model's dtype."""
    options = streaming("norm_gate_up_silu", num_rows, 2, w_gate)
    _gate_up_silu_kernel[(blocks(intermediate_size, options["C"]), blocks(num_rows, options["ROWS"]))](
        x, w_gate, w_up, hidden, activation, x.stride(0), activation.stride(0), num_rows, intermediate_size,
        w_gate.size(1), **options,
    )  # fmt: skip


def norm_gate_up_silu(
    hidden: Tensor, norm_weight: Tensor, w_gate: Tensor, w_up: Tensor, intermediate_size: int, eps: float
) -> Tensor:
    """reference.norm_gate_up_silu: [T, D] -> [T, F]."""
    activation = torch.zeros(len(hidden), row_stride(intermediate_size), device=hidden.device)
    gate_up_silu(normalised(hidden, norm_weight, eps), w_gate, w_up, hidden, activation, intermediate_size, len(hidden))
    return from_segments(activation, intermediate_size, hidden.dtype)
