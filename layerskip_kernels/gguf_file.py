"""The GGUF format: header, metadata and tensor ranges, checked against the file before they are used.

Little-endian: magic, version, counts; metadata (key, type, value); per tensor a name, dimensions (the fastest
first), a type and an offset into the data, which starts at the next multiple of the alignment.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from layerskip_kernels.errors import UnsupportedModel

__all__ = ["ArrayLength", "GgufFile", "GgufTensor", "read_gguf", "read_gguf_tensor"]

MAX_DIMENSIONS = 4
MIN_METADATA_BYTES = 13  # an empty key, a type, one byte
MIN_TENSOR_BYTES = 32  # an empty name, one dimension, type and offset

STRING_TYPE, ARRAY_TYPE = 8, 9
SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

# Elements and bytes per block.
BLOCKS = {
    GGMLQuantizationType.F32: (1, 4),
    GGMLQuantizationType.F16: (1, 2),
    GGMLQuantizationType.BF16: (1, 2),
    GGMLQuantizationType.Q4_0: (32, 18),
    GGMLQuantizationType.Q4_1: (32, 20),
    GGMLQuantizationType.Q8_0: (32, 34),
}
TORCH_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class ArrayLength:
    """What is kept of an array in the metadata: arrays are the vocabulary, which Transformers reads."""

    length: int


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

    def __str__(self) -> str:
        return f"tensor {self.name!r} in {self.path}"


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The metadata (scalars, strings and the lengths of arrays) and the tensors of a file, by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """Reads forward, never beyond the end of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.position = path, file, size, 0

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.position:
            raise ValueError(
                f"{self.path} is truncated: {what} takes {count} bytes at {self.position}, beyond its {self.size}"
            )

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        self.position += count
        return self.file.read(count)

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self.position += count
        self.file.seek(self.position)

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.number("Q", what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is damaged: {what} is no UTF-8: {error}") from error


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file, version 2 or 3.

    Raises FileNotFoundError; ValueError naming the file and the tensor for what is cut short, oversized,
    misaligned or overlapping; UnsupportedModel naming the tensor and its type when that is none of F32, F16,
    BF16, Q4_0, Q4_1 and Q8_0.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        cursor = _Cursor(path, file, size)
        num_tensors, num_entries = _read_counts(cursor)
        metadata = _read_named(cursor, num_entries, _read_value, "metadata key")
        infos = _read_named(cursor, num_tensors, _read_tensor_info, "tensor")
    alignment = _alignment(path, metadata)
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {name: _place(path, name, info, data_start, alignment, size - data_start) for name, info in infos.items()}
    _check_no_overlap(tensors)
    return GgufFile(path, metadata, tensors)


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    magic = cursor.take(4, "the magic")
    if magic != b"GGUF":
        raise ValueError(f"{cursor.path} is no GGUF file: it starts with {magic!r}, not b'GGUF'")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        raise ValueError(f"{cursor.path} has GGUF version {version}; supported: 2, 3 (little-endian)")
    num_tensors = cursor.number("Q", "the tensor count")
    num_entries = cursor.number("Q", "the metadata count")
    cursor.need(
        num_tensors * MIN_TENSOR_BYTES + num_entries * MIN_METADATA_BYTES,
        f"the header of {num_tensors} tensors and {num_entries} metadata entries",
    )
    return num_tensors, num_entries


def _read_named(cursor: _Cursor, count: int, read: Callable[[_Cursor, str], Any], what: str) -> dict[str, Any]:
    items: dict[str, Any] = {}
    for index in range(count):
        name = cursor.string(f"the name of {what} {index}")
        if name in items:
            raise ValueError(f"{cursor.path} has {what} {name!r} twice")
        items[name] = read(cursor, f"{what} {name!r}")
    return items


def _read_value(cursor: _Cursor, what: str) -> Any:
    value_type = cursor.number("I", what)
    if value_type == STRING_TYPE:
        return cursor.string(what)
    if value_type == ARRAY_TYPE:
        return _skip_array(cursor, what)
    return cursor.number(_scalar_format(cursor, value_type, what), what)


def _scalar_format(cursor: _Cursor, value_type: int, what: str) -> str:
    if value_type not in SCALAR_FORMATS:
        raise ValueError(f"{cursor.path} is damaged: {what} has the unknown type {value_type}")
    return SCALAR_FORMATS[value_type]


def _skip_array(cursor: _Cursor, what: str) -> ArrayLength:
    item_type, length = cursor.number("I", what), cursor.number("Q", what)
    if item_type == STRING_TYPE:
        for _ in range(length):
            cursor.skip(cursor.number("Q", what), what)
    else:
        cursor.skip(length * struct.calcsize("<" + _scalar_format(cursor, item_type, what)), what)
    return ArrayLength(length)


def _read_tensor_info(cursor: _Cursor, what: str) -> tuple[tuple[int, ...], int, int]:
    """Shape (row-major), type and offset, as the file gives them."""
    num_dimensions = cursor.number("I", what)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"{what} in {cursor.path} has {num_dimensions} dimensions; supported: 1 to 4")
    dimensions = [cursor.number("Q", what) for _ in range(num_dimensions)]
    return tuple(reversed(dimensions)), cursor.number("I", what), cursor.number("Q", what)


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{path} has general.alignment {alignment!r}; it must be a power of two")
    return alignment


