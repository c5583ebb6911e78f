"""Rounding a checkpoint's matrices to the types of rule 8 (ops/reference/blocks.py), for the least squared error.

A block's scale is searched: candidates around the one that its largest number asks for, each with the scale that fits
its integers best. What a file stores of it (fp16, six bits) is rounded first, and the integers are chosen after that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from layerskip_kernels.model.finite import LateChecks
from layerskip_kernels.ops.reference import BLOCK_TYPES, has_finite_scales, quantise_int8, quantise_int15

__all__ = ["ON_HOST", "WEIGHT_TYPES", "check_weights", "quantise"]

BY_SEGMENT = {"int8": quantise_int8, "int15": quantise_int15}  # types of our own
WEIGHT_TYPES = (*BY_SEGMENT, *BLOCK_TYPES)
# Those whose scales are fitted with sums, in the order of torch's reductions on the CPU: a GPU's is another. The rest
# divide by a largest magnitude and round, which gives the same bits wherever the numbers are.
ON_HOST = tuple(name for name in BLOCK_TYPES if name != "q8_0")
CANDIDATES = 20  # scales that are tried for a block
SUBS = 8  # blocks of 32 in one of 256


def check_weights(weights: str | None) -> None:
    """Raise ValueError unless ``weights`` is what load_model takes."""
    if weights not in (None, "16bit", *WEIGHT_TYPES):
        raise ValueError(f"weights must be None, '16bit' or one of {', '.join(WEIGHT_TYPES)}, got {weights!r}")


def quantise(weight: Tensor, name: str, checks: LateChecks | None = None) -> Tensor:
    """A matrix [N, K] of finite numbers as the type ``name``: uint8 [N, blocks, bytes], or as quantise_int8 has it.

    Rows that are no whole number of blocks are filled up with zeros. Where ``weight`` is, but for types of ON_HOST,
    which take one of the CPU. Raises ValueError where a block's scale would be beyond fp16, which the type stores it
    in; with ``checks``, not before they are settled.
    """
    if name in BY_SEGMENT:
        return BY_SEGMENT[name](weight)
    kind = BLOCK_TYPES[name]
    filled = torch.nn.functional.pad(weight.float(), (0, -weight.size(1) % kind.size))
    blocks = QUANTISERS[name](filled.unflatten(1, (-1, kind.size)))
    largest = torch.stack(weight.aminmax()).abs().max()

    def refuse() -> None:
        raise ValueError(f"a matrix has numbers up to {largest.item():.3g}, too large for {name}'s fp16 scales")

    if checks is not None:
        checks.add(has_finite_scales(blocks), refuse)
    elif not has_finite_scales(blocks):
        refuse()
    return blocks


class Linear(NamedTuple):
    """x is about ``a * q + b``."""

    a: Tensor  # fp32 [..., 1]
    b: Tensor
    q: Tensor  # [..., L]


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b != 0, a / torch.where(b != 0, b, 1.0), 0.0)


def _bytes(x: Tensor) -> Tensor:
    """The bytes of fp16 numbers [...] -> [..., 2]."""
    return x.half().contiguous()[..., None].view(torch.uint8)


def _as_stored(x: Tensor) -> Tensor:
    return x.half().float()


def _codes(x: Tensor, a: Tensor, b: Tensor | float, low: int, high: int) -> Tensor:
    return _ratio(x - b, a).round().clamp(low, high)


def _symmetric(x: Tensor, low: int, high: int) -> Linear:
    """The best of some scales without an offset; q in low..high."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best = Linear(torch.zeros_like(extreme), torch.zeros_like(extreme), torch.zeros_like(x))
    least = torch.full_like(extreme, torch.inf)
    for shift in torch.linspace(-0.9, 1.1, CANDIDATES):
        q = _codes(x, extreme / (low + shift), 0.0, low, high)
        a = _ratio((x * q).sum(-1, keepdim=True), (q * q).sum(-1, keepdim=True))
        error = (x - a * q).square().sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = Linear(torch.where(better, a, best.a), best.b, torch.where(better, q, best.q))
    return best


def _affine(x: Tensor, high: int, negative_offset: bool) -> Linear:
    """The best of some scales with an offset; q in 0..high."""
    n = x.size(-1)
    bottom, top = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if negative_offset:
        bottom = bottom.clamp(max=0.0)
    best, least = None, torch.full_like(bottom, torch.inf)
    for shift in torch.linspace(-1.0, 1.0, CANDIDATES):
        q = _codes(x, (top - bottom) / (high + shift), bottom, 0, high)
        sum_q, sum_qq, sum_x = (t.sum(-1, keepdim=True) for t in (q, q * q, x))
        sum_qx = (q * x).sum(-1, keepdim=True)
        determinant = n * sum_qq - sum_q.square()
        a = _ratio(n * sum_qx - sum_q * sum_x, determinant)
        b = torch.where(determinant != 0, _ratio(sum_qq * sum_x - sum_q * sum_qx, determinant), sum_x / n)
        if negative_offset:
            a, b = torch.where(b > 0, _ratio(sum_qx, sum_qq), a), b.clamp(max=0.0)
        error = (x - a * q - b).square().sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        found = Linear(a, b, q)
        best = (
            found if best is None else Linear(*(torch.where(better, *pair) for pair in zip(found, best, strict=True)))
        )
    assert best is not None
    return best


