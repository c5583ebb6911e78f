"""Rule 8: the integer dot. Weights in blocks of integers with scales, activations made integers row by row.

A quantised weight [N, K] is uint8 [N, blocks, bytes of a block], laid out as in a GGUF file; the bytes tell the type
(BLOCK_TYPES). Types of our own have a scale for each of eight segments of a row, whose fp32 bytes end it: ``int8`` is
int8 [N, ceil(K / 32) * 32 + 32], and ``int15`` int16 [N, ceil(K / 32) * 32 + 16], numbers of 15 bits in two planes (see
segment_parts). Where K is no whole number of blocks, the rest are zeros.

In a piece (a block, a half of one, or a segment), element k stands for ``a * q[k] - c``, q an integer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SEGMENTS = 8
BLOCK = 32  # activations share a scale in blocks of this
SMALLEST_MAXIMUM = 2.0**-100  # of a block of activations; below, they count as zeros
SCALE_BYTES = 4 * SEGMENTS  # at the end of a row with scales of segments
LARGEST = {torch.int8: 127, torch.int16: 127 * 128 + 63}  # of the integers that rounding makes


class Pieces(NamedTuple):
    """P pieces of L integers in each row: what a type's bytes say."""

    q: Tensor  # int32 [N, P, L]
    a: Tensor  # fp32 [N, P]
    c: Tensor | None  # fp32 [N, P]; None: all zero


@dataclass(frozen=True)
class BlockType:
    """A type of quantised weights: ``size`` numbers in ``nbytes`` bytes.

    ``planes`` of seven bits are what its activations are rounded to: one beside weights of 4 to 6 bits, whose own
    rounding is coarser, two beside 8 bits. ``fp16``: at which bytes fp16 numbers stand.
    """

    name: str
    size: int
    nbytes: int
    planes: int
    fp16: tuple[int, ...]
    pieces: Callable[[Tensor], Pieces]


def _halves(raw: Tensor) -> Tensor:
    """The fp16 numbers in the last dimension, as fp32."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(qs: Tensor) -> Tensor:
    """bytes [..., n] -> [..., 2 n]: all lower halves, then all upper ones."""
    return torch.cat([qs & 15, qs >> 4], dim=-1).int()


def _bits(qh: Tensor) -> Tensor:
    """bytes [..., n] -> [..., 8 n], the lowest bit of a byte first."""
    return ((qh[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2).int()


def _q4_0(raw: Tensor) -> Pieces:
    return Pieces(_nibbles(raw[..., 2:]) - 8, _halves(raw[..., :2])[..., 0], None)


def _q4_1(raw: Tensor) -> Pieces:
    d, m = _halves(raw[..., :4]).unbind(-1)
    return Pieces(_nibbles(raw[..., 4:]), d, -m)


def _q5_0(raw: Tensor) -> Pieces:
    q = _nibbles(raw[..., 6:]) + 16 * _bits(raw[..., 2:6]) - 16
    return Pieces(q, _halves(raw[..., :2])[..., 0], None)


def _q5_1(raw: Tensor) -> Pieces:
    d, m = _halves(raw[..., :4]).unbind(-1)
    return Pieces(_nibbles(raw[..., 8:]) + 16 * _bits(raw[..., 4:8]), d, -m)


def _q8_0(raw: Tensor) -> Pieces:
    return Pieces(raw[..., 2:].view(torch.int8).int(), _halves(raw[..., :2])[..., 0], None)


def _k_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """a and c [N, 8 * blocks] of Q4_K and Q5_K: eight scales and minima of six bits, times d and dmin."""
    d, dmin = _halves(raw[..., :4]).unbind(-1)
    s = raw[..., 4:16].int()
    low, high, top = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    scales = torch.cat([low & 63, (top & 15) | (low >> 6 << 4)], dim=-1)
    minima = torch.cat([high & 63, (top >> 4) | (high >> 6 << 4)], dim=-1)
    return (d[..., None] * scales).flatten(1), (dmin[..., None] * minima).flatten(1)


def _q4_k(raw: Tensor) -> Pieces:
    q = _nibbles(raw[..., 16:].unflatten(-1, (4, 32)))  # [N, blocks, 4, 64]
    return Pieces(q.reshape(len(raw), -1, BLOCK), *_k_scales(raw))


def _q5_k(raw: Tensor) -> Pieces:
    q = _nibbles(raw[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(2, 3)  # [N, blocks, 8, 32]
    q = q + 16 * _bits(raw[..., 16:48]).unflatten(-1, (32, 8)).transpose(-1, -2)
    return Pieces(q.reshape(len(raw), -1, BLOCK), *_k_scales(raw))


def _q6_k(raw: Tensor) -> Pieces:
    low = _nibbles(raw[..., :128].unflatten(-1, (2, 64)))  # [N, blocks, 2, 128]
    high = raw[..., 128:192].unflatten(-1, (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    q = low + 16 * high.flatten(-2).int() - 32
    a = _halves(raw[..., 208:]) * raw[..., 192:208].view(torch.int8).float()
    return Pieces(q.reshape(len(raw), -1, 16), a.flatten(1), None)


BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        BlockType("q4_0", 32, 18, 1, (0,), _q4_0),
        BlockType("q4_1", 32, 20, 1, (0, 2), _q4_1),
        BlockType("q5_0", 32, 22, 1, (0,), _q5_0),
        BlockType("q5_1", 32, 24, 1, (0, 2), _q5_1),
        BlockType("q8_0", 32, 34, 2, (0,), _q8_0),
        BlockType("q4_k", 256, 144, 1, (0, 2), _q4_k),
        BlockType("q5_k", 256, 176, 1, (0, 2), _q5_k),
        BlockType("q6_k", 256, 210, 1, (208,), _q6_k),
    )
}
_BY_BYTES = {kind.nbytes: kind for kind in BLOCK_TYPES.values()}


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight, packed or not, is multiplied by rule 8."""
    return weight.dtype in (torch.uint8, torch.int8, torch.int16)


