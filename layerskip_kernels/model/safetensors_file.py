"""The safetensors format: headers checked by the ``safetensors`` library before a byte is used, and a writer.

A file is an 8-byte little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, and
the data, which the offsets count from. Tensors are read, where the library would map them: a file that changes later
must not change the weights or end the process.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerskip_kernels.errors import shown
from layerskip_kernels.model.files import naming, open_regular, read_exactly
from layerskip_kernels.model.json_file import parse_json
from layerskip_kernels.ops.memory import empty

__all__ = [
    "DTYPE_CODES",
    "TORCH_DTYPES",
    "TensorEntry",
    "read_header",
    "read_metadata",
    "read_tensor",
    "write_safetensors",
]

MAX_HEADER_BYTES = 16 << 20  # a hundred times that of a model of 100 layers

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
STORED_DTYPES = {**TORCH_DTYPES, "U8": torch.uint8, "I32": torch.int32}  # blocks of a quantised weight; token ids
DTYPE_CODES = {dtype: code for code, dtype in STORED_DTYPES.items()}


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
        return f"tensor {shown(self.name)} in {self.path}"


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, every size and offset checked.

    Raises FileNotFoundError, or ValueError naming the file: a file or header cut short, a header that is not JSON of
    the right form, ranges that overlap, leave gaps, exceed the file, disagree with dtype and shape, or start off a
    multiple of the element size.
    """
    raw = _read_raw_header(path)
    try:
        with safe_open(str(path), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        problem = str(error).removeprefix("Error while deserializing header: ")[:200]
        raise ValueError(f"{path} is damaged or truncated ({problem}); download or save it again") from error
    header = parse_json(raw, f"{path} (header)", unique=True)
    header.pop("__metadata__", None)
    return {name: _entry(path, name, fields, 8 + len(raw)) for name, fields in header.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a file which `read_header` has accepted keeps beside its tensors; none: an empty dict."""
    found = parse_json(_read_raw_header(path), f"{path} (header)", unique=True).get("__metadata__", {})
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _read_raw_header(path: Path) -> bytes:
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path} has a header of {length} bytes, more than {MAX_HEADER_BYTES}; it is not a safetensors file"
            )
        return file.read(length)


def _entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    # Rust reads a list as a struct, and an object as the name of a type.
    if not isinstance(fields, dict) or not isinstance(fields["dtype"], str):
        raise ValueError(f"tensor {shown(name)} in {path} must have dtype, shape and data_offsets, got {shown(fields)}")
    begin, end = fields["data_offsets"]
    entry = TensorEntry(path, name, fields["dtype"], tuple(fields["shape"]), data_start + begin, end - begin)
    # The library leaves this open.
    if begin % (STORED_DTYPES[entry.dtype].itemsize if entry.dtype in STORED_DTYPES else 1):
        raise ValueError(f"{entry} is misaligned: it starts at {begin}, not a multiple of its element's size")
    return entry


def read_tensor(entry: TensorEntry) -> Tensor:
    """Read one tensor into memory of its own, in the file's dtype and shape; raises ValueError if cut short.

    The bytes are read, not mapped: a file that changes later cannot change the weights, nor end the process.
    """
    if entry.dtype not in STORED_DTYPES:
        raise ValueError(f"{entry} has dtype {entry.dtype!r}; supported: {', '.join(STORED_DTYPES)}")
    tensor = empty(*entry.shape, dtype=STORED_DTYPES[entry.dtype])
    with open_regular(entry.path, buffering=0) as file:
        file.seek(entry.offset)
        read_exactly(file, tensor.view(-1).view(torch.uint8).numpy().data, str(entry))
    return tensor


def write_safetensors(
    path: Path,
    shapes: dict[str, tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a file tensor by tensor, holding one at a time.

    ``shapes``: (dtype, shape) of each name, in the file's order; ``tensors``: the same names with their
    values, in the same order, each with that dtype and shape. ``metadata``: texts for `read_metadata`.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + math.prod(shape) * STORED_DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with naming(path), path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for (name, (dtype, shape)), (got_name, tensor) in zip(shapes.items(), tensors, strict=True):
            assert (got_name, STORED_DTYPES[dtype], shape) == (name, tensor.dtype, tuple(tensor.shape))
            _write_tensor(file, tensor)


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
