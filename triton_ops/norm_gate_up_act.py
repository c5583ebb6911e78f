"""RMSNorm, gate and up projections, act(gate) * up: rules 1, 2 and 5.

    to_dtype(to_dtype(act(to_dtype(dot(x, w_gate) + bias))) * to_dtype(dot(x, w_up) + bias))

act is silu, or gelu.

A program computes C columns of both, a tile each. Moves 2 F D weights once for each group of rows, T D numbers for each
program, T F results.
"""

import triton
import triton.language as tl
from torch import Tensor

from .contract import gelu, rounded, segment_offset, silu
from .integer_dot import products
from .integer_rows import Rows
from .launch import blocks, streaming
from .prompt_dot import row_of
from .prompt_rows import rows_for
from .quantised import code_of
from .rms_norm import from_segments, normalised

__all__ = ["gate_up_act", "norm_gate_up_act"]


@triton.jit
def _gate_up_act_kernel(
    x_gate_ptr, x_up_ptr, gate_ptr, up_ptr, bias_ptr, hidden_ptr, activation_ptr, stride_x, stride_activation,
    T, F, steps,
    GATE_KIND: tl.constexpr, UP_KIND: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
    FMA: tl.constexpr, PROMPT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1)
    row0 = tl.program_id(0).to(tl.int64) * ROWS  # programs that read the same weights run one after the other
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    n = pid * C + tl.arange(0, C)
    packed = tl.minimum(n, (F + 15) // 16 * 16 - 1)
    if GATE_KIND == UP_KIND:
        y = products(
            x_gate_ptr, stride_x, x_gate_ptr, row0, T, (gate_ptr, up_ptr), (packed, packed), steps, GATE_KIND, False,
            ROWS, TILES, C, AHEAD, EVEN, FMA, PROMPT, DEPENDENT,
        )  # fmt: skip
    else:
        y = products(
            x_gate_ptr, stride_x, x_gate_ptr, row0, T, (gate_ptr,), (packed,), steps, GATE_KIND, False,
            ROWS, 1, C, AHEAD, EVEN, FMA, PROMPT, DEPENDENT,
        ) + products(
            x_up_ptr, stride_x, x_up_ptr, row0, T, (up_ptr,), (packed,), steps, UP_KIND, False,
            ROWS, 1, C, AHEAD, EVEN, FMA, PROMPT, False,
        )  # fmt: skip
    if HAS_BIAS:
        gate_bias = tl.load(bias_ptr + n, mask=n < F, other=0.0).to(tl.float32)
        up_bias = tl.load(bias_ptr + F + n, mask=n < F, other=0.0).to(tl.float32)
    TIMES: tl.constexpr = 1 if PROMPT else ROWS
    for r in tl.static_range(TIMES):
        row = row_of(row0, r, ROWS, PROMPT)
        gate = y[r]
        up = y[TIMES + r]
        if HAS_BIAS:
            gate = gate + gate_bias
            up = up + up_bias
        gate = rounded(gate, dtype)
        if GELU:
            activated = rounded(gelu(gate), dtype)
        else:
            activated = rounded(silu(gate), dtype)
        activation = rounded(activated * rounded(up, dtype), dtype)
        target = activation_ptr + row * stride_activation + segment_offset(n, (F + 7) // 8)
        tl.store(target, activation, mask=(n < F) & (row < T))


def gate_up_act(
    x: Rows, w_gate: Tensor, w_up: Tensor, hidden: Tensor, activation: Rows, intermediate_size: int, num_rows: int,
    gate_up_bias: Tensor | None = None, use_gelu: bool = False,
) -> None:  # fmt: skip
    """x [T, D] -> activation [T, F]; hidden only says the model's dtype."""
    options = streaming("norm_gate_up_act", num_rows, 2, x.k, w_gate, w_up)
    x_for_gate, x_for_up = rows_for(x, num_rows, options, w_gate, w_up)
    _gate_up_act_kernel[(blocks(num_rows, options["ROWS"]), blocks(intermediate_size, options["C"]))](
        x_gate_ptr=x_for_gate,
        x_up_ptr=x_for_up,
        gate_ptr=w_gate,
        up_ptr=w_up,
        bias_ptr=hidden if gate_up_bias is None else gate_up_bias,
        hidden_ptr=hidden,
        activation_ptr=activation.numbers,
        stride_x=x.stride,
        stride_activation=activation.stride,
        T=num_rows,
        F=intermediate_size,
        steps=x.steps,
        GATE_KIND=code_of(w_gate),
        UP_KIND=code_of(w_up),
        HAS_BIAS=gate_up_bias is not None,
        GELU=use_gelu,
        **options,
    )


def norm_gate_up_act(
    hidden: Tensor, norm_weight: Tensor | None, w_gate: Tensor, w_up: Tensor, intermediate_size: int, eps: float,
    norm_offset: float = 0.0, gate_up_bias: Tensor | None = None, use_gelu: bool = False,
) -> Tensor:  # fmt: skip
    """reference.norm_gate_up_act: [T, D] -> [T, F]."""
    activation = Rows(len(hidden), intermediate_size, (), hidden.device)
    gate_up_act(
        normalised(hidden, norm_weight, eps, norm_offset, w_gate, w_up), w_gate, w_up, hidden, activation,
        intermediate_size, len(hidden), gate_up_bias, use_gelu,
    )  # fmt: skip
    return from_segments(activation.numbers, intermediate_size, hidden.dtype)
