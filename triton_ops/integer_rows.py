"""Rows as dots read them: fp32, and beside it, for quantised weights, the integers that they are rounded to (rule 8).

A row is fp32 numbers, segment by segment (packing.py), then the forms of integers that a model's weights ask for. A
form's integers lie step by step, segment by segment: for each t of 0 .. 3, eight bytes of each of two parts (two
blocks, or two planes of one), k = 4 t .. 4 t + 3 and 16 + 4 t .. 19 + 4 t of a block. Then scales; of one plane,
a step's words in a segment are (scale, sum of the integers) of two blocks, and after all of them the sums of halves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import INTERPRETED, ROUND_MAGIC, SEGMENTS, device_function, segment_offset
from .launch import OPTIONS, blocks, is_quantised
from .packing import row_stride, to_segments
from .quantised import ONE_PLANE, TWO_PLANES, TWO_PLANES_BY_SEGMENT, kind_of, segment_blocks

__all__ = ["Rows", "forms_of", "round_rows"]

AT_ONCE = (8, 2) if INTERPRETED else (1, 8)  # segments and blocks of a program
MOST_TURNED = 128  # rows of a group
SMALLEST_MAXIMUM = tl.constexpr(2.0**-100)  # of a block in one plane; below, numbers count as zeros


def forms_of(*weights: Tensor) -> tuple[int, ...]:
    """The forms of integers that these packed weights are multiplied with."""
    return tuple(sorted({kind_of(weight).form for weight in weights if is_quantised(weight)}))


def _form_words(form: int, k: int) -> int:
    length = segment_blocks(k)
    if form == ONE_PLANE:
        return 192 * -(-length // 2)
    return 136 * length if form == TWO_PLANES else 128 * length + 8


class Rows:
    """T rows of k numbers: ``numbers`` fp32 [T, row_stride(k)], and their integers in some forms."""

    def __init__(self, num_rows: int, k: int, forms: tuple[int, ...], device: torch.device) -> None:
        self.k = k
        self._begins: dict[int, int] = {}
        width = row_stride(k)
        for form in forms:
            self._begins[form] = width
            width += _form_words(form, k)
        # Zeros, for what fills segments and steps up is never written.
        self._words = torch.zeros(num_rows, -(-width // 16) * 16, device=device)
        self.numbers = self._words[:, : row_stride(k)]
        self._turned: Tensor | None = None

    @classmethod
    def of_numbers(cls, x: Tensor, *weights: Tensor) -> Rows:
        """Rows [T, k] in any dtype, to be multiplied with packed weights."""
        rows = cls(len(x), x.size(1), forms_of(*weights), x.device)
        rows.numbers.copy_(to_segments(x))
        return rows

    def __len__(self) -> int:
        return len(self._words)

    @property
    def stride(self) -> int:
        return self._words.stride(0)

    @property
    def steps(self) -> int:
        """Of eight k in a segment, for weights in the model's dtype."""
        return row_stride(self.k) // 64

    def of(self, weight: Tensor) -> Tensor:
        """The numbers that a packed weight is multiplied with."""
        return self.form(kind_of(weight).form) if is_quantised(weight) else self.numbers

    def turned(self) -> Tensor:
        """Memory for all rows and some more, as prompt_rows.py lays them out: made when it is first asked for."""
        if self._turned is None:
            rows = blocks(len(self), MOST_TURNED) * MOST_TURNED
            self._turned = torch.empty(rows, row_stride(self.k), device=self._words.device)
        return self._turned

    def form(self, form: int) -> Tensor:
        return self._words[:, self._begins[form] :]


@device_function
def _to_nearest(x):
    """fp32 below 2**22 -> int32, to nearest even."""
    return (x + ROUND_MAGIC).to(tl.int32, bitcast=True) - 0x4B400000


@device_function
def _bits(x):
    """Of the magnitudes of fp32 numbers: they are in the numbers' order, infinities and then NaN after all others."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@device_function
def _one_plane(x, largest):
    """Integers int32 and scales of blocks fp32 [S, B, 32], of which largest int32 [S, B] has the bits."""
    finite = largest < 0x7F800000
    bounded = tl.maximum(tl.where(finite, largest, 0x3F800000).to(tl.float32, bitcast=True), SMALLEST_MAXIMUM)
    full = tl.full(bounded.shape, 127.0, tl.float32)
    scale = tl.where(finite, tl.div_rn(bounded, full), float("nan"))
    return _to_nearest(tl.where(finite[:, :, None], x, 0.0) * tl.div_rn(full, bounded)[:, :, None]), scale


@device_function
def _scale_of_planes(largest):
    """Scales of two planes and their inverses, powers of two, from the bits of the largest magnitudes."""
    finite = largest < 0x7F800000
    exponent = tl.maximum(tl.where(finite, largest, 0x3F800000) >> 23, 14)
    scale = ((exponent - 12) << 23).to(tl.float32, bitcast=True)
    return tl.where(finite, scale, float("nan")), ((266 - exponent) << 23).to(tl.float32, bitcast=True)


@device_function
def _store_planes(to, x, inverse, at, inside):
    """x fp32 [S, B, 32] times inverse, as two planes of bytes; at: each byte's place in the first."""
    X = _to_nearest(tl.where(_bits(x) < 0x7F800000, x, 0.0) * inverse)
    high = (X + 64) >> 7
    to = to.to(tl.pointer_type(tl.int8), bitcast=True) + at
    tl.store(to, high.to(tl.int8), mask=inside)
    tl.store(to + 8, (X - (high << 7)).to(tl.int8), mask=inside)