def block_type(weight: Tensor) -> BlockType:
    """The type of a row-major weight uint8 [N, blocks, bytes]. Raises ValueError for bytes that no block has."""
    kind = _BY_BYTES.get(weight.size(-1)) if weight.dtype == torch.uint8 and weight.dim() == 3 else None
    if kind is None:
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}, expected uint8 [N, blocks, bytes of a block]")
    return kind


def has_finite_scales(weight: Tensor) -> Tensor:
    """Whether a weight uint8 [N, blocks, bytes] stands for numbers: no scale is a NaN or an infinity. bool []."""
    return torch.stack([_halves(weight[..., at : at + 2]).isfinite().all() for at in block_type(weight).fp16]).all()


# ---- activations ----


class Activations(NamedTuple):
    """Rows as integers: ``x[k]`` stands for ``X[k] * scale`` in its piece."""

    X: Tensor  # int32 [T, P, L]
    scale: Tensor  # fp32 [T, P]


def quantise_rows(x: Tensor, planes: int) -> Activations:
    """x fp32 [T, P, L] -> integers of 7 bits (one plane) or 14 (two), each row and piece by itself.

    One plane: the largest magnitude becomes 127. Two: X is x times a power of two, so that numbers of the model's
    dtype keep their bits down to 2**-13 of the largest. A piece with an infinity or a NaN has scale NaN.
    """
    maximum = x.abs().amax(dim=-1)
    finite = maximum.isfinite()
    if planes == 1:
        bounded = torch.where(finite, maximum, 1.0).clamp(min=SMALLEST_MAXIMUM)
        largest = torch.full_like(bounded, 127.0)  # a tensor: torch would multiply a number by the reciprocal
        scale, inverse = bounded / largest, largest / bounded
    else:
        exponent = (torch.where(finite, maximum, 1.0).view(torch.int32) >> 23).clamp(min=14)
        scale = ((exponent - 12) << 23).view(torch.float32)
        inverse = ((266 - exponent) << 23).view(torch.float32)
    X = (torch.where(finite[..., None], x, 0.0) * inverse[..., None]).round().int()
    return Activations(X, torch.where(finite, scale, torch.nan))


def planes_of(X: Tensor) -> tuple[Tensor, Tensor]:
    """high and low of two planes: X = 128 * high + low, with low in -64..63."""
    high = (X + 64) >> 7
    return high, X - (high << 7)


# ---- the dot ----


def integer_dot(x: Tensor, weight: Tensor) -> Tensor:
    """Rule 8: x [T, K] times a quantised weight [N, K] -> fp32 [T, N]."""
    return _block_dot(x.float(), weight) if weight.dtype == torch.uint8 else _segment_dot(x.float(), weight)


