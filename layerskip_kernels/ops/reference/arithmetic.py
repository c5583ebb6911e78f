"""The rules of the contract (docs/arithmetic.md): elementary functions, sums in a written order, RoPE."""

import math

import torch
from torch import Tensor

from layerskip_kernels.ops.reference.blocks import SEGMENTS, integer_dot, is_quantised

NORM_LANES = 256

# ---- rule 5: exp, log, silu, gelu, tanh: a fixed sequence of separately rounded fp32 operations ----

LOG2_E = float.fromhex("0x1.715476p+0")
LN2_HI = float.fromhex("0x1.63p-1")
LN2_LO = float.fromhex("-0x1.bd0106p-13")
ROUND_MAGIC = float.fromhex("0x1.8p+23")
EXP_POLYNOMIAL = [
    float.fromhex(c) for c in ("0x1.6db47ep-10", "0x1.123b92p-7", "0x1.55545ep-5", "0x1.55548ep-3", "0x1p-1")
]
LOG_POLYNOMIAL = [
    float.fromhex(c)
    for c in (
        "0x1.1457a2p-4",
        "-0x1.de3c14p-4",
        "0x1.e6f06cp-4",
        "-0x1.fc2208p-4",
        "0x1.233768p-3",
        "-0x1.555c4ep-3",
        "0x1.99a4b6p-3",
        "-0x1.000006p-2",
        "0x1.555548p-2",
    )
]
SQRT_HALF_BITS = 0x3F3504F3
GELU_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)
GELU_CUBE = 0.044715


