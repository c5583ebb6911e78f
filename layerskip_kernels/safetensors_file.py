"""The safetensors format: a header checked against the file before a byte of it is used, and a writer.

A file is an 8-byte little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, and
the data, which the offsets count from. The ranges must tile the data: no overlap, no gap, nothing left over.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from layerskip_kernels.memory import empty

__all__ = ["TensorEntry", "read_header", "read_tensor", "write_safetensors"]

MAX_HEADER_BYTES = 100_000_000

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ELEMENT_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2},
    **{"U16": 2, "BOOL": 1, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: ``size`` bytes at ``offset`` from the start of the file ``path``."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def __str__(self) -> str:
        return f"tensor {self.name!r} in {self.path}"


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, every size and offset checked.

    Raises FileNotFoundError, or ValueError naming the file and the tensor: a file or header cut short, a
    header that is no JSON of the right form, ranges that overlap, leave gaps or bytes over, exceed the file,
    start off a multiple of the element size, or disagree with dtype and shape.
    """
    header, data_start = _read_json(path)
    header.pop("__metadata__", None)
    entries = [_check_entry(path, name, fields, data_start) for name, fields in header.items()]
    _check_tiling(path, entries, data_start)
    return {entry.name: entry for entry in entries}


def _read_json(path: Path) -> tuple[dict[str, Any], int]:
    """The parsed header and where the data starts."""
    file_size = path.stat().st_size
    if file_size < 8:
        raise ValueError(f"{path} is truncated: {file_size} bytes, a safetensors file has at least 8")
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(file_size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{path} has a header of {length} bytes, longer than the file ({file_size} bytes) or than "
                f"the format's limit ({MAX_HEADER_BYTES}); it is truncated or no safetensors file"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a header that is no valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a header that is no JSON object")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name occurs twice")
    return names


def _check_entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    where = f"tensor {name!r} in {path}"
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise ValueError(f"{where} must have dtype, shape and data_offsets, got {fields!r}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise ValueError(f"{where} has dtype {dtype!r}; supported: {', '.join(TORCH_DTYPES)}")
    if not _are_sizes(shape):
        raise ValueError(f"{where} has shape {shape!r}; a shape is a list of non-negative integers")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} has data_offsets {offsets!r}; they are a begin and an end not before it")
    begin, end = offsets
    if end - begin != math.prod(shape) * ELEMENT_BYTES[dtype]:
        raise ValueError(f"{where} has {end - begin} bytes, but shape {shape} of {dtype} has another size")
    if begin % ELEMENT_BYTES[dtype]:
        raise ValueError(f"{where} is misaligned: it starts at {begin}, not a multiple of its element's size")
    return TensorEntry(path, name, dtype, tuple(shape), data_start + begin, end - begin)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_tiling(path: Path, entries: list[TensorEntry], data_start: int) -> None:
    file_size, end = path.stat().st_size, data_start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.size)):
        if entry.offset < end:
            raise ValueError(f"{entry} overlaps the tensor before it: it starts at {entry.offset}, before {end}")
        if entry.offset > end:
            raise ValueError(f"{entry} leaves a gap before it: it starts at {entry.offset}, not at {end}")
        end += entry.size
        if end > file_size:
            raise ValueError(f"{entry} ends at byte {end}, beyond the file's {file_size}: the file is truncated")
    if end != file_size:
        raise ValueError(f"{path} has {file_size - end} bytes after its last tensor")


def read_tensor(entry: TensorEntry) -> Tensor:
    """Read one tensor into memory of its own, in the file's dtype and shape; raises ValueError if cut short.

    The bytes are read, not mapped: a file that changes later cannot change the weights, nor end the process.
    """
    if entry.dtype not in TORCH_DTYPES:
        raise ValueError(f"{entry} has dtype {entry.dtype!r}; supported: {', '.join(TORCH_DTYPES)}")
    tensor = empty(*entry.shape, dtype=TORCH_DTYPES[entry.dtype])
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        _read_exactly(file, tensor.view(-1).view(torch.uint8).numpy().data, str(entry))
    return tensor


def _read_exactly(file: Any, buffer: memoryview, what: str) -> None:
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise ValueError(f"{what} is truncated: {done} of {len(buffer)} bytes")
        done += count


def write_safetensors(
    path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a file tensor by tensor, holding one at a time.

    ``shapes``: (dtype, shape) of each name, in the file's order; ``tensors``: the same names with their
    values, in the same order, each with that dtype and shape.
    """
    header, offset = {}, 0
    for name, (dtype, shape) in shapes.items():
        end = offset + math.prod(shape) * ELEMENT_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for (name, (dtype, shape)), (got_name, tensor) in zip(shapes.items(), tensors, strict=True):
            assert (got_name, TORCH_DTYPES[dtype], shape) == (name, tensor.dtype, tuple(tensor.shape))
            _write_tensor(file, tensor)


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