# ---- the bytes of each type ----


def _nibbles(q: Tensor) -> Tensor:
    """[..., 2 n] of 0..15 -> [..., n]: the first half in the lower halves."""
    low, high = q.to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def _bit_bytes(bits: Tensor) -> Tensor:
    """[..., 8 n] of 0 and 1 -> [..., n], the lowest bit of a byte first."""
    weights = 1 << torch.arange(8)
    return (bits.long().unflatten(-1, (-1, 8)) * weights).sum(-1).to(torch.uint8)


def _small(x: Tensor, bits: int, offset: bool) -> Tensor:
    """Q4_0, Q4_1, Q5_0, Q5_1."""
    half = 1 << (bits - 1)
    if offset:
        found = _affine(x, 2 * half - 1, negative_offset=False)
        a, b = _as_stored(found.a), _as_stored(found.b)
        u = _codes(x, a, b, 0, 2 * half - 1)
    else:
        a = _as_stored(_symmetric(x, -half, half - 1).a)
        u = _codes(x, a, 0.0, -half, half - 1) + half
    scales = [_bytes(a[..., 0]), *([_bytes(b[..., 0])] if offset else [])]
    u = u.to(torch.uint8)
    return torch.cat([*scales, *([_bit_bytes(u >> 4)] if bits == 5 else []), _nibbles(u & 15)], dim=-1)


def _q8_0(x: Tensor) -> Tensor:
    largest = x.abs().amax(-1, keepdim=True)
    d = _as_stored(largest / torch.full_like(largest, 127.0))  # a tensor: CUDA multiplies by a number's reciprocal
    return torch.cat([_bytes(d[..., 0]), _codes(x, d, 0.0, -127, 127).to(torch.int8).view(torch.uint8)], dim=-1)


def _k_codes(x: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: the sixteen bytes of scales and the codes [N, blocks, 8, 32]."""
    x = x.unflatten(-1, (SUBS, -1))
    found = _affine(x, high, negative_offset=True)
    scales, minima = found.a[..., 0], -found.b[..., 0]
    d, dmin = (_as_stored(s.amax(-1, keepdim=True) / 63.0) for s in (scales, minima))
    sc, m = (_ratio(s, base).round().clamp(0, 63) for s, base in ((scales, d), (minima, dmin)))
    q = _codes(x, (d * sc)[..., None], -(dmin * m)[..., None], 0, high)
    s, m = sc.to(torch.uint8), m.to(torch.uint8)
    packed = [
        s[..., :4] | s[..., 4:] >> 4 << 6,
        m[..., :4] | m[..., 4:] >> 4 << 6,
        s[..., 4:] & 15 | (m[..., 4:] & 15) << 4,
    ]
    return torch.cat([_bytes(d[..., 0]), _bytes(dmin[..., 0]), *packed], dim=-1), q.to(torch.uint8)


def _q4_k(x: Tensor) -> Tensor:
    head, q = _k_codes(x, 15)
    return torch.cat([head, _nibbles(q.unflatten(-2, (4, 2)).flatten(-2)).flatten(-2)], dim=-1)


def _q5_k(x: Tensor) -> Tensor:
    head, q = _k_codes(x, 31)
    high = _bit_bytes((q >> 4).transpose(-1, -2))[..., 0]
    return torch.cat([head, high, _nibbles((q & 15).unflatten(-2, (4, 2)).flatten(-2)).flatten(-2)], dim=-1)


def _q6_k(x: Tensor) -> Tensor:
    x = x.unflatten(-1, (16, 16))
    scales = _symmetric(x, -32, 31).a[..., 0]
    largest = scales.gather(-1, scales.abs().argmax(-1, keepdim=True))
    d = _as_stored(largest / -128.0)
    sc = _ratio(scales, d).round().clamp(-128, 127)
    u = (_codes(x, (d * sc)[..., None], 0.0, -32, 31) + 32).to(torch.uint8).flatten(-2)
    halves = u.unflatten(-1, (2, 4, 32))  # of 128: four runs of 32
    low = torch.cat([halves[..., 0, :] & 15 | (halves[..., 2, :] & 15) << 4,
                     halves[..., 1, :] & 15 | (halves[..., 3, :] & 15) << 4], dim=-1)  # fmt: skip
    high = sum(halves[..., i, :].int() >> 4 << 2 * i for i in range(4))
    assert isinstance(high, Tensor)
    stored = sc.to(torch.int8).view(torch.uint8)
    return torch.cat([low.flatten(-2), high.to(torch.uint8).flatten(-2), stored, _bytes(d[..., 0])], dim=-1)


QUANTISERS = {
    "q4_0": lambda x: _small(x, 4, offset=False),
    "q4_1": lambda x: _small(x, 4, offset=True),
    "q5_0": lambda x: _small(x, 5, offset=False),
    "q5_1": lambda x: _small(x, 5, offset=True),
    "q8_0": _q8_0,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
