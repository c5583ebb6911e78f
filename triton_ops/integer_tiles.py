"""Rule 8 for many rows at once: a tile of rows and columns, whose weights are unpacked once for all of its rows.

The tensor cores multiply as in integer_dot.py, but what is a batch there is one segment after the other here: a warp
has sixteen columns of all rows, of segments s and s + 4 at a time, for s from 0 to 3, and adds up the tree over the
eight on the way. Rows lie turned (integer_rows.py): eight of them together, segment by segment, as lanes read them, so
that the warps of a program, which read the same rows, find them in the first-level cache.

Codes that stand for numbers of both signs are made signed, in the upper bits of their bytes: a product is 2 ** n times
what it stands for, which the bits that a sum begins with take back (exactly: they are of a float whose last bit counts
2 ** -n).
"""

import triton.language as tl

from .contract import ROUND_MAGIC, device_function
from .integer_weights import (
    MAGIC_BITS,
    column_scales,
    fragment_of_columns,
    load_common,
    load_step,
    of_lanes,
    part_of_rows,
    segment_scales,
)  # fmt: skip


@device_function
def integer_tiles(
    x_ptr, stride_x, row0, w_ptrs, columns, length,
    KIND: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rule 8 for ROWS rows and TILES (one or two) times C columns: a tuple of fp32 [ROWS, C].

    x_ptr: turned rows, of which these begin with row0. w_ptrs: a tuple of packed weights of one kind, one a tile;
    columns: a tuple of int32 [C]. A segment has ``length`` blocks of 32, an even number if EVEN. A program has
    TILES * C / 16 warps.
    """
    N: tl.constexpr = TILES * C
    G: tl.constexpr = N // 16
    R8: tl.constexpr = ROWS // 8
    if TILES == 2:
        n = tl.reshape(tl.permute(tl.join(columns[0], columns[1]), [1, 0]), [N])
        w_ptr = tl.where(tl.arange(0, G)[:, None] < G // 2, w_ptrs[0], w_ptrs[1])
    else:
        n = columns[0]
        w_ptr = w_ptrs[0]
    low, high = of_lanes(n)
    # 0x0F0F0F0F, unknown to the compiler, which would mask each byte by itself and then put words together again; of 8
    # bits 0, unknown as well: it would put the registers of a fragment together for each eight rows.
    mask = tl.where(stride_x < 0, 0x11111111, 0 if (KIND & 15) == 8 else 0x0F0F0F0F)
    x_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    tile = row0 // ROWS

    y = (tl.zeros([2 * G, 16, 8], tl.float32),) * R8
    for i in range(2):
        pair = (tl.zeros([2 * G, 16, 8], tl.float32),) * R8
        for j in range(2):
            sums = _segments(
                x_ptr, tile, w_ptr, low, high, 2 * i + j, length, mask, KIND, G, R8, EVEN
            )  # fmt: skip
            pair = _added(pair, sums, j > 0)
        y = _added(y, pair, i > 0)
    parts = ()
    for r in tl.static_range(R8):
        left, right = tl.split(tl.permute(tl.reshape(y[r], [2, N, 8]), [1, 2, 0]))
        parts = parts + (left + right,)
    whole = _beside(parts, N, 8)
    if TILES == 2:
        first, second = tl.split(tl.permute(tl.reshape(whole, [2, C, ROWS]), [1, 2, 0]))
        return tl.trans(first), tl.trans(second)
    else:
        return (tl.trans(whole),)


@device_function
def _added(sums, more, begun):
    """Sums of a tree, tile by tile; what comes first is taken as it is."""
    new_sums = ()
    for r in tl.static_range(len(sums)):
        new_sums = new_sums + (tl.where(begun, sums[r] + more[r], more[r]),)
    return new_sums


@device_function
def _beside(parts, N: tl.constexpr, WIDTH: tl.constexpr):
    """Tensors [N, WIDTH] -> one, the rows of the first before those of the second."""
    if len(parts) == 1:
        return parts[0]
    else:
        wider = ()
        for i in tl.static_range(len(parts) // 2):
            both = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), [0, 2, 1])
            wider = wider + (tl.reshape(both, [N, 2 * WIDTH]),)
        return _beside(wider, N, 2 * WIDTH)


@device_function
def _segments(
    x_ptr, tile, w_ptr, low, high, segment, length, mask,
    KIND: tl.constexpr, G: tl.constexpr, R8: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The sums of segments ``segment`` and ``segment`` + 4: a tuple of R8 fp32 [2 * G, 16, 8]."""
    BITS: tl.constexpr = KIND & 15
    COMMON: tl.constexpr = (KIND & 32) != 0
    BY_SEGMENT: tl.constexpr = (KIND & 64) != 0
    PLANES: tl.constexpr = 2 if (KIND & 128) != 0 else 1
    SETS: tl.constexpr = PLANES + 1 if BY_SEGMENT else 1
    steps = length if BITS == 8 else (length + 1) // 2  # a step has one block of 8 bits or two of fewer
    at = tl.full([1, 1], segment, tl.int32)
    lane = tl.arange(0, 32) + tl.zeros([G, 1], tl.int32)
    # Words of a step, and behind a segment's last.
    of_step: tl.constexpr = R8 * (128 if BY_SEGMENT else 136 if BITS == 8 else 160)
    of_segment = steps * of_step + (R8 * 8 if BY_SEGMENT else 0)
    x_ptr = x_ptr + (tile * 8 + segment).to(tl.int64) * of_segment
    x_ptrs = x_ptr, x_ptr + 4 * of_segment.to(tl.int64)

    waiting = load_step(w_ptr, low, at, 0, steps, KIND), load_step(w_ptr, high, at, 0, steps, KIND)
    sums = (tl.zeros([2 * G, 16, 8], tl.int32 if BY_SEGMENT else tl.float32),) * (SETS * R8)
    for step in range(0, steps):
        loaded = waiting
        waiting = (
            load_step(w_ptr, low, at, step + 1, steps, KIND),
            load_step(w_ptr, high, at, step + 1, steps, KIND),
        )
        if BY_SEGMENT:
            sums = _add_planes(sums, loaded, x_ptrs, lane, mask, PLANES, R8)
        elif BITS == 8:
            sums = _add_block_of_planes(sums, loaded, x_ptrs, lane, mask, KIND, R8)
        else:
            common = (0, 0, 0, 0)
            if COMMON:
                first = load_common(w_ptr, low, at, step, steps, length, 0, KIND)
                second = load_common(w_ptr, high, at, step, steps, length, 0, KIND)
                common = first, second, first, second
                if not EVEN:  # else both blocks of a step lie in the same 256
                    common = (
                        first, second, load_common(w_ptr, low, at, step, steps, length, 1, KIND),
                        load_common(w_ptr, high, at, step, steps, length, 1, KIND),
                    )  # fmt: skip
            sums = _add_blocks(sums, loaded, common, x_ptrs, lane, mask, KIND, R8)
        x_ptrs = x_ptrs[0] + of_step, x_ptrs[1] + of_step
    if BY_SEGMENT:
        of_weights = segment_scales(w_ptr, low, high, at, steps, KIND, 8)
        totals = ()
        for r in tl.static_range(R8):
            s = _scales_of_pair(x_ptrs, r * 8, lane) * of_weights
            if PLANES == 1:
                total = sums[2 * r].to(tl.float32) * (128.0 * s) + sums[2 * r + 1].to(tl.float32) * s
            else:
                total = sums[3 * r].to(tl.float32) * (16384.0 * s) + sums[3 * r + 1].to(tl.float32) * (128.0 * s)
                total = total + sums[3 * r + 2].to(tl.float32) * s
            totals = totals + (total + 0.0,)  # the fold of one term, from +0.0
        return totals
    else:
        return sums


@device_function
def _add_planes(sums, loaded, x_ptrs, lane, mask, PLANES: tl.constexpr, R8: tl.constexpr):
    """A block's exact sums by powers of 128, added up over a segment: int32 [2 * G, 16, 8], PLANES + 1 of each R8."""
    w = fragment_of_columns(loaded[0], loaded[1], mask, 0, 8, True)
    if PLANES == 2:
        w_low = fragment_of_columns((loaded[0][1],), (loaded[1][1],), mask, 0, 8, True)
    new_sums = ()
    for r in tl.static_range(R8):
        x = _load_codes(x_ptrs, r, lane)
        high = _fragment_of_rows(x, 0)
        low = _fragment_of_rows(x, 1)
        first = tl.dot(w, high, sums[(PLANES + 1) * r], out_dtype=tl.int32)
        second = tl.dot(w, low, sums[(PLANES + 1) * r + 1], out_dtype=tl.int32)
        new_sums = new_sums + (first,)
        if PLANES == 1:
            new_sums = new_sums + (second,)
        else:
            second = tl.dot(w_low, high, second, out_dtype=tl.int32)
            new_sums = new_sums + (second, tl.dot(w_low, low, sums[3 * r + 2], out_dtype=tl.int32))
    return new_sums


@device_function
def _add_block_of_planes(sums, loaded, x_ptrs, lane, mask, KIND: tl.constexpr, R8: tl.constexpr):
    """The term of a block whose rows have two planes, added to sums."""
    w = fragment_of_columns(loaded[0], loaded[1], mask, 0, 8, True)
    a = column_scales(loaded[0][2], loaded[1][2], 0, 0, 0, 0, 8, False, KIND)
    new_sums = ()
    for r in tl.static_range(R8):
        x = _load_codes(x_ptrs, r, lane)
        s = _scales_of_pair(x_ptrs, R8 * 128 + r * 8, lane)
        A = tl.dot(w, _fragment_of_rows(x, 0), out_dtype=tl.int32)
        S = tl.dot(w, _fragment_of_rows(x, 1), A << 7, out_dtype=tl.int32)  # the sum over X, below 2 ** 26
        new_sums = new_sums + (sums[r] + (s * a) * S.to(tl.float32),)
    return new_sums


@device_function
def _add_blocks(sums, loaded, common, x_ptrs, lane, mask, KIND: tl.constexpr, R8: tl.constexpr):
    """The terms of two blocks whose rows have one plane, added to sums in their order."""
    BITS: tl.constexpr = KIND & 15
    HAS_C: tl.constexpr = (KIND & 16) != 0
    PIECES: tl.constexpr = 2 if BITS == 6 else 1  # of a block: scales of a half each
    SHIFT: tl.constexpr = 0 if HAS_C else 8 - BITS
    MAGIC: tl.constexpr = ROUND_MAGIC / (1 << SHIFT)
    base = tl.full(sums[0].shape, MAGIC_BITS - (SHIFT << 23), tl.int32)
    words = loaded[0][2], loaded[1][2]
    fragments, a, c = (), (), ()
    for part in tl.static_range(2):
        low, high = common[2 * part], common[2 * part + 1]
        for piece in tl.static_range(PIECES):
            only = piece if PIECES == 2 else -1
            fragments = fragments + (fragment_of_columns(loaded[0], loaded[1], mask, part, BITS, not HAS_C, only),)
            a = a + (column_scales(words[0], words[1], low, high, part, piece, 8, False, KIND),)
            if HAS_C:
                c = c + (column_scales(words[0], words[1], low, high, part, piece, 8, True, KIND),)
    new_sums = ()
    for r in tl.static_range(R8):
        x = _load_codes(x_ptrs, r, lane)
        scales = _load_four(x_ptrs, R8 * 128 + r * 16, lane)
        if HAS_C:
            totals = _load_four(x_ptrs, R8 * 144 + r * 16, lane)
        sum_ = sums[r]
        for part in tl.static_range(2):
            s = _of_pair(scales, part)
            xs = _fragment_of_rows(x, part)
            for piece in tl.static_range(PIECES):
                S = tl.dot(fragments[PIECES * part + piece], xs, base, out_dtype=tl.int32)
                term = (s * a[PIECES * part + piece]) * (S.to(tl.float32, bitcast=True) - MAGIC)
                if HAS_C:
                    term = term - (s * c[part]) * _of_pair(totals, part)
                sum_ = sum_ + term
        new_sums = new_sums + (sum_,)
    return new_sums


# ---- rows ----


@device_function
def _load_codes(x_ptrs, r, lane):
    """Eight rows of a step of two segments: two of int32 [G, 32, 4], words of (block or plane, block's half)."""
    offs = (lane * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    return tl.load(x_ptrs[0] + offs + r * 128), tl.load(x_ptrs[1] + offs + r * 128)


@device_function
def _load_four(x_ptrs, at, lane):
    """Two of fp32 [G, 32, 4], of (block, row) for rows 2 t and 2 t + 1."""
    offs = (lane % 4 * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    first, second = tl.load(x_ptrs[0] + offs + at), tl.load(x_ptrs[1] + offs + at)
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@device_function
def _scales_of_pair(x_ptrs, at, lane):
    """Of rows of two planes: fp32 [2 * G, 16, 8]."""
    offs = (lane % 4 * 2)[:, :, None] + tl.arange(0, 2)[None, None, :]
    return _of_all(tl.join(tl.load(x_ptrs[0] + offs + at), tl.load(x_ptrs[1] + offs + at))).to(tl.float32, bitcast=True)


@device_function
def _of_pair(four, PART: tl.constexpr):
    """Of block PART of what _load_four gave: [2 * G, 16, 8], the same for all columns."""
    return _of_all(tl.join(_half(four[0], PART), _half(four[1], PART)))


@device_function
def _half(four, PART: tl.constexpr):
    G: tl.constexpr = four.shape[0]
    first, second = tl.split(tl.permute(tl.reshape(four, [G, 32, 2, 2]), [0, 1, 3, 2]))
    if PART:
        return second
    else:
        return first


@device_function
def _of_all(v):
    """[G, 32, row, segment's half] -> [2 * G, 16, 8], the same for all columns."""
    G: tl.constexpr = v.shape[0]
    v = tl.broadcast_to(tl.reshape(v, [G, 8, 4, 2, 2, 1]), [G, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(v, [4, 0, 5, 1, 2, 3]), [2 * G, 16, 8])


@device_function
def _fragment_of_rows(x, PART: tl.constexpr):
    """Block or plane PART of rows -> int8 [2 * G, 32, 8]."""
    v = tl.join(part_of_rows(x[0], PART, -1), part_of_rows(x[1], PART, -1))
    G: tl.constexpr = v.shape[0]
    v = tl.reshape(v, [G, 8, 4, 2, 4, 2])  # G, g, t, block's half, byte, segment's half
    return tl.reshape(tl.permute(v, [5, 0, 2, 3, 4, 1]), [2 * G, 32, 8])
