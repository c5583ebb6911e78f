"""Rule 1 for many rows at once: a tile of rows and columns shares what it loads of both, as a prompt's rows may.

A segment after the other, each one chain of fma from zero; the tree over the eight is added up on the way, so that no
more than four tiles of sums are held. The products of 16-bit numbers are exact in fp32. Weights are those of
packing.py: eight k of a column are the 16 bytes that a thread loads, sixteen columns of a segment 256 bytes in a row.

Columns are the dot's M side, rows its N side: the lanes of a warp share what they read of weights, which lie k by k in
shared memory, and read neighbouring rows, which are turned for that beforehand (prompt_rows.py). The other way round,
lanes would read columns 256 bytes apart, from one bank of shared memory: sixteen cycles a load.

In fp32, whose products are rounded before they are added, no dot is what rule 1 says: there threads multiply and add
themselves, sixteen sums of four columns and four rows together, as a dot would have them.
"""

import triton.language as tl

from .contract import INTERPRETED, _split8, device_function

CHAIN_BY_HAND = tl.constexpr(INTERPRETED)


@device_function
def prompt_dot(
    x_ptr, row0, w_ptrs, columns, steps, ROWS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, FMA: tl.constexpr
):  # fmt: skip
    """Rule 1 for ROWS rows and TILES (one or two) times C columns: a tuple of fp32 [ROWS, C].

    x_ptr: rows as prompt_rows.py leaves them, of which these begin with row0. w_ptrs: a tuple of packed weights in the
    model's dtype, one a tile; columns: a tuple of int32 [C]. Two tiles lie column by column beside each other, so that
    a thread has both sums of a pair. FMA: products are exact.
    """
    N: tl.constexpr = TILES * C
    if TILES == 2:
        n = tl.reshape(tl.join(columns[0], columns[1]), [N])
        w_ptr = tl.where(tl.arange(0, N) % 2 == 0, w_ptrs[0], w_ptrs[1])
    else:
        n = columns[0]
        w_ptr = w_ptrs[0]
    tile_ptrs = w_ptr + ((n // 16).to(tl.int64) * (steps * 1024) + n % 16 * 8)
    tile_ptrs = tile_ptrs[:, None, None] + tl.arange(0, 8)[None, None, :]
    x_ptrs = x_ptr + row0 * (steps * 64) + tl.arange(0, ROWS)[None, :]

    y = tl.zeros([N, ROWS], tl.float32)
    for i in range(2):
        half = tl.zeros([N, ROWS], tl.float32)
        for j in range(2):
            quarter = tl.zeros([N, ROWS], tl.float32)
            for k in range(2):
                segment = i * 4 + j * 2 + k
                x_of_segment, w_of_segment = x_ptrs + segment * (steps * 8 * ROWS), tile_ptrs + segment * 128
                if FMA:
                    sums = _segment(x_of_segment, w_of_segment, steps, N, ROWS)
                else:
                    sums = _segment_rounded_twice(x_of_segment, w_of_segment, steps, N, ROWS)
                quarter = tl.where(k == 0, sums, quarter + sums)
            half = tl.where(j == 0, quarter, half + quarter)
        y = tl.where(i == 0, half, y + half)
    if TILES == 2:
        first, second = tl.split(tl.permute(tl.reshape(y, [C, 2, ROWS]), [0, 2, 1]))
        return tl.trans(first), tl.trans(second)
    else:
        return (tl.trans(y),)


@device_function
def _segment(x_ptrs, w_ptrs, steps, N: tl.constexpr, ROWS: tl.constexpr):
    """The sums of one segment fp32 [N, ROWS]: x_ptrs [1, ROWS] and w_ptrs [N, 1, 8] are where it begins.

    What is multiplied next is on its way to the registers meanwhile.
    """
    sums = tl.zeros([N, ROWS], tl.float32)
    x = _load_rows(x_ptrs, 0, steps, ROWS)
    w = _load_columns(w_ptrs, 0, steps, N)
    for step in range(0, steps, 2):  # a dot takes sixteen k at least
        next_x = _load_rows(x_ptrs, step + 2, steps, ROWS)
        next_w = _load_columns(w_ptrs, step + 2, steps, N)
        sums = add_products(sums, w.to(tl.float32), x, N, ROWS)
        x = next_x
        w = next_w
    return sums


@device_function
def _segment_rounded_twice(x_ptrs, w_ptrs, steps, N: tl.constexpr, ROWS: tl.constexpr):
    """The same where products are rounded before they are added."""
    sums = tl.zeros([N, ROWS], tl.float32)
    if not CHAIN_BY_HAND:  # of zeros, which changes nothing but which sums a thread has
        sums = tl.dot(tl.zeros([N, 16], tl.float32), tl.zeros([16, ROWS], tl.float32), sums, input_precision="ieee")
    for step in range(0, steps):
        w = _split8(tl.load(w_ptrs + step * 1024))
        for k in tl.static_range(8):
            x = tl.load(x_ptrs + (step * 8 + k) * ROWS)
            sums = sums + tl.broadcast_to(w[k], sums.shape) * tl.broadcast_to(x, sums.shape)
    return sums


@device_function
def _load_rows(x_ptrs, step, steps, ROWS: tl.constexpr):
    """[16, ROWS] of a segment, from a step on: zeros beyond its last."""
    k = step * 8 + tl.arange(0, 16)
    return tl.load(x_ptrs + (k * ROWS)[:, None], mask=(k < steps * 8)[:, None], other=0.0)


@device_function
def _load_columns(w_ptrs, step, steps, N: tl.constexpr):
    """[N, 16], the same."""
    at = step + tl.arange(0, 2)
    w = tl.load(w_ptrs + (at * 1024)[None, :, None], mask=(at < steps)[None, :, None], other=0.0)
    return tl.reshape(w, [N, 16])


@device_function
def add_products(sums, w, x, N: tl.constexpr, ROWS: tl.constexpr):
    """sums [N, ROWS] + w [N, 16] times x [16, ROWS], all fp32 with exact products: one k after the other, upwards.

    That is what Triton makes of a dot of fp32 numbers on NVIDIA's GPUs: its PTX is run and compared with rule 1
    (benchmarks/compile_only/prompt_check.py). The interpreter's dot is NumPy's, whose order is another: there the chain
    is written out.
    """
    if CHAIN_BY_HAND:
        first_w, second_w = _halves(w, N)
        first_x, second_x = _halves(tl.trans(x), ROWS)
        sums = _chain(sums, _split8(first_w), _split8(first_x), ROWS)
        return _chain(sums, _split8(second_w), _split8(second_x), ROWS)
    else:
        return tl.dot(w, x, sums, input_precision="ieee")


@device_function
def _halves(x, M: tl.constexpr):
    """[M, 16] -> k = 0 .. 7 and k = 8 .. 15, [M, 1, 8] each."""
    first, second = tl.split(tl.permute(tl.reshape(x, [M, 2, 8]), [0, 2, 1]))
    return tl.reshape(first, [M, 1, 8]), tl.reshape(second, [M, 1, 8])


@device_function
def _chain(sums, w, x, ROWS: tl.constexpr):
    """w: eight [N, 1]; x: eight [ROWS, 1]."""
    for k in tl.static_range(8):
        sums = tl.fma(tl.broadcast_to(w[k], sums.shape), tl.broadcast_to(tl.reshape(x[k], [1, ROWS]), sums.shape), sums)
    return sums


@device_function
def row_of(row0, r, ROWS: tl.constexpr, PROMPT: tl.constexpr):
    """Row r of a program's, to which the r-th sums of ``products`` belong; in a prompt all of them, int64 [ROWS, 1]."""
    if PROMPT:
        return row0 + tl.arange(0, ROWS)[:, None]
    else:
        return row0 + r
