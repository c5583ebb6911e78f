"""Single numbers of a packed quantised weight (quantised.py), as an embedding needs them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import device_function
from .integer_weights import low_half, signed_byte
from .launch import OPTIONS, blocks
from .quantised import kind_of, segment_blocks

__all__ = ["stored_number", "stored_rows"]


@device_function
def stored_number(w_ptr, row, i, mask, length, KIND: tl.constexpr):
    """Elements int32 [B] of one row of a packed weight: fl(fl(a * q) - c), fp32. A segment has ``length`` blocks."""
    BITS: tl.constexpr = KIND & 15
    HAS_C: tl.constexpr = (KIND & 16) != 0
    COMMON: tl.constexpr = (KIND & 32) != 0
    BY_SEGMENT: tl.constexpr = (KIND & 64) != 0
    PLANES: tl.constexpr = 2 if (KIND & 128) != 0 else 1
    WORDS: tl.constexpr = KIND >> 8
    PARTS: tl.constexpr = 1 if BITS == 8 else 2
    words = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    steps = (length + PARTS - 1) // PARTS
    block = i // 32
    k = i % 32
    segment = block // length
    step = block % length // PARTS
    part = block % length % PARTS
    size = steps * WORDS
    if BY_SEGMENT:
        size = size + 128
    place = segment % 4 * 16 + (row % 16).to(tl.int32)
    group = words + row // 16 * size
    base = group + step * WORDS
    t = k // 4 % 4
    half = segment // 4 * 2 + k // 16  # of the segments, of the block
    code = tl.load(base + (place * 4 + t) * 4 + half, mask=mask, other=0) >> (k % 4 * 8)
    at = base + 1024
    if BITS == 8:
        q = signed_byte(code, 0)
        if PLANES == 2:
            low = tl.load(at + (place * 4 + t) * 4 + half, mask=mask, other=0) >> (k % 4 * 8)
            q = q * 128.0 + signed_byte(low, 0)
    else:
        q = (code >> (part * 4)) & 15
        if BITS == 5:
            high = tl.load(at + place * 4 + t, mask=mask, other=0) >> (k % 4 * 8 + half * 2 + part)
            q = q | ((high & 1) << 4)
            at = at + 256
        if BITS == 6:
            high = tl.load(at + (place * 4 + t) * 2 + segment // 4, mask=mask, other=0)
            q = q | (((high >> (k % 4 * 8 + k // 16 * 4 + part * 2)) & 3) << 4)
            at = at + 512
        if not HAS_C:
            q = q - (1 << (BITS - 1))
        q = q.to(tl.float32)
    if BY_SEGMENT:
        a = tl.load(group + steps * WORDS + place * 2 + segment // 4, mask=mask, other=0).to(tl.float32, bitcast=True)
    elif COMMON:
        scales = tl.load(at + place * 2 + segment // 4, mask=mask, other=0)
        common = block // 8
        if HAS_C:
            at = group + (common // 2 * WORDS + WORDS - 32) + (common % 2 * 16 + place % 16)
            both = tl.load(at, mask=mask, other=0)
            a = low_half(both) * ((scales >> (part * 16)) & 255).to(tl.float32)
            c = low_half(both >> 16) * ((scales >> (part * 16 + 8)) & 255).to(tl.float32)
        else:
            at = group + (common // 2 * WORDS + WORDS - 16) + (common % 2 * 8 + place % 16 // 2)
            d = low_half(tl.load(at, mask=mask, other=0) >> (place % 2 * 16))
            a = d * signed_byte(scales, part * 2 + k // 16)
    elif HAS_C:
        both = tl.load(at + place * 4 + segment // 4 * 2 + part, mask=mask, other=0)
        a = low_half(both)
        c = -low_half(both >> 16)
    elif BITS == 8:
        a = low_half(tl.load(at + place, mask=mask, other=0) >> (segment // 4 * 16))
    else:
        a = low_half(tl.load(at + place * 2 + segment // 4, mask=mask, other=0) >> (part * 16))
    value = a * q
    if HAS_C:
        value = value - c
    return value


@triton.jit
def _stored_rows_kernel(rows_ptr, w_ptr, y_ptr, K, length, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = stored_number(w_ptr, row, i, i < K, length, KIND)
    tl.store(y_ptr + tl.program_id(0).to(tl.int64) * K + i, value, mask=i < K)


def stored_rows(packed: Tensor, rows: Tensor, k: int) -> Tensor:
    """The numbers that some rows (int64 [R]) of a packed weight stand for: fp32 [R, k]."""
    y = torch.empty(len(rows), k, device=packed.device)
    _stored_rows_kernel[(len(rows), blocks(k, 256))](
        rows_ptr=rows, w_ptr=packed, y_ptr=y, K=k, length=segment_blocks(k), KIND=kind_of(packed).code, BLOCK=256,
        num_warps=4, **OPTIONS,
    )  # fmt: skip
    return y
