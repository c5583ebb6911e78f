"""Types of GGUF files that have no kernels of their own, but whose numbers another type can spell, each exactly.

IQ4_NL keeps 16 numbers of eight bits in a table, so that Q8_0 says the same with one byte a weight. Q3_K is Q6_K with
fewer bits. Both are read so: in memory they take Q8_0's and Q6_K's bytes, and are multiplied as those.
"""

from collections.abc import Callable

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

__all__ = ["RESPELLINGS"]

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _iq4_nl_as_q8_0(raw: Tensor) -> Tensor:
    """[N, blocks, 18] -> [N, blocks, 34]: an fp16 scale, then 32 numbers, first those of the lower halves of bytes."""
    codes = torch.cat([raw[..., 2:] & 15, raw[..., 2:] >> 4], dim=-1)
    numbers = torch.tensor(IQ4_NL_VALUES, dtype=torch.int8)[codes.int()]
    return torch.cat([raw[..., :2], numbers.view(torch.uint8)], dim=-1)


def _q3_k_as_q6_k(raw: Tensor) -> Tensor:
    """[N, blocks, 110] -> [N, blocks, 210].

    Q3_K: 32 bytes of third bits (1 for a number that is not negative), 64 of two lower ones, 12 of 16 scales of six
    bits less 32, an fp16 scale. Q6_K: 128 bytes of four lower bits, 64 of two upper ones, 16 scales, an fp16 scale.
    """
    twos = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    low = raw[..., 32:96].unflatten(-1, (2, 1, 32)) >> twos & 3  # [N, blocks, 2, 4, 32]
    third = raw[..., None, :32] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1  # [N, blocks, 8, 32]
    codes = (low.flatten(2, 3) + 4 * third + 28).unflatten(2, (2, 4))  # number + 32
    lower = (codes & 15).flatten(3)
    upper = (codes >> 4 << twos).sum(3, dtype=torch.uint8)
    s = raw[..., 96:108]
    scales = torch.cat([s[..., :8] & 15, s[..., :8] >> 4], dim=-1) | (s[..., None, 8:] >> twos & 3).flatten(2) << 4
    pieces = [(lower[..., :64] | lower[..., 64:] << 4).flatten(2), upper.flatten(2), scales - 32, raw[..., 108:]]
    return torch.cat(pieces, dim=-1)


# The type that spells a file's type, by its name in reference.BLOCK_TYPES, the bytes of a file's block, and how.
RESPELLINGS: dict[GGMLQuantizationType, tuple[str, int, Callable[[Tensor], Tensor]]] = {
    GGMLQuantizationType.IQ4_NL: ("q8_0", 18, _iq4_nl_as_q8_0),
    GGMLQuantizationType.Q3_K: ("q6_k", 110, _q3_k_as_q6_k),
}
