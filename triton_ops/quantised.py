"""Quantised weights (rule 8) as the kernels stream them.

Sixteen columns lie together, and of them step by step: two blocks of 32 in each of the eight segments, or one of 8-bit
codes. A step holds [4, 16, 4, 16] bytes of codes (segments s and s + 4; columns; lanes t; then segment, half of the
block, k = 4 t + 0 .. 3, with the second block in the upper half of each byte), the codes' fifth and sixth bits, a word
or two of scales for each column and pair of segments, and, where scales are products, numbers of 256 weights each. A
packed weight is uint8 [ceil(N / 16), steps, bytes of a step]: those bytes tell the type. Ours, ``int8`` and ``int15``,
are int8 [ceil(N / 16), 8 * steps + 1, 512] and int16 [ceil(N / 16), 16 * steps + 1, 256], whose last 512 bytes are the
scales; a step of int15 holds the codes of the high plane and then those of the low one, both signed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import GROUP, SEGMENTS
from .launch import blocks, is_quantised

__all__ = [
    "BLOCK", "ONE_PLANE", "TWO_PLANES", "TWO_PLANES_BY_SEGMENT", "Kind", "code_of", "kind_of",
    "pack_quantised", "segment_blocks", "select_quantised_rows",
]  # fmt: skip

BLOCK = 32
ONE_PLANE, TWO_PLANES, TWO_PLANES_BY_SEGMENT = 0, 1, 2  # what rows are rounded to
UNIT = 512  # bytes of which there are whole numbers in a packed weight of ours


@dataclass(frozen=True)
class Kind:
    """A type of quantised weights.

    bits of a code; has_c: a code stands for a * code - c, else for a * (code - half of their number); common: scales
    are products with a number of 256 weights; at: where a block's first bytes (of a GGUF file) keep its fp16 numbers,
    scales, fifth or sixth bits, and codes; planes: of weights whose scales are a segment's.
    """

    name: str
    bits: int
    has_c: bool = False
    common: bool = False
    planes: int = 0
    file_bytes: int = 0
    high_at: int = 0
    codes_at: int = 0

    @property
    def by_segment(self) -> bool:
        return self.planes > 0

    @property
    def dtype(self) -> torch.dtype:
        """Of a packed weight."""
        return (torch.uint8, torch.int8, torch.int16)[self.planes]

    @property
    def form(self) -> int:
        if self.by_segment:
            return TWO_PLANES_BY_SEGMENT
        return TWO_PLANES if self.bits == 8 else ONE_PLANE

    @property
    def parts(self) -> int:
        """Blocks of a segment in a step."""
        return 1 if self.bits == 8 else 2

    @property
    def regions(self) -> list[tuple[int, int]]:
        """A step's bytes as [first, 16 columns, last], one after the other."""
        regions = [(4, 64)] * max(1, self.planes)
        if 4 < self.bits < 8:
            regions.append((4, 16 * (self.bits - 4)))
        if self.common:
            regions += [(4, 8), (2, 2 + 2 * self.has_c)]
        elif not self.by_segment:
            regions.append((4, 4 * self.parts * (1 + self.has_c)))
        return regions

    @property
    def step_bytes(self) -> int:
        return sum(first * GROUP * last for first, last in self.regions)

    def packed_shape(self, n: int, k: int) -> tuple[int, int, int]:
        """Of a weight [n, k]."""
        steps = blocks(segment_blocks(k), self.parts)
        if self.by_segment:
            return blocks(n, GROUP), self.step_bytes // UNIT * steps + 1, UNIT // self.planes
        return blocks(n, GROUP), steps, self.step_bytes

    @property
    def code(self) -> int:
        """As the kernels take it: integer_dot's KIND."""
        flags = 16 * self.has_c + 32 * self.common + 64 * self.by_segment + 128 * (self.planes == 2)
        return self.bits + flags + 256 * (self.step_bytes // 4)


BY_SEGMENT = (Kind("int8", 8, planes=1), Kind("int15", 8, planes=2))
KINDS = (
    Kind("q4_0", 4, file_bytes=18, codes_at=2),
    Kind("q4_1", 4, has_c=True, file_bytes=20, codes_at=4),
    Kind("q5_0", 5, file_bytes=22, high_at=2, codes_at=6),
    Kind("q5_1", 5, has_c=True, file_bytes=24, high_at=4, codes_at=8),
    Kind("q8_0", 8, file_bytes=34, codes_at=2),
    Kind("q4_k", 4, has_c=True, common=True, file_bytes=144, codes_at=16),
    Kind("q5_k", 5, has_c=True, common=True, file_bytes=176, high_at=16, codes_at=48),
    Kind("q6_k", 6, common=True, file_bytes=210, high_at=128),
)
_BY_FILE_BYTES = {kind.file_bytes: kind for kind in KINDS}
_BY_STEP_BYTES = {kind.step_bytes: kind for kind in KINDS}


def kind_of(packed: Tensor) -> Kind:
    """The type of a packed quantised weight. Raises ValueError for what pack_quantised did not make."""
    kind = _of_segments(packed.dtype) or _BY_STEP_BYTES.get(packed.size(-1))
    if kind is None or packed.dim() != 3:
        raise ValueError(f"no packed weight of a known type: {packed.dtype} {list(packed.shape)}")
    return kind


def _of_segments(dtype: torch.dtype) -> Kind | None:
    return next((kind for kind in BY_SEGMENT if kind.dtype == dtype), None)


def code_of(weight: Tensor) -> int:
    """integer_dot's KIND of a packed weight: 0 for the model's dtype."""
    return kind_of(weight).code if is_quantised(weight) else 0


def segment_blocks(k: int) -> int:
    """Blocks in a segment of k inputs: as many for all types, filled up with zeros."""
    return blocks(k, BLOCK * SEGMENTS)


# ---- packing ----


def _nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., n] -> [..., 2 n]: all lower halves, then all upper ones."""
    return torch.cat([codes & 15, codes >> 4], dim=-1)


def _bits(raw: Tensor) -> Tensor:
    """uint8 [..., n] -> [..., 8 n], the lowest bit of a byte first."""
    return (raw[..., None] >> torch.arange(8, dtype=torch.uint8, device=raw.device) & 1).flatten(-2)


def _codes(kind: Kind, raw: Tensor) -> Tensor:
    """The codes of a file's blocks uint8 [N, blocks, bytes], from 0 on but for those of 8 bits: [N, blocks, 32]."""
    n = len(raw)
    low = raw[..., kind.codes_at :]
    if kind.bits == 8:
        codes = low
    elif not kind.common:
        codes = _nibbles(low)
        if kind.bits == 5:
            codes = codes + 16 * _bits(raw[..., kind.high_at : kind.codes_at])
    elif kind.bits == 6:
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=raw.device)[:, None]
        high = raw[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts & 3  # [N, blocks, 2, 4, 32]
        codes = _nibbles(raw[..., :128].unflatten(-1, (2, 64))) + 16 * high.flatten(-2)
    else:
        codes = _nibbles(low.unflatten(-1, (4, 32)))
        if kind.bits == 5:
            high = _bits(raw[..., kind.high_at : kind.codes_at]).unflatten(-1, (32, 8)).transpose(-1, -2)
            codes = codes + 16 * high.reshape(n, -1, 4, 64)
    return codes.reshape(n, -1, BLOCK)


def _block_scales(kind: Kind, raw: Tensor) -> Tensor:
    """What each block of 32 keeps beside its codes: uint8 [N, blocks of 32, bytes]."""
    if not kind.common:
        return raw[..., : 2 + 2 * kind.has_c]
    if kind.bits == 6:
        return raw[..., 192:208].reshape(len(raw), -1, 2)
    low, middle, top = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    scales = torch.cat([low & 63, (top & 15) | (low >> 6 << 4)], dim=-1)
    minima = torch.cat([middle & 63, (top >> 4) | (middle >> 6 << 4)], dim=-1)
    return torch.stack([scales, minima], dim=-1).reshape(len(raw), -1, 2)


def _filled(x: Tensor, length: int, parts: int) -> Tensor:
    """[N, blocks, ...] -> [N, segment's half 2, 4 segments, steps, parts, ...], zeros where there is no block."""
    x = torch.nn.functional.pad(x, (0, 0, 0, SEGMENTS * length - x.size(1))).unflatten(1, (2, 4, length))
    steps = blocks(length, parts)
    return torch.nn.functional.pad(x, (0, 0, 0, steps * parts - length)).unflatten(3, (steps, parts))


def _images(kind: Kind, codes: Tensor, scales: Tensor | None, common: Tensor | None) -> Tensor:
    """Rows as they lie in a packed weight, without their neighbours: uint8 [N, steps, bytes of a step / 16]."""
    n, length = len(codes), blocks(codes.size(1), SEGMENTS)
    # [N, segment's half, 4, steps, parts, block's half, t, 4], the parts then last, t before the halves
    c = _filled(codes, length, kind.parts).unflatten(-1, (2, 4, 4)).permute(0, 3, 2, 6, 1, 5, 7, 4)
    steps = c.size(1)
    if kind.bits == 8:
        regions = [c]
    else:
        regions = [(c[..., 0] & 15) | (c[..., 1] & 15) << 4]
        high = c >> 4
        at = torch.arange(4, dtype=torch.uint8, device=c.device).view(2, 1, 2) * (kind.bits - 4)  # block's half, part
        if kind.bits == 5:
            of_segment = torch.tensor([0, 4], dtype=torch.uint8, device=c.device).view(2, 1, 1, 1)
            regions.append((high << at << of_segment).sum((-1, -3, -4), dtype=torch.uint8))
        elif kind.bits == 6:
            regions.append((high << at).sum((-1, -3), dtype=torch.uint8))
    if scales is not None:  # [N, segment's half, 4, steps, parts, bytes] -> [N, steps, 4, segment's half, parts, bytes]
        regions.append(_filled(scales, length, kind.parts).permute(0, 3, 2, 1, 4, 5))
    if common is not None:
        regions.append(torch.nn.functional.pad(common, (0, 0, 0, 2 * steps - common.size(1))))
    return torch.cat([region.reshape(n, steps, -1) for region in regions], dim=-1)


def _grouped(images: Tensor, regions: list[tuple[int, int]]) -> Tensor:
    """Rows' images [N, steps, bytes] -> [ceil(N / 16), steps, 16 * bytes]; rows that are missing are zeros."""
    images = torch.nn.functional.pad(images, (0, 0, 0, 0, 0, -len(images) % GROUP)).unflatten(0, (-1, GROUP))
    pieces = images.split([first * last for first, last in regions], dim=-1)
    return torch.cat(
        [
            piece.unflatten(-1, (first, last)).permute(0, 2, 3, 1, 4).flatten(2)
            for piece, (first, last) in zip(pieces, regions, strict=True)
        ],
        dim=-1,
    ).contiguous()


def _images_of(packed: Tensor, rows: Tensor, regions: list[tuple[int, int]]) -> Tensor:
    """The images of some rows of a packed weight."""
    pieces = packed[rows // GROUP].split([first * GROUP * last for first, last in regions], dim=-1)
    place, number = rows % GROUP, torch.arange(len(rows), device=packed.device)
    return torch.cat(
        [
            piece.unflatten(-1, (first, GROUP, last))[number, :, :, place].flatten(2)
            for piece, (first, last) in zip(pieces, regions, strict=True)
        ],
        dim=-1,
    )


SCALE_REGION = [(4, 8)]  # of a segment's scales: a column's in segments s and s + 4


def pack_quantised(weight: Tensor) -> Tensor:
    """A row-major weight as the reference has it -> packed, on the same device. Raises ValueError for another."""
    of_segments = _of_segments(weight.dtype)
    if of_segments is not None:
        scales = 4 * SEGMENTS // weight.itemsize
        if weight.dim() != 2 or weight.size(1) < BLOCK + scales or (weight.size(1) - scales) % BLOCK:
            raise ValueError(
                f"weight is {weight.dtype} {list(weight.shape)}, expected [N, K + {scales}] with whole blocks of 32"
            )
        return _pack_segments(of_segments, weight)
    kind = _BY_FILE_BYTES.get(weight.size(-1)) if weight.dim() == 3 else None
    if kind is None:
        raise ValueError(
            f"weight is uint8 {list(weight.shape)}, blocks of {weight.size(-1)} bytes, which no known type has"
        )
    common = None
    if kind.common:
        common = weight[..., 208:] if kind.bits == 6 else weight[..., :4]
    return _grouped(_images(kind, _codes(kind, weight), _block_scales(kind, weight), common), kind.regions)


def _pack_segments(kind: Kind, weight: Tensor) -> Tensor:
    n, at = len(weight), weight.size(1) - 4 * SEGMENTS // weight.itemsize
    codes, scales = weight[:, :at], weight[:, at:].contiguous().view(torch.uint8).view(n, 2, 4, 4)
    planes = [codes] if kind.planes == 1 else [codes >> 8, (codes & 127) - 64]
    images = [
        _images(kind, plane.to(torch.int8).view(torch.uint8).reshape(n, -1, BLOCK), None, None) for plane in planes
    ]
    packed = _grouped(torch.cat(images, dim=-1), kind.regions)
    tail = _grouped(scales.transpose(1, 2).reshape(n, 1, 4 * SEGMENTS), SCALE_REGION)
    return torch.cat([packed.view(len(packed), -1, UNIT), tail], dim=1).view(kind.dtype)


def select_quantised_rows(packed: Tensor, rows: Tensor) -> Tensor:
    """The packed weight made of some rows (int64 [R]) of another."""
    kind = kind_of(packed)
    if not kind.by_segment:
        return _grouped(_images_of(packed, rows, kind.regions), kind.regions)
    data = packed.view(torch.uint8)
    codes = data[:, :-1].reshape(len(data), -1, kind.step_bytes)
    chosen = _grouped(_images_of(codes, rows, kind.regions), kind.regions)
    tail = _grouped(_images_of(data[:, -1:], rows, SCALE_REGION), SCALE_REGION)
    return torch.cat([chosen.view(len(chosen), -1, UNIT), tail], dim=1).view(kind.dtype)
