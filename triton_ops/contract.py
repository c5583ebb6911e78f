"""The arithmetic contract (docs/arithmetic.md) as Triton device functions: every kernel's sums and roundings are here.

Compile with ``enable_fp_fusion=False``: multiply and add are two roundings unless a line says ``fma``. 16-bit products
are exact in fp32, so for bf16 and fp16 ``fma`` gives the contract's bits (FMA=True); fp32 needs the two steps.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

SEGMENTS = 8  # rule 1
NORM_LANES = 256  # rule 2
CHUNK = 256  # rule 4
GROUP = 16  # output columns that lie together in a packed weight
VECTOR = 8  # consecutive k of one column that a thread loads at once: 16 bytes of a 16-bit weight

LOG2_E = tl.constexpr(float.fromhex("0x1.715476p+0"))
LN2_HI = tl.constexpr(float.fromhex("0x1.63p-1"))
LN2_LO = tl.constexpr(float.fromhex("-0x1.bd0106p-13"))
ROUND_MAGIC = tl.constexpr(float.fromhex("0x1.8p+23"))
# The interpreter cuts fp32 off to bf16 where every GPU rounds; to_dtype rounds by hand there.
INTERPRETED = triton.knobs.runtime.interpret
ROUND_BY_HAND = tl.constexpr(INTERPRETED)


def device_function(function: Callable[..., Any]) -> Any:
    """triton.jit, for what kernels call. The interpreter, which sets itself up anew for every call of a jitted
    function, takes it as it is."""
    return function if INTERPRETED else triton.jit(function)


GELU_SLOPE = tl.constexpr(float.fromhex("0x1.9884533d43651p+0"))
GELU_CUBE = tl.constexpr(0.044715)
EXP_0 = tl.constexpr(float.fromhex("0x1.6db47ep-10"))
EXP_1 = tl.constexpr(float.fromhex("0x1.123b92p-7"))
EXP_2 = tl.constexpr(float.fromhex("0x1.55545ep-5"))
EXP_3 = tl.constexpr(float.fromhex("0x1.55548ep-3"))
EXP_4 = tl.constexpr(float.fromhex("0x1p-1"))
LOG_0 = tl.constexpr(float.fromhex("0x1.1457a2p-4"))
LOG_1 = tl.constexpr(float.fromhex("-0x1.de3c14p-4"))
LOG_2 = tl.constexpr(float.fromhex("0x1.e6f06cp-4"))
LOG_3 = tl.constexpr(float.fromhex("-0x1.fc2208p-4"))
LOG_4 = tl.constexpr(float.fromhex("0x1.233768p-3"))
LOG_5 = tl.constexpr(float.fromhex("-0x1.555c4ep-3"))
LOG_6 = tl.constexpr(float.fromhex("0x1.99a4b6p-3"))
LOG_7 = tl.constexpr(float.fromhex("-0x1.000006p-2"))
LOG_8 = tl.constexpr(float.fromhex("0x1.555548p-2"))
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)


@device_function
def to_dtype(x, dtype: tl.constexpr):
    """fp32 to the model's dtype, to nearest even."""
    if ROUND_BY_HAND and dtype == tl.bfloat16:
        x = _rounded_by_hand(x)
    return x.to(dtype)


@device_function
def rounded(x, dtype: tl.constexpr):
    """The fp32 value that to_dtype makes of an fp32 value."""
    if ROUND_BY_HAND and dtype == tl.bfloat16:  # whose subnormal numbers the interpreter does not widen
        return _rounded_by_hand(x)
    else:
        return to_dtype(x, dtype).to(tl.float32)


@device_function
def _rounded_by_hand(x):
    """To bf16's numbers, in fp32."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, nearest, 0x7FC00000).to(tl.float32, bitcast=True)


# ---- rule 5: exp, silu, gelu, tanh, log ----


@device_function
def _clamp(x, low, high):
    """NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@device_function
def _reduced(x):
    """r, r_error and the integer n of x = n ln 2 + r + r_error."""
    shifted = x * LOG2_E + ROUND_MAGIC
    n = shifted - ROUND_MAGIC
    a = x - n * LN2_HI
    b = n * LN2_LO
    r = a - b
    return r, (a - r) - b, shifted.to(tl.int32, bitcast=True) - 0x4B400000


@device_function
def _exp_polynomial(r):
    """(exp(r) - 1 - r) / r^2."""
    q = EXP_0 * r + EXP_1
    q = q * r + EXP_2
    q = q * r + EXP_3
    return q * r + EXP_4


