"""Quantised weights as the dots of rule 8 hold them: what a lane loads of a packed weight (quantised.py), and its part.

A lane 4 g + t of a warp has two columns, g and g + 8 of sixteen, and of their blocks of 32 the eight integers that the
fragment of ``mma.m16n8k32`` wants of it. Loads are tiles [W, 32, words]: a tensor [W, 32] says which column a lane has
(``column``), and another which segment, below 4 (``segment``): either may have 1 in place of W or of 32. What is loaded
holds that segment and the one four further, which become two of the dot's batch. On other hardware threads exchange
what they loaded; the bits are the same.

KIND is all that the kernels know of a type of weights (quantised.Kind.code): 0 for the model's dtype, else the bits of
a code, and whether there is a c, whether scales are products, whether they are a whole segment's, and whether a
weight has two planes.
"""

import triton.language as tl

from .contract import device_function

# The bits of ROUND_MAGIC: added to an integer below 2**22, they make it the float ROUND_MAGIC + integer, exactly.
MAGIC_BITS = tl.constexpr(0x4B400000)


@device_function
def of_lanes(columns):
    """int32 [16 * G], groups of sixteen columns -> two of [G, 32]: lane 4 g + t has columns g and g + 8."""
    G: tl.constexpr = columns.shape[0] // 16
    low, high = tl.split(tl.permute(tl.reshape(columns, [G, 2, 8]), [0, 2, 1]))
    return (
        tl.reshape(tl.broadcast_to(low[:, :, None], [G, 8, 4]), [G, 32]),
        tl.reshape(tl.broadcast_to(high[:, :, None], [G, 8, 4]), [G, 32]),
    )


