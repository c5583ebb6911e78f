"""Rows as dots read them: fp32, and beside it, for quantised weights, the integers that they are rounded to (rule 8).

A row is fp32 numbers, segment by segment (packing.py), then the forms of integers that a model's weights ask for. A
form's integers lie step by step, segment by segment: for each t of 0 .. 3, eight bytes of each of two parts (two
blocks, or two planes of one), k = 4 t .. 4 t + 3 and 16 + 4 t .. 19 + 4 t of a block. Then scales; of one plane,
a step's words in a segment are (scale, sum of the integers) of two blocks, and after all of them the sums of halves.

Turned, for integer_tiles.py, rows lie by tiles of a program's rows, segment by segment and step by step: of eight rows
after the other the same integers; then of each eight their scales, of one plane as [4, block, 2] for rows in pairs;
and, of one plane, the sums of the integers alike, as fp32. (Scales of a segment are behind its last step.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import INTERPRETED, ROUND_MAGIC, SEGMENTS, device_function, segment_offset, wait_for_kernel_ahead
from .launch import OPTIONS, begun_early, blocks, is_quantised
from .packing import row_stride, to_segments
from .quantised import ONE_PLANE, TWO_PLANES, TWO_PLANES_BY_SEGMENT, kind_of, segment_blocks

__all__ = ["Rows", "forms_of", "round_rows"]

NUMBERS = -1  # beside the forms: rows as they are
AT_ONCE = (8, 2) if INTERPRETED else (1, 8)  # segments and blocks of a program
MOST_TURNED = 128  # rows of a group
SMALLEST_MAXIMUM = tl.constexpr(2.0**-100)  # of a block in one plane; below, numbers count as zeros


def forms_of(*weights: Tensor) -> tuple[int, ...]:
    """The forms of integers that these packed weights are multiplied with."""
    return tuple(sorted({kind_of(weight).form for weight in weights if is_quantised(weight)}))


def _form_words(form: int, k: int) -> int:
    """Of a row. (Turned ones of one plane have 160 words a step.)"""
    length = segment_blocks(k)
    if form == ONE_PLANE:
        return 192 * blocks(length, 2)
    return 136 * length if form == TWO_PLANES else 128 * length + 8


class Rows:
    """T rows of k numbers: ``numbers`` fp32 [T, row_stride(k)], and their integers in some forms."""

    def __init__(self, num_rows: int, k: int, forms: tuple[int, ...], device: torch.device) -> None:
        self.k, self.forms = k, forms
        self._begins: dict[int, int] = {}
        width = row_stride(k)
        for form in forms:
            self._begins[form] = width
            width += _form_words(form, k)
        # Zeros, for what fills segments and steps up is never written.
        self._words = torch.zeros(num_rows, -(-width // 16) * 16, device=device)
        self.numbers = self._words[:, : row_stride(k)]
        self._turned: dict[int, Tensor] = {}

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

    def turned(self, form: int = NUMBERS) -> Tensor:
        """Memory for all rows and some more, turned, as numbers or in a form: made when it is first asked for."""
        if form not in self._turned:
            rows = blocks(len(self), MOST_TURNED) * MOST_TURNED
            width = row_stride(self.k) if form == NUMBERS else _form_words(form, self.k)
            self._turned[form] = torch.empty(rows, width, device=self._words.device)
        return self._turned[form]

    def turned_of(self, weight: Tensor) -> Tensor:
        return self.turned(kind_of(weight).form)

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
def _store_planes(to, x, inverse, byte, inside):
    """x fp32 [S, B, 32] times inverse, as two planes of bytes; to [S, B], byte [1, 1, 32]: places in the first."""
    X = _to_nearest(tl.where(_bits(x) < 0x7F800000, x, 0.0) * inverse)
    high = (X + 64) >> 7
    to = to.to(tl.pointer_type(tl.int8), bitcast=True)[:, :, None] + byte
    tl.store(to, high.to(tl.int8), mask=inside)
    tl.store(to + 8, (X - (high << 7)).to(tl.int8), mask=inside)


@triton.jit
def _round_rows_kernel(
    x_ptr, rows_ptr, one_plane_ptr, two_planes_ptr, by_segment_ptr, stride_x, K, length,
    GATHER: tl.constexpr, ONE_PLANE: tl.constexpr, TWO_PLANES: tl.constexpr, BY_SEGMENT: tl.constexpr,
    TILE: tl.constexpr, S: tl.constexpr, B: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """TILE: of how many rows programs read them turned; 0: they are not. DEPENDENT: as in dot, with no weights."""
    if DEPENDENT:
        wait_for_kernel_ahead()
    row = tl.program_id(0)
    if GATHER:
        row = tl.load(rows_ptr + row)
    row_offset = row.to(tl.int64) * stride_x
    x_ptr += row_offset
    segments = tl.program_id(1) * S + tl.arange(0, S)
    segment = segments[:, None]
    steps = (length + 1) // 2
    if TILE:
        of_tile = (row // TILE * 8 + segment).to(tl.int64)
        eight = row % TILE // 8
        nth = row % 8
    else:
        one_plane_ptr += row_offset
        two_planes_ptr += row_offset
        by_segment_ptr += row_offset
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
        if TILE:
            scale_ptrs = by_segment_ptr + of_tile * (length * (TILE * 16) + TILE) + (length * (TILE * 16) + row % TILE)
        else:
            scale_ptrs = by_segment_ptr + length * 128 + in_pairs
        tl.store(scale_ptrs, segment_scale[:, None], mask=segment < 8)
    for start in range(0, length, B):
        block = start + tl.arange(0, B)[None, :]
        inside = (block < length) & (segment < 8)
        codes_inside = inside[:, :, None] & (k < 32)[None, None, :]
        i = ((segment * length + block) * 32)[:, :, None] + k[None, None, :]
        x = tl.load(x_ptr + segment_offset(i, of_segment), mask=codes_inside & (i < K), other=0.0)
        largest = tl.max(_bits(x), axis=2)
        if ONE_PLANE:
            X, scale = _one_plane(x, largest)
            total = tl.sum(X, axis=2)
            to = one_plane_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
            stored = inside
            if TILE:  # whose last step is filled up with zeros, for others may have been there
                stored = (block < steps * 2) & (segment < 8)
                to = to + (of_tile * steps + block // 2) * (TILE * 20)
                codes = to + (eight * 128 + nth * 16 + block % 2 * 2)
                params = to + (TILE * 16 + eight * 16 + nth // 2 * 4 + block % 2 * 2 + nth % 2)
                tl.store(params + TILE * 2, total.to(tl.float32).to(tl.int32, bitcast=True), mask=stored)
            else:
                codes = to + ((block // 2 * 8 + segment) * 16 + block % 2 * 2)
                params = to + (steps * 128 + (block // 2 * 8 + segment) * 4 + block % 2 * 2)
                first = tl.sum(tl.where((k < 16)[None, None, :], X, 0), axis=2)
                tl.store(params + 1, total, mask=stored)
                tl.store(params + steps * 32, first, mask=stored)
                tl.store(params + steps * 32 + 1, total - first, mask=stored)
            tl.store(params, scale.to(tl.int32, bitcast=True), mask=stored)
            codes = codes.to(tl.pointer_type(tl.int8), bitcast=True)[:, :, None] + byte
            tl.store(codes, X.to(tl.int8), mask=stored[:, :, None] & (k < 32)[None, None, :])
        if TWO_PLANES:
            scale, inverse = _scale_of_planes(largest)
            if TILE:
                codes = two_planes_ptr + (of_tile * length + block) * (TILE * 17) + (eight * 128 + nth * 16)
                scale_ptrs = two_planes_ptr + (of_tile * length + block) * (TILE * 17) + (TILE * 16 + row % TILE)
            else:
                codes = two_planes_ptr + (block * 8 + segment) * 16
                scale_ptrs = two_planes_ptr + length * 128 + block * 8 + in_pairs
            tl.store(scale_ptrs, scale, mask=inside)
            _store_planes(codes, x, inverse[:, :, None], byte, codes_inside)
        if BY_SEGMENT:
            if TILE:
                codes = by_segment_ptr + of_tile * (length * (TILE * 16) + TILE) + block * (TILE * 16)
                codes = codes + (eight * 128 + nth * 16)
            else:
                codes = by_segment_ptr + (block * 8 + segment) * 16
            _store_planes(codes, x, segment_inverse[:, None, None], byte, codes_inside)


def round_rows(
    x: Rows, num_rows: int, *weights: Tensor, rows: Tensor | None = None, tile: int = 0, dependent: bool = False
) -> None:
    """The first ``num_rows`` rows, or those that int32 ``rows`` names, as integers for packed weights; turned, if
    ``tile`` says for how many rows a program. ``dependent``: the kernel may begin before the one ahead is done."""
    forms = forms_of(*weights)
    if not forms:
        return
    place = x.turned if tile else x.form
    pointers = [place(form) if form in forms else x.numbers for form in (ONE_PLANE, TWO_PLANES, TWO_PLANES_BY_SEGMENT)]
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
        TILE=tile,
        S=AT_ONCE[0],
        B=AT_ONCE[1],
        num_warps=4,
        **begun_early(dependent),
        **OPTIONS,
    )