@device_function
def _exp_of(r, r_error):
    """exp(r + r_error) = mantissa + error."""
    q = _exp_polynomial(r)
    sum_ = 1.0 + r
    sum_error = (1.0 - sum_) + r
    rest = sum_error + (q * (r * r) + r_error)
    mantissa = sum_ + rest
    return mantissa, (sum_ - mantissa) + rest


@device_function
def _exp_parts(x):
    """exp(x) = (mantissa + error) * 2**exponent."""
    r, r_error, exponent = _reduced(x)
    mantissa, error = _exp_of(r, r_error)
    return mantissa, error, exponent


@device_function
def _power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@device_function
def _scale_by_power_of_two(mantissa, n):
    half = n >> 1
    return mantissa * _power_of_two(half) * _power_of_two(n - half)


@device_function
def exp(x):
    mantissa, _, exponent = _exp_parts(_clamp(x, -105.0, 89.0))
    return _scale_by_power_of_two(mantissa, exponent)


@device_function
def silu(x):
    mantissa, error, exponent = _exp_parts(_clamp(-x, -105.0, 128.0))
    y = _logistic_product(x, mantissa, error, exponent)
    y = tl.where(x > 128.0, x, y)
    return tl.where(x < -128.0, -0.0, y)


@device_function
def gelu(x):
    wide = _clamp(x, -11.0, 11.0).to(tl.float64)
    slope = tl.full(wide.shape, GELU_SLOPE, tl.float64)
    cube = tl.full(wide.shape, GELU_CUBE, tl.float64)
    z = (slope * wide) * (1.0 + cube * (wide * wide))
    high = (-z).to(tl.float32)
    low = (-z - high.to(tl.float64)).to(tl.float32)
    rounded_r, r_error, exponent = _reduced(high)
    r = rounded_r + low
    mantissa, error = _exp_of(r, r_error + ((rounded_r - r) + low))
    y = _logistic_product(x, mantissa, error, exponent)
    y = tl.where(x > 11.0, x, y)
    return tl.where(x < -11.0, -0.0, y)


@device_function
def _logistic_product(x, mantissa, error, exponent):
    """x / (1 + (mantissa + error) * 2**exponent)."""
    shift = tl.where(exponent > 64, 64, 0)
    one = tl.where(exponent > 64, 0.0, 1.0)
    power = _scale_by_power_of_two(mantissa, exponent - shift)
    power_error = _scale_by_power_of_two(error, exponent - shift)
    denominator = one + power
    power_part = denominator - one
    sum_error = (one - (denominator - power_part)) + (power - power_part)
    quotient = tl.div_rn(x, denominator)
    y = quotient - tl.div_rn(quotient * (sum_error + power_error), denominator)
    return y * _power_of_two(-shift)


