"""Rule 8 as Triton device functions: the dot of quantised weights with rows of integers (integer_rows.py).

The tensor cores multiply, batch by batch: the eight segments are the batch, sixteen columns the M side, eight or
sixteen rows the N side, and a block of 32 the K side. What a thread loads is laid out (quantised.py) so that it is the
fragment that ``mma.m16n8k32`` wants of that thread: lane 4 g + t of a warp has, of columns (and of rows) g and g + 8,
the same eight of a block's 32 integers. So all loads are tiles [4, 32, words]: a warp for segments s and s + 4, its
lanes, their words. On other hardware threads exchange what they loaded; the bits are the same.
"""

import triton.language as tl

from .contract import ROUND_MAGIC, _tree8, device_function, dot, packed_offsets, wait_for_kernel_ahead
from .integer_tiles import integer_tiles
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
from .prompt_dot import prompt_dot


@device_function
def products(
    x_ptr, stride_x, rows_ptr, row0, num_rows, w_ptrs, columns, steps,
    KIND: tl.constexpr, GATHER: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
    FMA: tl.constexpr, PROMPT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Rule 1 or rule 8 for ROWS rows and TILES times C columns: a tuple of fp32 [C], tile by tile, row by row.

    PROMPT: a tuple of fp32 [ROWS, C], tile by tile, of rows that are many and turned (prompt_dot.py,
    integer_tiles.py).

    x_ptr: rows as the kind of the weights wants them (Rows.of), row0 .. row0 + ROWS - 1 of ``num_rows``, or those that
    int32 rows_ptr names there (GATHER); beyond the last, the last. w_ptrs: a tuple of packed weights of one kind, one a
    tile; columns: a tuple of int32 [C]; steps: of eight k in a segment, as rule 1 takes them. DEPENDENT: as in dot.
    """
    if PROMPT and KIND == 0:
        return prompt_dot(x_ptr, row0, w_ptrs, columns, steps, ROWS, TILES, C, FMA)
    elif PROMPT:
        return integer_tiles(
            x_ptr, stride_x, row0, w_ptrs, columns, (steps + 3) // 4, KIND, ROWS, TILES, C, EVEN
        )  # fmt: skip
    elif KIND == 0:
        x_ptrs = ()
        for r in tl.static_range(ROWS):
            x_ptrs = x_ptrs + (x_ptr + _row(rows_ptr, row0 + r, num_rows, GATHER) * stride_x,)
        tiles = ()
        for i in tl.static_range(TILES):
            tiles = tiles + (w_ptrs[i] + packed_offsets(columns[i], steps, C),)
        return dot(x_ptrs, tiles, steps, ROWS, TILES, C, AHEAD, EVEN, FMA, DEPENDENT)
    elif ROWS <= 8:
        return integer_dot(
            x_ptr, stride_x, rows_ptr, row0, num_rows, w_ptrs, columns, (steps + 3) // 4, KIND, GATHER,
            ROWS, TILES, EVEN, DEPENDENT,
        )  # fmt: skip
    else:  # one tile after the other: registers do not hold sixteen rows of two
        y = ()
        for i in tl.static_range(TILES):
            y = y + integer_dot(
                x_ptr, stride_x, rows_ptr, row0, num_rows, (w_ptrs[i],), (columns[i],), (steps + 3) // 4, KIND, GATHER,
                ROWS, 1, EVEN, DEPENDENT and i == 0,
            )  # fmt: skip
        return y


@device_function
def _row(rows_ptr, row, num_rows, GATHER: tl.constexpr):
    row = tl.minimum(row, num_rows - 1)
    if GATHER:
        row = tl.load(rows_ptr + row)
    return row.to(tl.int64)


@device_function
def integer_dot(
    x_ptr, stride_x, rows_ptr, row0, num_rows, w_ptrs, columns, length,
    KIND: tl.constexpr, GATHER: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, EVEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Rule 8, as products says; a segment has ``length`` blocks of 32, an even number if EVEN."""
    BITS: tl.constexpr = KIND & 15
    COMMON: tl.constexpr = (KIND & 32) != 0
    BY_SEGMENT: tl.constexpr = (KIND & 64) != 0
    PLANES: tl.constexpr = 2 if (KIND & 128) != 0 else 1
    R: tl.constexpr = 8 if ROWS <= 8 else 16
    HALVES: tl.constexpr = R // 8
    steps = length if BITS == 8 else (length + 1) // 2  # a step has one block of 8 bits or two of fewer

    # 0x0F0F0F0F, unknown to the compiler, which would mask each byte by itself and then put words together again.
    mask = tl.where(stride_x < 0, 0, 0x0F0F0F0F)
    lane = tl.arange(0, 32)
    x_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    segment = tl.arange(0, 4)[:, None]
    four = tl.arange(0, 4)[None, None, :]
    x_codes, x_params = (), ()
    for half in tl.static_range(HALVES):
        row = _row(rows_ptr, row0 + 8 * half + lane // 4, num_rows, GATHER) * stride_x
        x_codes = x_codes + (x_ptr + (row + lane % 4 * 4)[None, :, None] + segment[:, :, None] * 16 + four,)
        for j in tl.static_range(2):
            row = _row(rows_ptr, row0 + 8 * half + lane % 4 * 2 + j, num_rows, GATHER) * stride_x
            x_params = x_params + (x_ptr + row[None, :] + steps * 128,)

    places = ()
    waiting = ()  # a step is on its way while the one before is computed
    for i in tl.static_range(TILES):
        places = places + of_lanes(columns[i])
    for i in tl.static_range(2 * TILES):
        waiting = waiting + (load_step(w_ptrs[i // 2], places[i], segment, 0, steps, KIND),)
    if DEPENDENT:
        wait_for_kernel_ahead()
    if BY_SEGMENT:
        sums = (tl.zeros([8, 16, R], tl.int32),) * ((PLANES + 1) * TILES)
    else:
        sums = (tl.zeros([8, 16, R], tl.float32),) * TILES
    for step in range(0, steps):
        loaded = waiting
        waiting = ()
        for i in tl.static_range(2 * TILES):
            waiting = waiting + (load_step(w_ptrs[i // 2], places[i], segment, step + 1, steps, KIND),)
        x = _load_rows(x_codes, step, HALVES)
        if BY_SEGMENT:
            sums = _add_planes(sums, loaded, x, PLANES, TILES, HALVES)
        elif BITS == 8:
            sums = _add_block_of_planes(sums, loaded, x, x_params, step, KIND, TILES, HALVES)
        else:
            common = ()
            for i in tl.static_range(2 * TILES):
                if COMMON:
                    first = load_common(w_ptrs[i // 2], places[i], segment, step, steps, length, 0, KIND)
                    second = first
                    if not EVEN:  # else both blocks of a step lie in the same 256
                        second = load_common(w_ptrs[i // 2], places[i], segment, step, steps, length, 1, KIND)
                    common = common + (first, second)
                else:
                    common = common + (0, 0)
            sums = _add_blocks(sums, loaded, common, x, x_params, step, steps, mask, KIND, TILES, HALVES)
    y = ()
    for i in tl.static_range(TILES):
        if BY_SEGMENT:
            s = _load_row_scales(x_params, 0, HALVES)
            s = s * segment_scales(w_ptrs[i], places[2 * i], places[2 * i + 1], segment, steps, KIND, R)
            if PLANES == 1:
                total = sums[2 * i].to(tl.float32) * (128.0 * s) + sums[2 * i + 1].to(tl.float32) * s
            else:
                total = sums[3 * i].to(tl.float32) * (16384.0 * s) + sums[3 * i + 1].to(tl.float32) * (128.0 * s)
                total = total + sums[3 * i + 2].to(tl.float32) * s
            total = total + 0.0  # the fold of one term, from +0.0
        else:
            total = sums[i]
        y = y + _rows_of(_tree8(tl.reshape(tl.permute(total, [1, 2, 0]), [16 * R, 8])), R, ROWS)
    return y


@device_function
def _add_planes(sums, loaded, x, PLANES: tl.constexpr, TILES: tl.constexpr, HALVES: tl.constexpr):
    """A block's exact sums by powers of 128, added up over a segment: int32 [8, 16, R], PLANES + 1 of each tile."""
    high = _fragment_of_rows(x, 0, -1, HALVES)
    low = _fragment_of_rows(x, 1, -1, HALVES)
    new_sums = ()
    for i in tl.static_range(TILES):
        w = fragment_of_columns(loaded[2 * i], loaded[2 * i + 1], 0, 0, 8)
        first = tl.dot(w, high, sums[(PLANES + 1) * i], out_dtype=tl.int32)
        second = tl.dot(w, low, sums[(PLANES + 1) * i + 1], out_dtype=tl.int32)
        if PLANES == 1:
            new_sums = new_sums + (first, second)
        else:
            w = fragment_of_columns((loaded[2 * i][1],), (loaded[2 * i + 1][1],), 0, 0, 8)
            second = tl.dot(w, high, second, out_dtype=tl.int32)
            new_sums = new_sums + (first, second, tl.dot(w, low, sums[3 * i + 2], out_dtype=tl.int32))
    return new_sums


@device_function
def _add_block_of_planes(
    sums, loaded, x, x_params, step, KIND: tl.constexpr, TILES: tl.constexpr, HALVES: tl.constexpr
):  # fmt: skip
    """The term of a block whose rows have two planes, added to sums fp32 [8, 16, R]."""
    R: tl.constexpr = 8 * HALVES
    high = _fragment_of_rows(x, 0, -1, HALVES)
    low = _fragment_of_rows(x, 1, -1, HALVES)
    s = _load_row_scales(x_params, step * 8, HALVES)
    base = tl.full([8, 16, R], MAGIC_BITS, tl.int32)
    new_sums = ()
    for i in tl.static_range(TILES):
        w = fragment_of_columns(loaded[2 * i], loaded[2 * i + 1], 0, 0, 8)
        A = tl.dot(w, high, base, out_dtype=tl.int32).to(tl.float32, bitcast=True) - ROUND_MAGIC
        B = tl.dot(w, low, base, out_dtype=tl.int32).to(tl.float32, bitcast=True) - ROUND_MAGIC
        a = column_scales(loaded[2 * i][2], loaded[2 * i + 1][2], 0, 0, 0, 0, R, False, KIND)
        # 128 A is exact, so one rounding makes of both the sum over X.
        new_sums = new_sums + (sums[i] + (s * a) * (A * 128.0 + B),)
    return new_sums


@device_function
def _add_blocks(
    sums, loaded, common, x, x_params, step, steps, mask,
    KIND: tl.constexpr, TILES: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """The terms of two blocks whose rows have one plane, added to sums fp32 [8, 16, R] in their order."""
    BITS: tl.constexpr = KIND & 15
    HAS_C: tl.constexpr = (KIND & 16) != 0
    R: tl.constexpr = 8 * HALVES
    PIECES: tl.constexpr = 2 if BITS == 6 else 1  # of a block: scales of a half each
    OFFSET: tl.constexpr = 0 if HAS_C else 1 << (BITS - 1)  # the code that stands for 0
    params = _load_params(x_params, step * 32, HALVES)
    if PIECES == 2:
        totals = _load_params(x_params, (steps + step) * 32, HALVES)
    for part in tl.static_range(2):
        s = _of_rows(params, 2 * part, HALVES).to(tl.float32, bitcast=True)
        fragments = ()
        for i in tl.static_range(TILES):
            fragments = fragments + (fragment_of_columns(loaded[2 * i], loaded[2 * i + 1], mask, part, BITS),)
        for piece in tl.static_range(PIECES):
            if PIECES == 2:
                total = _of_rows(totals, 2 * part + piece, HALVES)
                xs = _fragment_of_rows(x, part, piece, HALVES)
            else:
                total = _of_rows(params, 2 * part + 1, HALVES)
                xs = _fragment_of_rows(x, part, -1, HALVES)
            base = MAGIC_BITS - OFFSET * total
            new_sums = ()
            for i in tl.static_range(TILES):
                S = tl.dot(fragments[i], xs, base, out_dtype=tl.int32).to(tl.float32, bitcast=True) - ROUND_MAGIC
                words = loaded[2 * i][2], loaded[2 * i + 1][2]
                commons = common[4 * i + part], common[4 * i + 2 + part]
                a = column_scales(words[0], words[1], commons[0], commons[1], part, piece, R, False, KIND)
                term = (s * a) * S
                if HAS_C:
                    c = column_scales(words[0], words[1], commons[0], commons[1], part, piece, R, True, KIND)
                    term = term - (s * c) * total.to(tl.float32)
                new_sums = new_sums + (sums[i] + term,)
            sums = new_sums
    return sums


@device_function
def _rows_of(sums, R: tl.constexpr, ROWS: tl.constexpr):
    """[16 * R], columns first -> a tuple of ROWS of [16]."""
    parts = (tl.reshape(sums, [16, R]),)
    for level in tl.static_range(4):
        parts = _halved(parts, R >> level, ROWS)
    rows = ()
    for r in tl.static_range(ROWS):
        rows = rows + (tl.reshape(parts[r], [16]),)
    return rows


@device_function
def _halved(parts, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Tensors [16, WIDTH] -> their halves one after the other, but for those of rows beyond ROWS."""
    if WIDTH == 1:
        return parts
    else:
        halves = ()
        for i in tl.static_range(len(parts)):
            first, second = tl.split(tl.permute(tl.reshape(parts[i], [16, 2, WIDTH // 2]), [0, 2, 1]))
            halves = halves + (first,)
            if (2 * i + 1) * (WIDTH // 2) < ROWS:
                halves = halves + (second,)
        return halves


# ---- rows ----


@device_function
def _load_rows(x_codes, step, HALVES: tl.constexpr):
    """A tuple by (rows' half, segment's half) of int32 [4, 32, 4]: words of (block or plane, block's half)."""
    words = ()
    for half in tl.static_range(HALVES):
        for s in tl.static_range(2):
            words = words + (tl.load(x_codes[half] + (step * 128 + s * 64)),)
    return words


@device_function
def _fragment_of_rows(x_words, PART: tl.constexpr, PIECE: tl.constexpr, HALVES: tl.constexpr):
    """Block or plane PART of rows -> int8 [8, 32, R]; of PIECE 0 or 1, zeros stand for the other half of a block."""
    v = tl.join(part_of_rows(x_words[0], PART, PIECE), part_of_rows(x_words[1], PART, PIECE))
    if HALVES == 2:
        v = tl.join(v, tl.join(part_of_rows(x_words[2], PART, PIECE), part_of_rows(x_words[3], PART, PIECE)))
    # segment, g, t, block's half, byte; then segment's half and, before it if there are two, ...
    if HALVES == 2:
        v = tl.reshape(v, [4, 8, 4, 2, 4, 2, 2])
        return tl.reshape(tl.permute(v, [5, 0, 2, 3, 4, 6, 1]), [8, 32, 16])
    else:
        v = tl.reshape(v, [4, 8, 4, 2, 4, 2])
        return tl.reshape(tl.permute(v, [5, 0, 2, 3, 4, 1]), [8, 32, 8])


@device_function
def _load_params(x_params, at, HALVES: tl.constexpr):
    """A tuple by (rows' half, row 2 t or 2 t + 1, segment's half) of four words int32 [4, 32] each, flat."""
    segment = tl.arange(0, 4)[:, None]
    four = tl.arange(0, 4)[None, None, :]
    params = ()
    for p in tl.static_range(2 * HALVES):
        for s in tl.static_range(2):
            pointers = x_params[p] + (at + s * 16 + segment * 4)
            even, odd = tl.split(tl.reshape(tl.load(pointers[:, :, None] + four), [4, 32, 2, 2]))
            w0, w2 = tl.split(even)
            w1, w3 = tl.split(odd)
            params = params + (w0, w1, w2, w3)
    return params


@device_function
def _load_row_scales(x_params, at, HALVES: tl.constexpr):
    """Scales of rows of two planes -> fp32 [8, 16, R]."""
    offsets = at + tl.arange(0, 4)[:, None, None] * 2 + tl.arange(0, 2)[None, None, :]
    words = ()
    for p in tl.static_range(2 * HALVES):
        first, second = tl.split(tl.load(x_params[p][:, :, None] + offsets))
        words = words + (first,) * 4 + (second,) * 4
    return _of_rows(words, 0, HALVES).to(tl.float32, bitcast=True)


@device_function
def _of_rows(params, WORD: tl.constexpr, HALVES: tl.constexpr):
    """Word WORD of what _load_params gave -> [8, 16, R], the same for all columns."""
    v = _of_row_half(params, WORD)
    if HALVES == 2:
        v = tl.join(v, _of_row_half(params, 16 + WORD))
    v = tl.reshape(v, [4, 8, 4, 2, 2, HALVES, 1])  # segment, g, t, segment's half, row, rows' half
    v = tl.permute(tl.broadcast_to(v, [4, 8, 4, 2, 2, HALVES, 2]), [3, 0, 6, 1, 5, 2, 4])
    return tl.reshape(v, [8, 16, 8 * HALVES])


@device_function
def _of_row_half(params, WORD: tl.constexpr):
    """[4, 32, segment's half, row]"""
    low = tl.join(params[WORD], params[4 + WORD])
    high = tl.join(params[8 + WORD], params[12 + WORD])
    return tl.join(low, high)