def _horner(coefficients: list[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _exp_parts(x: Tensor, low: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """exp(x + low) = (mantissa + error) * 2**exponent, x where the exponent fits 9 bits; low: what x lacks."""
    r, r_error, exponent = _reduced(x)
    if low is not None:
        rounded, r = r, r + low
        r_error = r_error + ((rounded - r) + low)
    q = _horner(EXP_POLYNOMIAL, r)
    sum_ = 1.0 + r
    sum_error = (1.0 - sum_) + r
    rest = sum_error + (q * (r * r) + r_error)
    mantissa = sum_ + rest
    return mantissa, (sum_ - mantissa) + rest, exponent


def _reduced(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r, r_error and the integer n of x = n ln 2 + r + r_error."""
    shifted = x * LOG2_E + ROUND_MAGIC
    n = shifted - ROUND_MAGIC
    a = x - n * LN2_HI
    b = n * LN2_LO
    r = a - b
    return r, (a - r) - b, shifted.view(torch.int32) - 0x4B400000


def _power_of_two(n: Tensor) -> Tensor:
    return ((n + 127) << 23).view(torch.float32)


def _scale_by_power_of_two(mantissa: Tensor, n: Tensor) -> Tensor:
    half = n >> 1
    return mantissa * _power_of_two(half) * _power_of_two(n - half)


def exp(x: Tensor) -> Tensor:
    """exp of an fp32 tensor, within 2 ulp (rule 5)."""
    mantissa, _, exponent = _exp_parts(x.clamp(-105.0, 89.0))
    return _scale_by_power_of_two(mantissa, exponent)


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)) of an fp32 tensor, within 2 ulp (rule 5)."""
    y = _logistic_product(x, *_exp_parts((-x).clamp(-105.0, 128.0)))
    y = torch.where(x > 128.0, x, y)
    return torch.where(x < -128.0, -0.0, y)


def gelu(x: Tensor) -> Tensor:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) of an fp32 tensor, within 2 ulp (rule 5).

    That is x / (1 + exp(-z)), z being twice tanh's argument. A large z needs more than fp32's digits: it is computed in
    float64, and its rounding to fp32 is kept.
    """
    wide = x.clamp(-11.0, 11.0).double()
    z = (GELU_SLOPE * wide) * (1.0 + GELU_CUBE * (wide * wide))
    high = (-z).float()
    low = (-z - high.double()).float()
    y = _logistic_product(x, *_exp_parts(high, low))
    y = torch.where(x > 11.0, x, y)
    return torch.where(x < -11.0, -0.0, y)


def _logistic_product(x: Tensor, mantissa: Tensor, error: Tensor, exponent: Tensor) -> Tensor:
    """x / (1 + e) for e = (mantissa + error) * 2**exponent.

    The quotient is corrected once by what rounding the denominator lost; where e would overflow, the denominator is
    held scaled by 2**-64.
    """
    shift = torch.where(exponent > 64, 64, 0).to(torch.int32)
    one = torch.where(exponent > 64, 0.0, 1.0)
    power = _scale_by_power_of_two(mantissa, exponent - shift)
    power_error = _scale_by_power_of_two(error, exponent - shift)
    denominator = one + power
    power_part = denominator - one
    sum_error = (one - (denominator - power_part)) + (power - power_part)
    quotient = x / denominator
    y = quotient - (quotient * (sum_error + power_error)) / denominator
    return y * _power_of_two(-shift)


def tanh(x: Tensor) -> Tensor:
    """tanh of an fp32 tensor, within 2 ulp (rule 5): e / (e + 2) for e = exp(2 |x|) - 1, with x's sign.

    The quotient is corrected once by what rounding e and e + 2 lost.
    """
    r, r_error, exponent = _reduced((x.abs() * 2.0).clamp(max=20.0))
    power = _power_of_two(exponent)
    whole, part = power - 1.0, power * r
    sum_ = whole + part
    rest = ((whole - sum_) + part) + power * (_horner(EXP_POLYNOMIAL, r) * (r * r) + r_error)
    e = sum_ + rest
    e_error = (sum_ - e) + rest
    denominator = 2.0 + e
    e_part = denominator - 2.0
    denominator_error = (2.0 - (denominator - e_part)) + (e - e_part)
    quotient = e / denominator
    y = quotient + (e_error - quotient * (denominator_error + e_error)) / denominator
    return torch.copysign(y, x)


def log(x: Tensor) -> Tensor:
    """Natural logarithm of an fp32 tensor, within 2 ulp (rule 5)."""
    subnormal = x < 2.0**-126
    bits = torch.where(subnormal, x * 2.0**23, x).view(torch.int32)
    f, e = _log_parts(bits)
    y = _log_of(f, e - torch.where(subnormal, 23.0, 0.0))
    y = torch.where(x == torch.inf, x, y)
    y = torch.where(x == 0.0, -torch.inf, y)
    return torch.where((x < 0.0) | x.isnan(), torch.nan, y)


def _log_parts(bits: Tensor) -> tuple[Tensor, Tensor]:
    """f in [sqrt(1/2) - 1, sqrt(2) - 1) and e, both fp32: the float with these bits is (1 + f) * 2**e."""
    offset = bits - SQRT_HALF_BITS
    return ((offset & 0x007FFFFF) + SQRT_HALF_BITS).view(torch.float32) - 1.0, (offset >> 23).to(torch.float32)


def _log_of(f: Tensor, e: Tensor) -> Tensor:
    """log((1 + f) * 2**e)."""
    square = f * f
    y = (_horner(LOG_POLYNOMIAL, f) * f) * square + e * LN2_LO
    y = y - 0.5 * square
    return (f + y) + e * LN2_HI


# ---- rules 1 and 2: sums in a written order ----


def fold(terms: Tensor) -> Tensor:
    """Left fold over the first dimension, from +0.0, each sum rounded to fp32."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def tree(partials: Tensor) -> Tensor:
    """Balanced tree of adjacent pairs over the first dimension (a power of two)."""
    while len(partials) > 1:
        partials = partials[0::2] + partials[1::2]
    return partials[0]


def dot(x: Tensor, weight: Tensor) -> Tensor:
    """Rule 1: ``x`` [T, K] times ``weight`` [N, K] -> fp32 [T, N]; of a quantised weight, rule 8.

    K is cut into eight contiguous segments of ceil(K / 8); each is folded in ascending k; the partials are
    summed in a tree. The zeros that fill the last segments change nothing: a fold from +0.0 is never -0.0.
    """
    if is_quantised(weight):
        return integer_dot(x, weight)
    length = -(-x.size(1) // SEGMENTS)
    padding = (0, SEGMENTS * length - x.size(1))
    x_kST = torch.nn.functional.pad(x.float(), padding).view(-1, SEGMENTS, length).permute(2, 1, 0).contiguous()
    w_kSN = torch.nn.functional.pad(weight.float(), padding).view(-1, SEGMENTS, length).permute(2, 1, 0).contiguous()
    partials_STN = x.new_zeros(SEGMENTS, x.size(0), weight.size(0), dtype=torch.float32)
    for x_ST, w_SN in zip(x_kST, w_kSN, strict=True):
        partials_STN = partials_STN + x_ST[:, :, None] * w_SN[:, None, :]
    return tree(partials_STN)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Rule 1 or 8 with the bias added in fp32 and one rounding to x's dtype: [T, K], packed [N, K], [N] -> [T, N]."""
    y = dot(x, weight)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def inverse_sqrt(x: Tensor) -> Tensor:
    """1 / sqrt of an fp32 tensor, both correctly rounded. PyTorch's fp32 sqrt is not; through float64 it is."""
    return 1.0 / x.double().sqrt().float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Rule 2: x [T, D], weight [D], which counts as weight + offset -> [T, D]."""
    x32 = x.float()
    squares = torch.nn.functional.pad(x32 * x32, (0, -x.size(1) % NORM_LANES))
    lanes = fold(squares.unflatten(1, (-1, NORM_LANES)).transpose(0, 1))
    mean = tree(lanes.T) / x.size(1)
    inv = inverse_sqrt(mean + eps)
    return ((x32 * inv[:, None]).to(x.dtype).float() * (weight.float() + offset)).to(x.dtype)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap) of an fp32 tensor; a cap of 0 is none."""
    return x if cap == 0 else cap * tanh(x / cap)


# ---- rule 3: RoPE ----


def rope_tables(inverse_frequencies: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [num_positions, K / 2], of position times inverse frequency, computed in float64."""
    positions = torch.arange(num_positions, dtype=torch.float64)
    angles = positions[:, None] * inverse_frequencies.double()[None, :]
    return angles.cos().float(), angles.sin().float()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rule 3: rotate x [T, heads, K] by cos, sin [T, R / 2]; the halves of a head's first R numbers are the pairs."""
    rotary_dim = 2 * cos.size(1)
    a, b = x[..., :rotary_dim].float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, x[..., rotary_dim:]], dim=-1)
