"""Weights as the kernels stream them.

A linear weight [N, K] becomes [ceil(N / 16), steps, 8, 16, 8]: sixteen columns together, and for each eight k (a step)
the eight segments of rule 1, the sixteen columns, eight consecutive k. So a step of sixteen columns is one contiguous
piece of 1,024 weights, and eight k of a column are the 16 bytes that a thread loads. Segments are filled up to a
multiple of eight with zeros, which change no sum.
"""

import torch
from torch import Tensor

from .contract import GROUP, SEGMENTS, VECTOR
from .launch import blocks, is_quantised
from .quantised import pack_quantised, select_quantised_rows

__all__ = ["num_steps", "pack_weight", "row_stride", "select_rows", "to_segments", "unpack_weight"]


def num_steps(k: int) -> int:
    """Steps of eight k in a segment of ``k`` inputs."""
    return blocks(blocks(k, SEGMENTS), VECTOR)


def row_stride(k: int) -> int:
    """Numbers in a row of ``k`` inputs as a dot reads it: eight filled segments."""
    return SEGMENTS * VECTOR * num_steps(k)


def to_segments(x: Tensor) -> Tensor:
    """Rows [T, K] as a dot reads them: fp32 [T, row_stride(K)], each segment filled up with zeros."""
    rows, k = x.shape
    length = -(-k // SEGMENTS)
    x = torch.nn.functional.pad(x.float(), (0, SEGMENTS * length - k)).view(rows, SEGMENTS, length)
    return torch.nn.functional.pad(x, (0, VECTOR * num_steps(k) - length)).view(rows, -1).contiguous()


def pack_weight(weight: Tensor) -> Tensor:
    """[N, K] -> [ceil(N / 16), steps, 8, 16, 8], on the same device; of a quantised weight, quantised.py's layout."""
    if is_quantised(weight):
        return pack_quantised(weight)
    n, k = weight.shape
    length, steps = -(-k // SEGMENTS), num_steps(k)
    padded = torch.nn.functional.pad(weight, (0, SEGMENTS * length - k, 0, -n % GROUP)).view(-1, SEGMENTS, length)
    padded = torch.nn.functional.pad(padded, (0, VECTOR * steps - length))
    return padded.view(-1, GROUP, SEGMENTS, steps, VECTOR).permute(0, 3, 2, 1, 4).contiguous()


def unpack_weight(packed: Tensor, n: int, k: int) -> Tensor:
    """The weight [n, k] that pack_weight packed."""
    length, steps = -(-k // SEGMENTS), num_steps(k)
    rows = packed.permute(0, 3, 2, 1, 4).reshape(-1, SEGMENTS, VECTOR * steps)[:n, :, :length]
    return rows.reshape(n, SEGMENTS * length)[:, :k]


def select_rows(packed: Tensor, rows: Tensor) -> Tensor:
    """The packed weight made of some rows (int64 [R]) of another."""
    if is_quantised(packed):
        return select_quantised_rows(packed, rows.to(packed.device))
    groups, steps = packed.shape[:2]
    k = SEGMENTS * VECTOR * steps
    rows = rows.to(packed.device)
    # Whole filled segments go through unpacked and packed again, so that zeros stay where they are.
    return pack_weight(unpack_weight(packed, groups * GROUP, k)[rows])
