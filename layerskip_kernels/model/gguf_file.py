"""The GGUF format: header, metadata and tensor ranges, checked against the file before they are used.

Little-endian: magic, version, counts; metadata (key, type, value); per tensor a name, dimensions (the fastest
first), a type and an offset into the data, which starts at the next multiple of the alignment.

The `gguf` package has a reader as well, which trusts what it reads and takes seconds for a vocabulary; here nothing is
allocated or looped over before it is known to be in the file, and the vocabulary is decoded on demand.
"""

import functools
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.model.files import open_regular
from layerskip_kernels.model.gguf_content import (
    ARRAY_TYPE,
    SCALAR_FORMATS,
    STRING_TYPE,
    TORCH_DTYPES,
    GgufArray,
    GgufFile,
    GgufTensor,
)

__all__ = ["is_gguf", "read_gguf"]

MAGIC = b"GGUF"
# Far beyond what models have (Llama 3: 8 MB, 128,256 tokens and 280,147 merges); they bound time and memory.
MAX_HEADER_BYTES = 128 << 20
FIRST_HEADER_BYTES = 4 << 20  # read at first: enough for most
MAX_ENTRIES = 1 << 16
MAX_STRINGS = 1 << 21
MAX_NAME_BYTES = 256
MAX_DIMENSIONS = 4
MIN_METADATA_BYTES = 13  # an empty key, a type, one byte
MIN_TENSOR_BYTES = 32  # an empty name, one dimension, type and offset


class _MoreOfTheHeaderError(Exception):
    """The header goes on after what was read of the file."""


class _Cursor:
    """Reads the header forward, never beyond its end."""

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        self.path, self.header, self.size, self.position = path, memoryview(header), size, 0

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.position:
            raise ValueError(
                f"{self.path} is truncated: {what} takes {count} bytes at {self.position}, beyond its {self.size}"
            )
        if count > len(self.header) - self.position:
            if len(self.header) < min(self.size, MAX_HEADER_BYTES):
                raise _MoreOfTheHeaderError
            raise ValueError(
                f"{self.path} is damaged: {what} takes {count} bytes at {self.position}; a header may have "
                f"{MAX_HEADER_BYTES}"
            )

    def take(self, count: int, what: str) -> memoryview:
        self.need(count, what)
        self.position += count
        return self.header[self.position - count : self.position]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str, longest: int = MAX_HEADER_BYTES) -> str:
        length = self.number("Q", what)
        self.need(length, what)
        if length > longest:
            raise ValueError(f"{self.path} is damaged: {what} takes {length} bytes; a name may have {longest}")
        try:
            return bytes(self.take(length, what)).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is damaged: {what} is not UTF-8 ({error.reason})") from error


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file, version 2 or 3.

    Raises FileNotFoundError; ValueError naming the file and the tensor for what is cut short, oversized,
    misaligned or overlapping; UnsupportedModel naming the tensor and its type when `gguf` cannot dequantise it.
    """
    try:
        return _read(path, FIRST_HEADER_BYTES)
    except _MoreOfTheHeaderError:
        return _read(path, MAX_HEADER_BYTES)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does, whatever its name. Raises as `open_regular`."""
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def _read(path: Path, max_bytes: int) -> GgufFile:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size >= len(MAGIC) and (magic := file.read(len(MAGIC))) != MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}, not {MAGIC!r}")
        file.seek(0)
        header = file.read(max_bytes)
    cursor = _Cursor(path, header, size)
    num_tensors, num_entries = _read_counts(cursor)
    metadata = _read_named(cursor, num_entries, _read_value, "metadata key")
    infos = _read_named(cursor, num_tensors, _read_tensor_info, "tensor")
    alignment = _alignment(path, metadata)
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {name: _place(path, name, info, data_start, alignment, size - data_start) for name, info in infos.items()}
    _check_no_overlap(tensors)
    return GgufFile(path, metadata, tensors, header[: cursor.position])


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    cursor.take(4, "the magic")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        raise ValueError(f"{cursor.path} has GGUF version {version}; supported: 2, 3 (little-endian)")
    num_tensors = cursor.number("Q", "the tensor count")
    num_entries = cursor.number("Q", "the metadata count")
    what = f"the header of {num_tensors} tensors and {num_entries} metadata entries"
    cursor.need(num_tensors * MIN_TENSOR_BYTES + num_entries * MIN_METADATA_BYTES, what)
    if max(num_tensors, num_entries) > MAX_ENTRIES:
        raise ValueError(f"{cursor.path} is damaged: {what}; supported are {MAX_ENTRIES} of each")
    return num_tensors, num_entries


