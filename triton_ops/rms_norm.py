"""RMSNorm (rule 2), alone: in a step it is the last part of the kernel that wrote the rows.

to_dtype(to_dtype(x / sqrt(mean(x^2) + eps)) * weight)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import norm_rows
from .launch import OPTIONS
from .packing import SEGMENTS, row_stride

__all__ = ["from_segments", "normalised", "rms_norm"]


@triton.jit
def _rms_norm_kernel(hidden_ptr, weight_ptr, x_ptr, D, stride_x, eps):
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    norm_rows(hidden_ptr, rows, rows >= 0, D, weight_ptr, eps, x_ptr, stride_x, 1)


def normalised(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden [T, D], weight [D] -> fp32 [T, row_stride(D)], as a dot reads it."""
    x = torch.zeros(hidden.size(0), row_stride(hidden.size(1)), device=hidden.device)
    _rms_norm_kernel[(hidden.size(0),)](hidden, weight, x, hidden.size(1), x.stride(0), eps, num_warps=4, **OPTIONS)
    return x


def from_segments(x: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """The rows [T, k] of what a dot reads: the inverse of packing.to_segments."""
    length = -(-k // SEGMENTS)
    return x.view(len(x), SEGMENTS, -1)[:, :, :length].reshape(len(x), -1)[:, :k].to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """reference.rms_norm: [T, D], [D] -> [T, D]."""
    return from_segments(normalised(x, weight, eps), x.size(1), x.dtype)