@device_function
def tanh(x):
    bits = x.to(tl.int32, bitcast=True)
    doubled = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True) * 2.0
    r, r_error, exponent = _reduced(tl.where(doubled > 20.0, 20.0, doubled))
    power = _power_of_two(exponent)
    whole = power - 1.0
    part = power * r
    sum_ = whole + part
    rest = ((whole - sum_) + part) + power * (_exp_polynomial(r) * (r * r) + r_error)
    e = sum_ + rest
    e_error = (sum_ - e) + rest
    denominator = 2.0 + e
    e_part = denominator - 2.0
    denominator_error = (2.0 - (denominator - e_part)) + (e - e_part)
    quotient = tl.div_rn(e, denominator)
    y = quotient + tl.div_rn(e_error - quotient * (denominator_error + e_error), denominator)
    return ((y.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (bits & -0x80000000)).to(tl.float32, bitcast=True)


@device_function
def soft_cap(x, cap):
    return cap * tanh(tl.div_rn(x, cap + tl.zeros_like(x)))


@device_function
def log(x):
    subnormal = x < 1.1754943508222875e-38  # 2^-126
    bits = tl.where(subnormal, x * 8388608.0, x).to(tl.int32, bitcast=True)
    f, e = log_parts(bits)
    y = log_of(f, e - tl.where(subnormal, 23.0, 0.0))
    y = tl.where(x == float("inf"), x, y)
    y = tl.where(x == 0.0, -float("inf"), y)
    return tl.where((x < 0.0) | (x != x), float("nan"), y)


@device_function
def log_parts(bits):
    """f in [sqrt(1/2) - 1, sqrt(2) - 1) and e, both fp32: the float with these bits is (1 + f) * 2**e."""
    offset = bits - SQRT_HALF_BITS
    f = ((offset & 0x007FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    return f, (offset >> 23).to(tl.float32)


@device_function
def log_of(f, e):
    """log((1 + f) * 2**e)."""
    square = f * f
    y = LOG_0 * f + LOG_1
    y = y * f + LOG_2
    y = y * f + LOG_3
    y = y * f + LOG_4
    y = y * f + LOG_5
    y = y * f + LOG_6
    y = y * f + LOG_7
    y = y * f + LOG_8
    y = (y * f) * square + e * LN2_LO
    y = y - 0.5 * square
    return (f + y) + e * LN2_HI


# ---- rules 1 and 2: sums in a written order ----


@device_function
def multiply_add(a, b, c, FMA: tl.constexpr):
    """a * b + c: one rounding where the product is exact (16-bit operands), else two."""
    if FMA:
        return tl.fma(a, b, c)
    else:
        return a * b + c


@device_function
def _split8(x):
    """[A, B, 8] -> eight tensors [A, B], of k = 0 .. 7. Values that one thread loaded stay in it."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.reshape(x, [A, B, 2, 2, 2]))
    k04, k26 = tl.split(even)
    k15, k37 = tl.split(odd)
    k0, k4 = tl.split(k04)
    k2, k6 = tl.split(k26)
    k1, k5 = tl.split(k15)
    k3, k7 = tl.split(k37)
    return k0, k1, k2, k3, k4, k5, k6, k7


@device_function
def _add_pairs(partials):
    """[B, 2 * A] -> [B, A]: adjacent pairs."""
    A: tl.constexpr = partials.shape[1] // 2
    B: tl.constexpr = partials.shape[0]
    left, right = tl.split(tl.reshape(partials, [B, A, 2]))
    return left + right


@device_function
def _tree8(partials):
    """[C, 8] -> [C]: ((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7))."""
    C: tl.constexpr = partials.shape[0]
    return tl.reshape(_add_pairs(_add_pairs(_add_pairs(partials))), [C])


@device_function
def packed_offsets(n, steps, C: tl.constexpr, OF: tl.constexpr = 8):
    """Where column n of a packed weight begins (triton_ops/packing.py), plus its first OF segments and eight k.

    n int32 [C], inside the padded columns -> int64 [OF, 8 C]. The threads of a warp are to hold columns of one segment:
    they share their x, and their weights are neighbours. Triton lays threads along the most contiguous dimension first,
    so columns and k are one dimension. Eight of it lie together, whatever the columns are; `make gpu-static` checks the
    layout which comes of it.
    """
    column = (n // 16).to(tl.int64) * (steps * 1024) + n % 16 * 8
    places = tl.reshape(column[:, None] + tl.arange(0, 8)[None, :], [8 * C])
    places = tl.multiple_of(tl.max_contiguous(places, 8), 8)
    return (tl.arange(0, OF) * 128)[:, None] + places[None, :]


@device_function
def wait_for_kernel_ahead():
    """Until all that it wrote is there, and what those before it wrote; then the kernel behind may begin."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@device_function
def dot(
    x_ptrs, w_ptrs, steps,
    ROWS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr, EVEN: tl.constexpr,
    FMA: tl.constexpr, DEPENDENT: tl.constexpr, OF: tl.constexpr = 8,
):  # fmt: skip
    """Rule 1 for ROWS rows and TILES times C columns: a tuple of fp32 [C], tile by tile, row by row.

    OF: segments, 8, or 2 adjacent ones, whose sum is one of the first four of rule 1's tree; pointers are to the first.

    x_ptrs: a tuple of ROWS pointers, each to a row of fp32 [8, steps * 8] (the segments, filled up with zeros);
    w_ptrs: a tuple of TILES times [8, 8 C], packed_offsets of the columns. A thread holds a segment of one column of
    each tile, which share what it loads of x; a step is eight k, 16 bytes of a 16-bit weight. AHEAD steps are on their
    way to the thread's registers while one is used, so that no warp waits for another. EVEN: steps is a multiple of it.

    DEPENDENT: the program may have begun before the kernel ahead of it was done. The first weights, which no kernel
    writes, are asked for; then it waits until all that was written is there, and lets the kernel behind it begin.
    """
    x_offs = tl.arange(0, OF)[:, None, None] * (steps * 8) + tl.arange(0, 8)[None, None, :]
    sums = (tl.zeros([OF, C], tl.float32),) * (TILES * ROWS)
    waiting = ()
    for i in tl.static_range(AHEAD):
        for t in tl.static_range(TILES):
            waiting = waiting + (_load_step(w_ptrs[t], i, steps, EVEN),)
    if DEPENDENT:
        wait_for_kernel_ahead()
    for first in range(0, steps, AHEAD):
        still_waiting = ()
        for i in tl.static_range(AHEAD):
            step = first + i
            xs = ()
            for r in tl.static_range(ROWS):
                if EVEN:
                    xs = xs + (_split8(tl.load(x_ptrs[r] + x_offs + step * 8)),)
                else:
                    xs = xs + (_split8(tl.load(x_ptrs[r] + x_offs + step * 8, mask=step < steps, other=0.0)),)
            new_sums = ()
            for t in tl.static_range(TILES):
                w = _split8(tl.reshape(waiting[i * TILES + t], [OF, C, 8]).to(tl.float32))
                still_waiting = still_waiting + (_load_step(w_ptrs[t], step + AHEAD, steps, EVEN),)
                for r in tl.static_range(ROWS):
                    x = xs[r]
                    sum_ = sums[t * ROWS + r]
                    for k in tl.static_range(8):
                        sum_ = multiply_add(tl.broadcast_to(x[k], [OF, C]), w[k], sum_, FMA)
                    new_sums = new_sums + (sum_,)
            sums = new_sums
        waiting = still_waiting
    y = ()
    for i in tl.static_range(TILES * ROWS):
        if OF == 8:
            y = y + (_tree8(tl.trans(sums[i])),)
        else:
            y = y + (tl.reshape(_add_pairs(tl.trans(sums[i])), [C]),)
    return y


@device_function
def _load_step(w_ptrs, step, steps, EVEN: tl.constexpr):
    """Weights are used once: they leave the caches first. Past the last step: zeros, or, if EVEN, what nobody uses."""
    if EVEN:
        return tl.load(w_ptrs + step * 1024, mask=step < steps, eviction_policy="evict_first")
    else:
        return tl.load(w_ptrs + step * 1024, mask=step < steps, other=0.0, eviction_policy="evict_first")


@device_function
def segment_offset(i, length):
    """Where element i of a row lies among its segments, filled up to a multiple of eight: a dot's x."""
    return i // length * ((length + 7) // 8 * 8) + i % length


@device_function
def norm_rows(
    hidden_ptr, rows, mask_rows, D, weight_ptr, eps, offset, x_ptr, stride_x, ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr, THREADS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Rule 2 for rows int64 [ROWS] of hidden [T, D] -> x fp32, as a dot reads it. Reads past the first-level cache.

    Unless HAS_NORM: the rows as they are. THREADS: of the program. WHOLE: D is a multiple of 64, so that x lies as
    hidden does. Where it is, a thread loads four neighbours of a row, and stores them at once: 16 bytes.
    """
    COLUMNS: tl.constexpr = 4 * THREADS // ROWS
    AT_ONCE: tl.constexpr = 2 if ROUND_BY_HAND else 8 if ROWS == 1 else 16  # 8: one trip for rows of 4,096 numbers
    offs_row = rows[:, None] * D
    if HAS_NORM:
        inv = inverse_norm_of(hidden_ptr, offs_row, mask_rows, D, eps, ROWS)
    length = (D + 7) // 8
    for start in range(0, D, COLUMNS * AT_ONCE):
        xs = _load_lanes(hidden_ptr, offs_row, mask_rows, start, D, COLUMNS, AT_ONCE)
        weights = ()
        if HAS_NORM:
            for i in tl.static_range(AT_ONCE):
                weights = weights + (_load_weights(weight_ptr, mask_rows, start + i * COLUMNS, D, ROWS, COLUMNS),)
        for i in tl.static_range(AT_ONCE):
            offs = start + i * COLUMNS + tl.arange(0, COLUMNS)
            y = xs[i].to(tl.float32)
            if HAS_NORM:
                weight = weights[i].to(tl.float32) + offset
                y = rounded(rounded(y * inv[:, None], xs[i].dtype) * weight, xs[i].dtype)
            mask = mask_rows[:, None] & (offs < D)[None, :]
            if WHOLE:
                tl.store(x_ptr + rows[:, None] * stride_x + offs[None, :], y, mask=mask)
            else:
                tl.store(x_ptr + rows[:, None] * stride_x + segment_offset(offs, length)[None, :], y, mask=mask)


@device_function
def inverse_norm_of(x_ptr, offs_row, mask_rows, D, eps, ROWS: tl.constexpr):
    """1 / sqrt(mean + eps) [ROWS] of D numbers each, from offs_row [ROWS, 1] on. Reads past the first-level cache."""
    sums = tl.zeros([ROWS, 256], tl.float32)
    AT_ONCE: tl.constexpr = 2 if ROUND_BY_HAND else 16 if ROWS == 1 else 4
    for start in range(0, D, 256 * AT_ONCE):
        xs = _load_lanes(x_ptr, offs_row, mask_rows, start, D, 256, AT_ONCE)
        for i in tl.static_range(AT_ONCE):
            x = xs[i].to(tl.float32)
            sums = sums + x * x
    return _inverse_norm(sums, D, eps, ROWS)


@device_function
def _load_lanes(x_ptr, offs_row, mask_rows, start, D, LANES: tl.constexpr, AT_ONCE: tl.constexpr):
    """AT_ONCE times LANES numbers of each row, from ``start`` on, 0 beyond D: all on their way before one is used."""
    xs = ()
    for i in tl.static_range(AT_ONCE):
        offs = start + i * LANES + tl.arange(0, LANES)
        mask = mask_rows[:, None] & (offs < D)[None, :]
        xs = xs + (tl.load(x_ptr + offs_row + offs[None, :], mask=mask, other=0.0, cache_modifier=".cg"),)
    return xs


@device_function
def _load_weights(weight_ptr, mask_rows, start, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A norm's weights [ROWS, COLUMNS], the same for each row: each thread loads those of its own numbers, so that none
    has to be passed to another."""
    offs = start + tl.arange(0, COLUMNS)
    mask = mask_rows[:, None] & (offs < D)[None, :]
    ptrs = weight_ptr + tl.broadcast_to(offs[None, :], [ROWS, COLUMNS])
    return tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".ca")  # as any load, but told apart from a dot's weights


@device_function
def add_normed_rows(
    y_ptr, hidden_ptr, rows, mask_rows, D, weight_ptr, eps, offset, multiplier, slots_ptr, hidden_cache_ptr,
    num_slots, ROWS: tl.constexpr, KEEP: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """hidden = to_dtype(hidden + to_dtype(rms_norm(y) * multiplier)) for rows int64 [ROWS] of y, hidden [T, D]."""
    COLUMNS: tl.constexpr = 4 * THREADS // ROWS
    offs_row = rows[:, None] * D
    inv = inverse_norm_of(y_ptr, offs_row, mask_rows, D, eps, ROWS)
    for start in range(0, D, COLUMNS):
        offs = start + tl.arange(0, COLUMNS)
        mask = mask_rows[:, None] & (offs < D)[None, :]
        y = tl.load(y_ptr + offs_row + offs[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        weight = _load_weights(weight_ptr, mask_rows, start, D, ROWS, COLUMNS).to(tl.float32) + offset
        z = rounded(rounded(y.to(tl.float32) * inv[:, None], y.dtype) * weight, y.dtype)
        residual = tl.load(hidden_ptr + offs_row + offs[None, :], mask=mask, other=0.0).to(tl.float32)
        h = to_dtype(residual + rounded(z * multiplier, y.dtype), y.dtype)
        tl.store(hidden_ptr + offs_row + offs[None, :], h, mask=mask)
        if KEEP:
            slot = tl.load(slots_ptr + rows, mask=mask_rows, other=-1)[:, None]
            kept = mask & (slot >= 0) & (slot < num_slots)
            tl.store(hidden_cache_ptr + slot * D + offs[None, :], h, mask=kept)


@device_function
def _inverse_norm(lanes, D, eps, ROWS: tl.constexpr):
    """256 lanes of squares, fp32 [ROWS, 256] -> 1 / sqrt(mean + eps) [ROWS]."""
    sums = lanes
    for level in tl.static_range(8):
        left, right = tl.split(tl.reshape(sums, [ROWS, 128 >> level, 2]))
        sums = left + right
    mean = tl.div_rn(tl.reshape(sums, [ROWS]), D.to(tl.float32))
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
