"""The contract's elementary functions (rule 5), one number a thread: for tests and other callers.

exp, log, silu, gelu, tanh: within 2 ulp;  inverse_sqrt: both steps correctly rounded;
linear: rule 1 alone;  embed_tokens: rows of a packed embedding
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import exp as _exp
from .contract import gelu as _gelu
from .contract import log as _log
from .contract import silu as _silu
from .contract import tanh as _tanh
from .contract import to_dtype
from .integer_dot import products
from .integer_rows import Rows
from .launch import OPTIONS, blocks, is_quantised, streaming
from .packing import unpack_weight
from .prompt_dot import row_of
from .prompt_rows import rows_for
from .quantised import code_of
from .stored_rows import stored_rows

__all__ = ["embed_tokens", "exp", "gelu", "inverse_sqrt", "linear", "log", "silu", "tanh"]


@triton.jit
def _elementwise_kernel(x_ptr, y_ptr, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    if FUNCTION == "silu":
        y = _silu(x)
    elif FUNCTION == "gelu":
        y = _gelu(x)
    elif FUNCTION == "tanh":
        y = _tanh(x)
    elif FUNCTION == "log":
        y = _log(x)
    elif FUNCTION == "inverse_sqrt":
        y = tl.div_rn(1.0, tl.sqrt_rn(x))
    else:
        y = _exp(x)
    tl.store(y_ptr + offs, y, mask=offs < n)


def _elementwise(x: Tensor, function: str) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _elementwise_kernel[(blocks(x.numel(), 1024),)](
        x_ptr=x.contiguous(),
        y_ptr=y,
        n=x.numel(),
        FUNCTION=function,
        BLOCK=1024,
        num_warps=4,
        **OPTIONS,
    )
    return y


def exp(x: Tensor) -> Tensor:
    """reference.exp of an fp32 tensor."""
    return _elementwise(x, "exp")


def log(x: Tensor) -> Tensor:
    """reference.log of an fp32 tensor."""
    return _elementwise(x, "log")


def inverse_sqrt(x: Tensor) -> Tensor:
    """reference.inverse_sqrt of an fp32 tensor."""
    return _elementwise(x, "inverse_sqrt")


def silu(x: Tensor) -> Tensor:
    """reference.silu of an fp32 tensor."""
    return _elementwise(x, "silu")


def gelu(x: Tensor) -> Tensor:
    """reference.gelu of an fp32 tensor."""
    return _elementwise(x, "gelu")


def tanh(x: Tensor) -> Tensor:
    """reference.tanh of an fp32 tensor."""
    return _elementwise(x, "tanh")


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, stride_x, T, N, steps,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
    FMA: tl.constexpr, PROMPT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * C + tl.arange(0, C)
    row0 = tl.program_id(0).to(tl.int64) * ROWS  # programs that read the same weights run one after the other
    packed = tl.minimum(n, (N + 15) // 16 * 16 - 1)
    y = products(
        x_ptr, stride_x, x_ptr, row0, T, (w_ptr,), (packed,), steps, KIND, False,
        ROWS, TILES, C, AHEAD, EVEN, FMA, PROMPT, DEPENDENT,
    )  # fmt: skip
    for r in tl.static_range(1 if PROMPT else ROWS):
        row = row_of(row0, r, ROWS, PROMPT)
        z = y[r]
        if HAS_BIAS:
            z = z + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * N + n, to_dtype(z, y_ptr.dtype.element_ty), mask=(n < N) & (row < T))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """reference.linear: [T, K], packed [N, K], [N] or None -> [T, N]."""
    y = torch.empty(len(x), out_features, dtype=x.dtype, device=x.device)
    rows, options = Rows.of_numbers(x, weight), streaming("linear", len(x), 1, x.size(1), weight)
    (x_for_w,) = rows_for(rows, len(x), options, weight)
    _linear_kernel[(blocks(len(x), options["ROWS"]), blocks(out_features, options["C"]))](
        x_ptr=x_for_w,
        w_ptr=weight,
        bias_ptr=y if bias is None else bias,
        y_ptr=y,
        stride_x=rows.stride,
        T=len(x),
        N=out_features,
        steps=rows.steps,
        KIND=code_of(weight),
        HAS_BIAS=bias is not None,
        **options,
    )
    return y


def embed_tokens(
    tokens: Tensor, embedding: Tensor, hidden_size: int, dtype: torch.dtype, multiplier: float = 1.0
) -> Tensor:
    """reference.embed_tokens: rows of the packed embedding [V, D] -> [T, D]."""
    if is_quantised(embedding):
        rows = stored_rows(embedding, tokens, hidden_size).to(dtype)
    else:
        rows = unpack_weight(embedding, embedding.size(0) * 16, hidden_size)[tokens]
    return (rows.float() * multiplier).to(dtype)