def _place(
    path: Path, name: str, info: tuple[tuple[int, ...], int, int], start: int, alignment: int, room: int
) -> GgufTensor:
    """Check one tensor against the ``room`` bytes of data that begin at ``start``."""
    shape, type_id, offset = info
    where = f"tensor {name!r} in {path}"
    tensor_type = _supported_type(name, type_id)
    block_elements, block_bytes = BLOCKS[tensor_type]
    if shape[-1] % block_elements:
        raise ValueError(
            f"{where} has rows of {shape[-1]}, no multiple of {tensor_type.name}'s block of {block_elements}"
        )
    size = math.prod(shape) // block_elements * block_bytes
    if size == 0:
        raise ValueError(f"{where} is empty: its shape is {shape}")
    if offset % alignment:
        raise ValueError(f"{where} is misaligned: it starts at {offset}, no multiple of {alignment}")
    if offset + size > room:
        raise ValueError(
            f"{where} takes {size} bytes at {offset}, beyond the file's {max(room, 0)} bytes of data: the "
            "file is truncated or its header damaged"
        )
    return GgufTensor(path, name, tensor_type, shape, start + offset, size)


def _supported_type(name: str, type_id: int) -> GGMLQuantizationType:
    known = {tensor_type.value: tensor_type for tensor_type in GGMLQuantizationType}
    tensor_type = known.get(type_id)
    if tensor_type not in BLOCKS:
        shown = tensor_type.name if tensor_type else type_id
        supported = ", ".join(known_type.name for known_type in BLOCKS)
        raise UnsupportedModel(f"the type of tensor {name!r}", shown, supported)
    return tensor_type


def _check_no_overlap(tensors: dict[str, GgufTensor]) -> None:
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise ValueError(f"{tensor} overlaps the one before it: it starts at {tensor.offset}, before {end}")
        end = tensor.offset + tensor.size


def read_gguf_tensor(tensor: GgufTensor) -> Tensor:
    """Read one tensor: F32, F16 and BF16 as they are, quantised types as the fp32 values they stand for."""
    raw = np.fromfile(tensor.path, dtype=np.uint8, count=tensor.size, offset=tensor.offset)
    if raw.size != tensor.size:
        raise ValueError(f"{tensor} is truncated: {raw.size} of {tensor.size} bytes")
    if not tensor.is_quantised:
        return torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape)
    values = dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.type)
    return torch.from_numpy(values)
