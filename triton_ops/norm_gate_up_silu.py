"""RMSNorm, gate and up projections, silu(gate) * up: rules 1, 2 and 5.

    to_dtype(to_dtype(silu(to_dtype(dot(x, w_gate)))) * to_dtype(dot(x, w_up)))

A program computes C / 2 columns of both. Moves 2 F D weights once for every 16 rows, T D numbers for each program, T F
results.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import dot, halves, packed_offsets, rounded, row_pointers, segment_offset, silu
from .launch import blocks, streaming
from .packing import row_stride
from .rms_norm import from_segments, normalised

__all__ = ["gate_up_silu", "norm_gate_up_silu"]

COLUMNS = 32


@triton.jit
def _gate_up_silu_kernel(
    x_ptr, gate_ptr, up_ptr, hidden_ptr, activation_ptr, stride_x, stride_activation, T, F, steps,
    ROWS: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr, FMA: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row0 = tl.program_id(1).to(tl.int64) * ROWS
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    EACH: tl.constexpr = C // 2
    column = tl.arange(0, C)
    n = pid * EACH + column % EACH
    offs = packed_offsets(n, steps)
    w_ptrs = tl.where((column < EACH)[None, :, None], gate_ptr + offs, up_ptr + offs)
    y = dot(row_pointers(x_ptr, stride_x, row0, T, ROWS), w_ptrs, steps, ROWS, C, AHEAD, FMA)
    n = pid * EACH + tl.arange(0, EACH)
    for r in tl.static_range(ROWS):
        gate, up = halves(rounded(y[r], dtype), C)
        activation = rounded(rounded(silu(gate), dtype) * up, dtype)
        target = activation_ptr + (row0 + r) * stride_activation + segment_offset(n, (F + 7) // 8)
        tl.store(target, activation, mask=(n < F) & (row0 + r < T))


def gate_up_silu(
    x: Tensor, w_gate: Tensor, w_up: Tensor, hidden: Tensor, activation: Tensor, intermediate_size: int, num_rows: int
) -> None:
    """x fp32 [T, row_stride(D)] -> activation fp32 [T, row_stride(F)]; hidden only says the model's dtype."""
    options = streaming(num_rows, COLUMNS, w_gate)
    _gate_up_silu_kernel[(blocks(intermediate_size, COLUMNS // 2), blocks(num_rows, options["ROWS"]))](
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
