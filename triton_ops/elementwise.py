"""The contract's elementary functions (rule 5), one number a thread: for tests, and for whoever wants them.

exp, silu: within 2 ulp;  linear: rule 1 alone;  embed_tokens: rows of a packed embedding
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import dot, packed_offsets, row_pointers, to_dtype
from .contract import exp as _exp
from .contract import silu as _silu
from .launch import OPTIONS, blocks, streaming
from .packing import to_segments, unpack_weight

__all__ = ["embed_tokens", "exp", "linear", "silu"]


@triton.jit
def _elementwise_kernel(x_ptr, y_ptr, n, SILU: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    if SILU:
        y = _silu(x)
    else:
        y = _exp(x)
    tl.store(y_ptr + offs, y, mask=offs < n)


def _elementwise(x: Tensor, is_silu: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _elementwise_kernel[(blocks(x.numel(), 1024),)](
        x.contiguous(), y, x.numel(), SILU=is_silu, BLOCK=1024, num_warps=4, **OPTIONS
    )
    return y


def exp(x: Tensor) -> Tensor:
    """reference.exp of an fp32 tensor."""
    return _elementwise(x, False)


def silu(x: Tensor) -> Tensor:
    """reference.silu of an fp32 tensor."""
    return _elementwise(x, True)


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, stride_x, T, N, steps,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
    FMA: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * C + tl.arange(0, C)
    row0 = tl.program_id(1).to(tl.int64) * ROWS
    packed = tl.minimum(n, (N + 15) // 16 * 16 - 1)
    x_ptrs = row_pointers(x_ptr, stride_x, row0, T, ROWS)
    y = dot(x_ptrs, (w_ptr + packed_offsets(packed, steps),), steps, ROWS, TILES, C, AHEAD, EVEN, FMA)
    for r in tl.static_range(ROWS):
        z = y[r]
        if HAS_BIAS:
            z = z + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + (row0 + r) * N + n, to_dtype(z, y_ptr.dtype.element_ty), mask=(n < N) & (row0 + r < T))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """reference.linear: [T, K], packed [N, K], [N] or None -> [T, N]."""
    y = torch.empty(len(x), out_features, dtype=x.dtype, device=x.device)
    segments, options = to_segments(x), streaming("linear", len(x), 1, weight)
    _linear_kernel[(blocks(out_features, options["C"]), blocks(len(x), options["ROWS"]))](
        segments, weight, y if bias is None else bias, y, segments.stride(0), len(x), out_features, weight.size(1),
        HAS_BIAS=bias is not None, **options,
    )  # fmt: skip
    return y


def embed_tokens(tokens: Tensor, embedding: Tensor, hidden_size: int) -> Tensor:
    """reference.embed_tokens: rows of the packed embedding [V, D] -> [T, D]."""
    return unpack_weight(embedding, embedding.size(0) * 16, hidden_size)[tokens]