def _read_named(cursor: _Cursor, count: int, read: Callable[[_Cursor, str], Any], what: str) -> dict[str, Any]:
    items: dict[str, Any] = {}
    for index in range(count):
        name = cursor.string(f"the name of {what} {index}", MAX_NAME_BYTES)
        if name in items:
            raise ValueError(f"{cursor.path} has {what} {name[:80]!r} twice")
        items[name] = read(cursor, f"{what} {name[:80]!r}")
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


def _skip_array(cursor: _Cursor, what: str) -> GgufArray:
    item_type, length = cursor.number("I", what), cursor.number("Q", what)
    start = cursor.position
    if item_type == STRING_TYPE:
        _skip_strings(cursor, length, what)
    else:
        cursor.take(length * struct.calcsize("<" + _scalar_format(cursor, item_type, what)), what)
    return GgufArray(item_type, length, cursor.header[start : cursor.position])


def _skip_strings(cursor: _Cursor, length: int, what: str) -> None:
    cursor.need(8 * length, f"{what} of {length} strings")
    if length > MAX_STRINGS:
        raise ValueError(f"{cursor.path} is damaged: {what} has {length} strings; supported are {MAX_STRINGS}")
    position, header = cursor.position, cursor.header
    for _ in range(length):
        position += 8 + int.from_bytes(header[position : position + 8], "little")
        if position > len(header):
            break
    cursor.take(position - cursor.position, what)


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
        raise ValueError(f"{path} has general.alignment {str(alignment)[:80]}; it must be a power of two")
    return alignment


def _place(
    path: Path, name: str, info: tuple[tuple[int, ...], int, int], start: int, alignment: int, room: int
) -> GgufTensor:
    """Check one tensor against the ``room`` bytes of data that begin at ``start``."""
    shape, type_id, offset = info
    where = f"tensor {name[:80]!r} in {path}"
    tensor_type = _supported_type(path, name, type_id)
    block_elements, block_bytes = GGML_QUANT_SIZES[tensor_type]
    if shape[-1] % block_elements:
        raise ValueError(
            f"{where} has rows of {shape[-1]}, not a multiple of {tensor_type.name}'s block of {block_elements}"
        )
    size = math.prod(shape) // block_elements * block_bytes
    if size == 0:
        raise ValueError(f"{where} is empty: its shape is {shape}")
    if offset % alignment:
        raise ValueError(f"{where} is misaligned: it starts at {offset}, not a multiple of {alignment}")
    if offset + size > room:
        raise ValueError(
            f"{where} takes {size} bytes at {offset}, beyond the file's {max(room, 0)} bytes of data: the "
            "file is truncated or its header damaged"
        )
    return GgufTensor(path, name, tensor_type, shape, start + offset, size)


def _supported_type(path: Path, name: str, type_id: int) -> GGMLQuantizationType:
    types = _supported_types()
    if type_id not in types:
        known = {tensor_type.value: tensor_type.name for tensor_type in GGMLQuantizationType}
        supported = ", ".join(tensor_type.name for tensor_type in types.values())
        raise UnsupportedModel(f"the type of tensor {name[:80]!r}", known.get(type_id, type_id), supported, path)
    return types[type_id]


@functools.cache
def _supported_types() -> dict[int, GGMLQuantizationType]:
    """The types that hold weights and that this version of `gguf` can read, by number."""
    types = {int(tensor_type): tensor_type for tensor_type in TORCH_DTYPES}
    for tensor_type, (_, block_bytes) in GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, block_bytes), np.uint8), tensor_type)
        except (NotImplementedError, ValueError):
            continue  # integers, and what `gguf` only knows by name
        types.setdefault(int(tensor_type), tensor_type)
    return types


def _check_no_overlap(tensors: dict[str, GgufTensor]) -> None:
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise ValueError(f"{tensor} overlaps the one before it: it starts at {tensor.offset}, before {end}")
        end = tensor.offset + tensor.size
