"""RMSNorm (rule 2), alone: in a step it is the last part of the kernel that wrote the rows.

to_dtype(to_dtype(x / sqrt(mean(x^2) + eps)) * weight)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import norm_rows
from .integer_rows import Rows, forms_of
from .launch import OPTIONS, norm_layout
from .packing import SEGMENTS

__all__ = ["from_segments", "normalised", "rms_norm"]


@triton.jit
def _rms_norm_kernel(
    hidden_ptr, weight_ptr, x_ptr, D, stride_x, eps, offset,
    HAS_NORM: tl.constexpr, THREADS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    norm_rows(hidden_ptr, rows, rows >= 0, D, weight_ptr, eps, offset, x_ptr, stride_x, 1, HAS_NORM, THREADS, WHOLE)


def normalised(hidden: Tensor, weight: Tensor | None, eps: float, offset: float, *next_weights: Tensor) -> Rows:
    """hidden [T, D], weight [D] or None: no norm -> rows that packed weights are to be multiplied with."""
    x = Rows(hidden.size(0), hidden.size(1), forms_of(*next_weights), hidden.device)
    _rms_norm_kernel[(hidden.size(0),)](
        hidden_ptr=hidden,
        weight_ptr=hidden if weight is None else weight,
        x_ptr=x.numbers,
        D=hidden.size(1),
        stride_x=x.stride,
        eps=eps,
        offset=offset,
        HAS_NORM=weight is not None,
        **norm_layout(hidden.size(1), 4),
        num_warps=4,
        **OPTIONS,
    )
    return x


def from_segments(x: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """The rows [T, k] of what a dot reads: the inverse of packing.to_segments."""
    length = -(-k // SEGMENTS)
    return x.reshape(len(x), SEGMENTS, -1)[:, :, :length].reshape(len(x), -1)[:, :k].to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """reference.rms_norm: [T, D], [D] -> [T, D]."""
    return from_segments(normalised(x, weight, eps, offset).numbers, x.size(1), x.dtype)