@triton.jit
def _round_rows_kernel(
    x_ptr, rows_ptr, one_plane_ptr, two_planes_ptr, by_segment_ptr, stride_x, K, length,
    GATHER: tl.constexpr, ONE_PLANE: tl.constexpr, TWO_PLANES: tl.constexpr, BY_SEGMENT: tl.constexpr,
    S: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if GATHER:
        row = tl.load(rows_ptr + row)
    row_offset = row.to(tl.int64) * stride_x
    x_ptr += row_offset
    segments = tl.program_id(1) * S + tl.arange(0, S)
    segment = segments[:, None]
    in_pairs = segment % 4 * 2 + segment // 4
    k = tl.arange(0, 32)
    byte = (k // 4 % 4 * 16 + k // 16 * 4 + k % 4)[None, None, :]
    of_segment = (K + 7) // 8
    if BY_SEGMENT:
        of_all = tl.zeros([S], tl.int32)
        for start in range(0, length, B):
            block = start + tl.arange(0, B)[None, :]
            i = ((segment * length + block) * 32)[:, :, None] + k[None, None, :]
            mask = (block < length)[:, :, None] & (i < K)
            x = tl.load(x_ptr + segment_offset(i, of_segment), mask=mask, other=0.0)
            of_all = tl.maximum(of_all, tl.max(tl.max(_bits(x), axis=2), axis=1))
        segment_scale, segment_inverse = _scale_of_planes(of_all)
        tl.store(by_segment_ptr + row_offset + length * 128 + segments % 4 * 2 + segments // 4, segment_scale)
    for start in range(0, length, B):
        block = start + tl.arange(0, B)[None, :]
        inside = (block < length) & (segment < 8)
        codes_inside = inside[:, :, None] & (k < 32)[None, None, :]
        i = ((segment * length + block) * 32)[:, :, None] + k[None, None, :]
        x = tl.load(x_ptr + segment_offset(i, of_segment), mask=codes_inside & (i < K), other=0.0)
        largest = tl.max(_bits(x), axis=2)
        at = ((block * 8 + segment) * 64)[:, :, None] + byte
        if ONE_PLANE:
            X, scale = _one_plane(x, largest)
            place = block // 2 * 8 + segment
            to = one_plane_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + row_offset
            codes = to.to(tl.pointer_type(tl.int8), bitcast=True) + (place * 64 + block % 2 * 8)[:, :, None] + byte
            tl.store(codes, X.to(tl.int8), mask=codes_inside)
            steps = (length + 1) // 2
            params = to + steps * 128 + place * 4 + block % 2 * 2
            first = tl.sum(tl.where((k < 16)[None, None, :], X, 0), axis=2)
            total = tl.sum(X, axis=2)
            tl.store(params, scale.to(tl.int32, bitcast=True), mask=inside)
            tl.store(params + 1, total, mask=inside)
            tl.store(params + steps * 32, first, mask=inside)
            tl.store(params + steps * 32 + 1, total - first, mask=inside)
        if TWO_PLANES:
            scale, inverse = _scale_of_planes(largest)
            tl.store(two_planes_ptr + row_offset + length * 128 + block * 8 + in_pairs, scale, mask=inside)
            _store_planes(two_planes_ptr + row_offset, x, inverse[:, :, None], at, codes_inside)
        if BY_SEGMENT:
            _store_planes(by_segment_ptr + row_offset, x, segment_inverse[:, None, None], at, codes_inside)


def round_rows(x: Rows, num_rows: int, *weights: Tensor, rows: Tensor | None = None) -> None:
    """The first ``num_rows`` rows, or those that int32 ``rows`` names, as integers for packed weights."""
    forms = forms_of(*weights)
    if not forms:
        return
    pointers = [x.form(form) if form in forms else x.numbers for form in (ONE_PLANE, TWO_PLANES, TWO_PLANES_BY_SEGMENT)]
    _round_rows_kernel[(num_rows, SEGMENTS // AT_ONCE[0])](
        x_ptr=x.numbers,
        rows_ptr=x.numbers if rows is None else rows,
        one_plane_ptr=pointers[0],
        two_planes_ptr=pointers[1],
        by_segment_ptr=pointers[2],
        stride_x=x.stride,
        K=x.k,
        length=segment_blocks(x.k),
        GATHER=rows is not None,
        ONE_PLANE=ONE_PLANE in forms,
        TWO_PLANES=TWO_PLANES in forms,
        BY_SEGMENT=TWO_PLANES_BY_SEGMENT in forms,
        S=AT_ONCE[0],
        B=AT_ONCE[1],
        num_warps=4,
        **OPTIONS,
    )