@device_function
def load_step(w_ptr, column, segment, step, steps, KIND: tl.constexpr):
    """What a step holds of one column a lane: its codes, their high bits, scales. What a kind lacks is not used."""
    BITS: tl.constexpr = KIND & 15
    WORDS: tl.constexpr = KIND >> 8
    BY_SEGMENT: tl.constexpr = (KIND & 64) != 0
    w_ptr = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    t = (tl.arange(0, 32) % 4)[None, :, None]
    size = steps * WORDS
    if BY_SEGMENT:
        size = size + 128
    base = (w_ptr + (column // 16).to(tl.int64) * size)[:, :, None] + step * WORDS
    place = (segment * 16 + column % 16)[:, :, None]
    inside = step < steps
    one, two, four = (
        tl.arange(0, 1)[None, None, :],
        tl.arange(0, 2)[None, None, :],
        tl.arange(0, 4)[None, None, :],
    )
    codes = tl.load(base + ((place * 4 + t) * 4 + four), mask=inside, other=0, eviction_policy="evict_first")
    high = codes
    scales = codes
    at = base + 1024
    if (KIND & 128) != 0:  # the low plane
        high = tl.load(at + ((place * 4 + t) * 4 + four), mask=inside, other=0, eviction_policy="evict_first")
    if BITS == 5:
        high = tl.load(at + (place * 4 + t + one), mask=inside, other=0)
        at = at + 256
    if BITS == 6:
        high = tl.load(at + ((place * 4 + t) * 2 + two), mask=inside, other=0)
        at = at + 512
    if not BY_SEGMENT:
        if BITS == 8:
            scales = tl.load(at + (place + one), mask=inside, other=0)
        elif (KIND & 48) == 16:
            scales = tl.load(at + (place * 4 + four), mask=inside, other=0)
        else:
            scales = tl.load(at + (place * 2 + two), mask=inside, other=0)
    return codes, high, scales


@device_function
def load_common(w_ptr, column, segment, step, steps, length, PART: tl.constexpr, KIND: tl.constexpr):
    """Where scales are products: the word of the 256 numbers that block PART of a step lies in, int32 [W, 32, 2]."""
    WORDS: tl.constexpr = KIND >> 8
    w_ptr = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    place = column % 16
    of_columns = (column // 16).to(tl.int64) * (steps * WORDS) + (place if (KIND & 16) != 0 else place // 2)
    block = segment * length + step * 2 + PART
    w_ptr = w_ptr + of_columns
    low = tl.load(w_ptr + _place_of_common(block, length, WORDS, KIND))
    high = tl.load(w_ptr + _place_of_common(block + 4 * length, length, WORDS, KIND))
    words = tl.join(low, high)
    if (KIND & 16) == 0:
        words = words >> (place % 2 * 16)[:, :, None]
    return words


@device_function
def _place_of_common(block, length, WORDS: tl.constexpr, KIND: tl.constexpr):
    """Where in a group the words of the 256 numbers begin that a block lies in: a step has those of two."""
    SIZE: tl.constexpr = 16 if (KIND & 16) != 0 else 8
    common = tl.minimum(block // 8, length - 1)
    return common // 2 * WORDS + (WORDS - 2 * SIZE) + common % 2 * SIZE


@device_function
def segment_scales(w_ptr, low, high, segment, steps, KIND: tl.constexpr, R: tl.constexpr):
    """Of a type whose scales are a segment's: fp32 [2 * W, 16, R]."""
    return of_columns(
        _segment_scales(w_ptr, low, segment, steps, KIND), _segment_scales(w_ptr, high, segment, steps, KIND), R
    )


@device_function
def _segment_scales(w_ptr, column, segment, steps, KIND: tl.constexpr):
    """The same of one column a lane: fp32 [W, 32, 2]."""
    WORDS: tl.constexpr = KIND >> 8
    w_ptr = w_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + steps * WORDS
    group = (w_ptr + (column // 16).to(tl.int64) * (steps * WORDS + 128))[:, :, None]
    place = (segment * 16 + column % 16)[:, :, None]
    words = tl.load(group + (place * 2 + tl.arange(0, 2)[None, None, :]))
    return words.to(tl.float32, bitcast=True)


# ---- codes ----


@device_function
def to_bytes(words):
    """int32 [W, 32, N] -> int8 [W, 32, N, 4], the lowest byte first."""
    W: tl.constexpr = words.shape[0]
    N: tl.constexpr = words.shape[2]
    shifts = (tl.arange(0, 4) * 8)[None, None, None, :]
    words = tl.reshape(words.to(tl.uint32, bitcast=True), [W, 32, N, 1])
    return (tl.broadcast_to(words, [W, 32, N, 4]) >> shifts).to(tl.int8)


@device_function
def _codes(loaded, mask, PART: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr, PIECE: tl.constexpr):
    """What load_step says of a column -> its codes of block PART of a step: int8 [W, 32, 2 * 2, 4].

    SIGNED: less what stands for 0, and times 2 ** (8 - BITS), in the upper bits of each byte.
    """
    words = loaded[0]
    W: tl.constexpr = words.shape[0]
    if BITS == 4 and SIGNED:
        if PART == 0:
            words = words << 4
        words = (words & (mask << 4)) ^ -0x7F7F7F80
    elif BITS < 8:
        words = (words >> (4 * PART)) & mask
        if BITS == 5:
            shifts = (tl.arange(0, 4) * 2 + PART)[None, None, :]
            words = words | (((tl.broadcast_to(loaded[1], [W, 32, 4]) >> shifts) & 0x01010101) << 4)
        if BITS == 6:
            shifts = (tl.arange(0, 2) * 4 + 2 * PART)[None, None, None, :]
            high = tl.broadcast_to(tl.reshape(loaded[1], [W, 32, 2, 1]), [W, 32, 2, 2]) >> shifts
            words = words | ((tl.reshape(high, [W, 32, 4]) & 0x03030303) << 4)
        if SIGNED:
            words = (words << (8 - BITS)) ^ -0x7F7F7F80
        if PIECE >= 0:
            nothing = mask & 0x10101010  # again, not known to the compiler
            words = words & tl.where(tl.arange(0, 4)[None, None, :] % 2 == PIECE, ~nothing, nothing)
    elif SIGNED:
        words = words ^ mask
    return to_bytes(words)


@device_function
def fragment_of_columns(
    low, high, mask, PART: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr = False, PIECE: tl.constexpr = -1
):  # fmt: skip
    """Codes of a lane's two columns -> int8 [2 * W, 16, 32]."""
    v = tl.join(_codes(low, mask, PART, BITS, SIGNED, PIECE), _codes(high, mask, PART, BITS, SIGNED, PIECE))
    W: tl.constexpr = v.shape[0]
    v = tl.reshape(v, [W, 8, 4, 2, 2, 4, 2])  # W, g, t, segment's half, block's half, byte, column's half
    return tl.reshape(tl.permute(v, [3, 0, 6, 1, 2, 4, 5]), [2 * W, 16, 32])


@device_function
def part_of_rows(words, PART: tl.constexpr, PIECE: tl.constexpr):
    """Words of (block or plane, block's half) of rows -> the bytes of one: int8 [W, 32, 2, 4]."""
    W: tl.constexpr = words.shape[0]
    first, second = tl.split(tl.permute(tl.reshape(words, [W, 32, 2, 2]), [0, 1, 3, 2]))
    part = first
    if PART:
        part = second
    if PIECE >= 0:
        part = tl.where(tl.arange(0, 2)[None, None, :] == PIECE, part, 0)
    return to_bytes(part)


# ---- scales ----


@device_function
def of_columns(low, high, R: tl.constexpr):
    """[W, 32, 2] (segment's half) of a lane's two columns -> [2 * W, 16, R], the same for all rows."""
    W: tl.constexpr = low.shape[0]
    HALVES: tl.constexpr = R // 8
    v = tl.reshape(tl.join(low, high), [W, 8, 4, 2, 2, 1, 1])  # W, g, t, segment's half, column's half
    v = tl.permute(tl.broadcast_to(v, [W, 8, 4, 2, 2, HALVES, 2]), [3, 0, 4, 1, 5, 2, 6])
    return tl.reshape(v, [2 * W, 16, R])


@device_function
def low_half(words):
    """The fp16 number in the lower half of int32 words, as fp32."""
    return (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@device_function
def signed_byte(words, at):
    """Byte ``at`` of int32 words, as a signed number: fp32."""
    return ((words << (24 - 8 * at)) >> 24).to(tl.float32)


@device_function
def column_scales(
    low, high, common_low, common_high,
    PART: tl.constexpr, PIECE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """a, or c, of piece PIECE of block PART of a step, from the words of a lane's two columns: fp32 [2 * W, 16, R]."""
    return of_columns(
        _scales(low, common_low, PART, PIECE, C, KIND), _scales(high, common_high, PART, PIECE, C, KIND), R
    )


@device_function
def _scales(words, common, PART: tl.constexpr, PIECE: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr):
    """The same of one column a lane: fp32 [W, 32, 2]."""
    W: tl.constexpr = words.shape[0]
    if (KIND & 48) == 48:
        value = low_half(common >> (16 * C)) * ((words >> (16 * PART + 8 * C)) & 255).to(tl.float32)
    elif (KIND & 32) != 0:
        value = low_half(common) * signed_byte(words, 2 * PART + PIECE)
    elif (KIND & 16) != 0:
        pair, second = tl.split(tl.reshape(words, [W, 32, 2, 2]))
        if PART:
            pair = second
        value = low_half(pair >> (16 * C))
        if C:
            value = -value
    elif (KIND & 15) == 8:
        value = low_half(tl.reshape(tl.join(words, words >> 16), [W, 32, 2]))
    else:
        value = low_half(words >> (16 * PART))
    return value
