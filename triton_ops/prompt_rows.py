"""Rows as the kernels that multiply them read them: numbers, integers (integer_rows.py), or turned for a prompt.

A prompt's rows are turned group by group, fp32 [groups, row_stride(k), rows of a group]: prompt_dot.py then reads
neighbouring rows from neighbouring banks of shared memory. Moves T K numbers in and out.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .integer_rows import Rows, round_rows
from .launch import OPTIONS, blocks, is_quantised

__all__ = ["rows_for"]

WIDTH = 64  # k that a program turns


@triton.jit
def _turn_rows_kernel(x_ptr, turned_ptr, stride_x, T, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row0 = tl.program_id(0).to(tl.int64) * ROWS
    m = tl.arange(0, ROWS)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row = row0 + m
    mask = (row < T)[:, None] & (k < width)[None, :]
    x = tl.load(x_ptr + (row * stride_x)[:, None] + k[None, :], mask=mask, other=0.0)
    tl.store(turned_ptr + row0 * width + (k * ROWS)[:, None] + m[None, :], tl.trans(x), mask=(k < width)[:, None])


def rows_for(x: Rows, num_rows: int, options: dict[str, Any], *weights: Tensor) -> tuple[Tensor, ...]:
    """The first rows of x as a kernel with these options (launch.streaming) reads them, for each of its weights."""
    if not options["PROMPT"]:
        round_rows(x, num_rows, *weights, dependent=options["DEPENDENT"])
        return tuple(x.of(weight) for weight in weights)
    if any(map(is_quantised, weights)):
        round_rows(x, num_rows, *weights, tile=options["ROWS"])
        return tuple(x.turned_of(weight) for weight in weights)
    turned, width = x.turned(), x.numbers.size(1)
    _turn_rows_kernel[(blocks(num_rows, options["ROWS"]), blocks(width, WIDTH))](
        x_ptr=x.numbers,
        turned_ptr=turned,
        stride_x=x.stride,
        T=num_rows,
        width=width,
        ROWS=options["ROWS"],
        WIDTH=WIDTH,
        num_warps=4,
        **OPTIONS,
    )
    return (turned,) * len(weights)