def _block_dot(x: Tensor, weight: Tensor) -> Tensor:
    """A term for each piece: ``fl(fl(a*s) * S) - fl(fl(c*s) * T)`` with S = sum of q*X, T = sum of X; folded."""
    kind = block_type(weight)
    pieces = kind.pieces(weight)
    X, s_TP = quantise_rows(_padded(x, weight.size(1) * kind.size).unflatten(1, (-1, BLOCK)), kind.planes)
    X, s_TP = X.reshape(len(x), -1, pieces.q.size(2)), s_TP.repeat_interleave(BLOCK // pieces.q.size(2), dim=1)
    terms_PTN = (s_TP.T[:, :, None] * pieces.a.T[:, None, :]) * _exact_sums(X, pieces.q).float()
    if pieces.c is not None:
        terms_PTN -= (s_TP.T[:, :, None] * pieces.c.T[:, None, :]) * X.sum(-1).float().T[:, :, None]
    length = -(-weight.size(1) * kind.size // (BLOCK * SEGMENTS)) * (BLOCK // pieces.q.size(2))
    padding = (0, 0, 0, 0, 0, SEGMENTS * length - len(terms_PTN))
    return _folded(torch.nn.functional.pad(terms_PTN, padding).unflatten(0, (SEGMENTS, length)))


def _segment_dot(x: Tensor, weight: Tensor) -> Tensor:
    """A term for each segment, of the planes of weights and rows multiplied as polynomials in 128, s = fl(a*scale).

    int8: ``fl(A * fl(128*s)) + fl(B*s)``, A and B its sums with the rows' planes. int15 the same with three:
    ``fl(A * fl(16384*s)) + fl(B * fl(128*s)) + fl(C*s)``, B the sum of what has one high and one low plane.
    """
    planes, scales = segment_parts(weight)
    X, s_TS = quantise_rows(_padded(x, SEGMENTS * planes[0].size(2)).view(len(x), SEGMENTS, -1), 2)
    sums = [torch.zeros(())] * (len(planes) + 1)
    for i, q in enumerate(planes):
        for j, plane in enumerate(planes_of(X)):
            sums[i + j] = sums[i + j] + _exact_sums(plane, q)
    s = s_TS.T[:, :, None] * scales.T[:, None, :]
    powers = [128.0**power for power in range(len(planes), -1, -1)]
    term, *others = (total.float() * (power * s) for total, power in zip(sums, powers, strict=True))
    for other in others:
        term = term + other
    return _folded(term[:, None])


def _padded(x: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, size - x.size(1)))


def _exact_sums(X: Tensor, q: Tensor) -> Tensor:
    """int [T, P, L], int [N, P, L] -> [P, T, N]: integers below 2**53, so float64 holds them in any order."""
    return X.double().transpose(0, 1) @ q.double().permute(1, 2, 0)


def _folded(terms_SLTN: Tensor) -> Tensor:
    """Each segment's terms from +0.0 in ascending order, then the tree of rule 1."""
    partials = torch.zeros_like(terms_SLTN[:, 0])
    for terms in terms_SLTN.unbind(1):
        partials = partials + terms
    while len(partials) > 1:
        partials = partials[0::2] + partials[1::2]
    return partials[0]


# ---- what weights stand for, and the types with scales of segments ----


def dequantise(weight: Tensor, hidden_size: int) -> Tensor:
    """The numbers a quantised weight stands for, ``fl(fl(a*q) - c)``: fp32 [N, hidden_size].

    Takes several times the memory of the result.
    """
    if weight.dtype != torch.uint8:
        (high, *low), scales = segment_parts(weight)
        q = 128 * high + low[0] if low else high
        return (q * scales[:, :, None]).flatten(1)[:, :hidden_size]
    q, a, c = block_type(weight).pieces(weight)
    values = a[:, :, None] * q
    return (values if c is None else values - c[:, :, None]).flatten(1)[:, :hidden_size]


def quantise_int8(weight: Tensor) -> Tensor:
    """A linear weight [N, K] as ``int8``: -127..127 with one scale for each row and segment, its largest / 127.

    A segment is ceil(ceil(K / 32) / 8) blocks of 32.
    """
    q, scales = _rounded_segments(weight, torch.int8)
    return torch.cat([q.to(torch.int8), scales.view(torch.int8)], dim=1)


def quantise_int15(weight: Tensor) -> Tensor:
    """The same as ``int15``: -16319..16319, and a scale of the largest / 16319."""
    q, scales = _rounded_segments(weight, torch.int16)
    q = q.int() + 64
    return torch.cat([(q >> 7 << 8 | q & 127).to(torch.int16), scales.view(torch.int16)], dim=1)


def _rounded_segments(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The integers fp32 [N, K in whole blocks] and the scales fp32 [N, 8]."""
    N, K = weight.shape
    blocks = -(-K // BLOCK)
    segments = _padded(weight.float(), SEGMENTS * -(-blocks // SEGMENTS) * BLOCK).view(N, SEGMENTS, -1)
    maxima = segments.abs().amax(dim=2)
    scales = maxima / torch.full_like(maxima, LARGEST[dtype])  # a tensor: CUDA multiplies by a number's reciprocal
    safe = torch.where(scales > 0, scales, 1.0)
    integers = (segments / safe[:, :, None]).round().clamp(-LARGEST[dtype], LARGEST[dtype])
    return integers.view(N, -1)[:, : blocks * BLOCK], scales


def segment_parts(weight: Tensor) -> tuple[list[Tensor], Tensor]:
    """The planes int32 [N, 8, L], the highest first, and the scales fp32 [N, 8] of an int8 or int15 weight.

    int8 has one. A number of int15 is 128 * high + low: high its word's upper byte, low, -64..63, the lower one's seven
    bits less 64.
    """
    codes, scales = weight.split([weight.size(1) - SCALE_BYTES // weight.itemsize, SCALE_BYTES // weight.itemsize], 1)
    planes = [codes.int()] if weight.dtype == torch.int8 else [codes.int() >> 8, (codes.int() & 127) - 64]
    length = -(-codes.size(1) // (SEGMENTS * BLOCK)) * BLOCK
    filled = [_padded(plane, SEGMENTS * length).view(len(weight), SEGMENTS, length) for plane in planes]
    return filled, scales.contiguous().view(torch.float32)
