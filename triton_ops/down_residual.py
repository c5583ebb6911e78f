"""Down projection, the residual sum, and the next layer's norm: out_residual's kernel, with other sizes.

    hidden = to_dtype(hidden + to_dtype(dot(activation, w_down)));  x = rms_norm(hidden)

Moves D F weights once for each group of rows, T F numbers for each program, 2 T D of hidden.
"""

from torch import Tensor

from .out_residual import out_residual

__all__ = ["down_residual"]


def down_residual(
    activation: Tensor, w_down: Tensor, residual: Tensor, down_bias: Tensor | None = None,
    post_norm: Tensor | None = None, eps: float = 0.0, norm_offset: float = 0.0, multiplier: float = 1.0,
) -> Tensor:  # fmt: skip
    """reference.down_residual: [T, F], packed [D, F], [T, D] -> [T, D]."""
    return out_residual(activation, w_down, down_bias, residual, post_norm, eps, norm_offset, multiplier)
