"""What a GGUF file holds: its metadata, decoded on demand, and its tensors, read one by one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from layerskip_kernels.model.gguf_respelling import RESPELLINGS
from layerskip_kernels.ops.reference import BLOCK_TYPES, BlockType, has_finite_scales

__all__ = [
    "ARRAY_TYPE",
    "SCALAR_FORMATS",
    "STRING_TYPE",
    "TORCH_DTYPES",
    "GgufArray",
    "GgufFile",
    "GgufTensor",
    "read_gguf_blocks",
    "read_gguf_tensor",
]

STRING_TYPE, ARRAY_TYPE = 8, 9
SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

TORCH_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array of the metadata that has not been decoded: ``raw`` is its part of the header."""

    item_type: int
    length: int
    raw: memoryview


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies: ``size`` bytes at ``offset`` from the start of the file; shape is row-major."""

    path: Path
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values once read: fp32 for the quantised types."""
        return TORCH_DTYPES.get(self.type, torch.float32)

    @property
    def is_quantised(self) -> bool:
        return self.type not in TORCH_DTYPES

    @property
    def block_type(self) -> BlockType | None:
        """The type of a matrix that is multiplied as it is stored or respelt (rule 8); None: it is read as numbers."""
        name = RESPELLINGS[self.type][0] if self.type in RESPELLINGS else self.type.name.lower()
        return BLOCK_TYPES.get(name) if len(self.shape) == 2 else None

    def __str__(self) -> str:
        return f"tensor {self.name[:80]!r} in {self.path}"


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The metadata and the tensors of a file (or of a split file's parts), by name; ``header``: its bytes up to the
    data, for a fingerprint."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    header: bytes

    def strings(self, key: str) -> list[str] | None:
        """An array of strings; None where there is none. Raises ValueError for another type, or bytes not UTF-8."""
        array = self._array(key)
        if array is None:
            return None
        if array.item_type != STRING_TYPE:
            raise ValueError(f"{self.path} has metadata key {key!r} of type {array.item_type}; it must hold strings")
        return _decode_strings(array, f"metadata key {key!r} in {self.path}")

    def numbers(self, key: str) -> np.ndarray | None:
        """An array of numbers; None where there is none."""
        array = self._array(key)
        if array is None:
            return None
        if array.item_type not in SCALAR_FORMATS:
            raise ValueError(f"{self.path} has metadata key {key!r} of type {array.item_type}; it must hold numbers")
        return np.frombuffer(array.raw, dtype="<" + SCALAR_FORMATS[array.item_type], count=array.length)

    def _array(self, key: str) -> GgufArray | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, GgufArray):
            raise ValueError(f"{self.path} has metadata key {key!r} as {type(value).__name__}; it must be an array")
        return value


def _decode_strings(array: GgufArray, where: str) -> list[str]:
    # The lengths were checked against the header when the array was skipped.
    strings, position, raw = [], 0, bytes(array.raw)
    try:
        for _ in range(array.length):
            start = position + 8
            position = start + int.from_bytes(raw[position:start], "little")
            strings.append(raw[start:position].decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is damaged: item {len(strings)} is not UTF-8 ({error.reason})") from error
    return strings


def read_gguf_blocks(tensor: GgufTensor) -> Tensor:
    """Read one tensor that has a ``block_type``: uint8 [N, blocks, bytes of a block], as it is stored or respelt."""
    assert tensor.block_type is not None
    _, nbytes, respelt = RESPELLINGS.get(tensor.type, ("", tensor.block_type.nbytes, lambda raw: raw))
    blocks = respelt(torch.from_numpy(_read_bytes(tensor)).view(tensor.shape[0], -1, nbytes))
    if not has_finite_scales(blocks):
        raise ValueError(f"{tensor} has a block whose scale is a NaN or an infinity; the file is damaged")
    return blocks


def _read_bytes(tensor: GgufTensor) -> np.ndarray:
    raw = np.fromfile(tensor.path, dtype=np.uint8, count=tensor.size, offset=tensor.offset)
    if raw.size != tensor.size:
        raise ValueError(f"{tensor} is truncated: {raw.size} of {tensor.size} bytes")
    return raw


def read_gguf_tensor(tensor: GgufTensor) -> Tensor:
    """Read one tensor: F32, F16 and BF16 as they are, quantised types as the fp32 values they stand for."""
    raw = _read_bytes(tensor)
    if not tensor.is_quantised:
        return torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape)
    values = dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.type)
    return torch.from_numpy(values)
