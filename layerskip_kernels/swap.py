"""K and V of one sequence outside the cache: in host memory, or in a file that nothing is believed of unchecked.

A file, its header little-endian: the magic bytes, the version (uint32), the model's identity (32 bytes), the number
of positions and the sizes in bytes of tokens, k and v (uint64 each), the token ids (int32), k and v ([L, positions,
G, K] each, whatever the page size), and the SHA-256 of everything before.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels.errors import SwapError

__all__ = ["SwappedKV", "read_swapped", "write_swapped"]

MAGIC = b"LSK-KV\r\n"  # the line end shows a file that was transferred as text
VERSION = 1
HEADER = struct.Struct("<8sI32sQQQQ")
DIGEST_BYTES = 32


@dataclass(frozen=True, eq=False)
class SwappedKV:
    """The committed positions of a sequence: tokens int32 [positions], k and v [L, positions, G, K], on the CPU."""

    identity: bytes
    tokens: Tensor
    k: Tensor
    v: Tensor
    digest: bytes

    @classmethod
    def of(cls, identity: bytes, tokens: ListLike[int], k: Tensor, v: Tensor) -> SwappedKV:
        """Takes k and v, which must be contiguous, as they are."""
        ids = torch.tensor(tokens, dtype=torch.int32)
        return cls(identity, ids, k.cpu(), v.cpu(), _digest(identity, ids, k.cpu(), v.cpu()))

    def check(self, identity: bytes, tokens: ListLike[int], k_cache: Tensor) -> None:
        """Raise SwapError unless these are positions of ``tokens``, for a cache [L, P, G, K, S] of this model."""
        shape = _shape(k_cache, len(self.tokens))
        for name, tensor in (("k", self.k), ("v", self.v)):
            if tensor.shape != shape or tensor.dtype != k_cache.dtype:
                got, expected = (tensor.dtype, list(tensor.shape)), (k_cache.dtype, list(shape))
                raise SwapError(f"swapped {name} has dtype and shape {got}, expected {expected}")
        if self.identity != identity:
            raise SwapError("the swapped sequence is another model's: weights, config, dtype or backend differ")
        if self.digest != _digest(self.identity, self.tokens, self.k, self.v):
            raise SwapError("the swapped sequence is damaged: its checksum differs")
        if self.tokens.tolist() != list(tokens[: len(self.tokens)]):
            raise SwapError(f"the {len(self.tokens)} swapped tokens are not the beginning of the sequence's")


def write_swapped(path: Path, swapped: SwappedKV) -> Path:
    """Write a file, readable by its owner only, which appears whole or not at all. Raises SwapError."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with open(handle, "wb") as file:
                for part in _parts(swapped.identity, swapped.tokens, swapped.k, swapped.v):
                    file.write(part)
                file.write(swapped.digest)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise SwapError(f"{path} cannot be written: {error}; the sequence is still in the cache") from error
    return path


def read_swapped(path: Path, k_cache: Tensor, max_positions: int) -> SwappedKV:
    """Read a file whose sizes fit a cache [L, P, G, K, S]; ``SwappedKV.check`` verifies what was read.

    Raises SwapError before more memory is taken than a sequence of the model can have.
    """
    try:
        with path.open("rb") as file:
            identity, length = _read_header(path, file, k_cache, max_positions)
            tokens = torch.empty(length, dtype=torch.int32)
            k, v = (torch.empty(_shape(k_cache, length), dtype=k_cache.dtype) for _ in "kv")
            for tensor in (tokens, k, v):
                _read_exactly(path, file, _bytes(tensor))
            digest = bytearray(DIGEST_BYTES)
            _read_exactly(path, file, memoryview(digest))
    except OSError as error:
        raise SwapError(f"{path} cannot be read: {error}") from error
    return SwappedKV(identity, tokens, k, v, bytes(digest))


def _read_header(path: Path, file: Any, k_cache: Tensor, max_positions: int) -> tuple[bytes, int]:
    """The model's identity and the number of positions, after all sizes were compared."""
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise SwapError(f"{path} is truncated: {len(header)} bytes, the header alone has {HEADER.size}")
    magic, version, identity, length, *sizes = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise SwapError(f"{path} is no swapped sequence of version {VERSION}: it begins {header[:12]!r}")
    if length > max_positions:
        raise SwapError(f"{path} has {length} positions; the model has {max_positions}")
    expected = _sizes(k_cache, length)
    if sizes != expected:
        raise SwapError(f"{path} has tokens, k and v of {sizes} bytes; {length} positions of this model: {expected}")
    total, file_size = HEADER.size + sum(sizes) + DIGEST_BYTES, os.fstat(file.fileno()).st_size
    if file_size != total:
        raise SwapError(f"{path} has {file_size} bytes, expected {total}: it is truncated or not one file")
    return identity, length


def _read_exactly(path: Path, file: Any, buffer: memoryview) -> None:
    if (count := file.readinto(buffer)) != len(buffer):
        raise SwapError(f"{path} is truncated: {count} of {len(buffer)} bytes")


def _shape(k_cache: Tensor, length: int) -> torch.Size:
    L, _, G, K, _ = k_cache.shape
    return torch.Size((L, length, G, K))


def _sizes(k_cache: Tensor, length: int) -> list[int]:
    num_bytes = _shape(k_cache, length).numel() * k_cache.dtype.itemsize
    return [4 * length, num_bytes, num_bytes]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _parts(identity: bytes, tokens: Tensor, k: Tensor, v: Tensor) -> Iterator[bytes | memoryview]:
    """All of a file but its digest."""
    yield HEADER.pack(MAGIC, VERSION, identity, len(tokens), tokens.nbytes, k.nbytes, v.nbytes)
    yield from map(_bytes, (tokens, k, v))


def _digest(identity: bytes, tokens: Tensor, k: Tensor, v: Tensor) -> bytes:
    digest = hashlib.sha256()
    for part in _parts(identity, tokens, k, v):
        digest.update(part)
    return digest.digest()
