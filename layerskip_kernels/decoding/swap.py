"""K and V of one sequence outside the cache: in host memory or in a file. Everything read from a file is validated.

A file, its header little-endian: the magic bytes, the version (uint32), the model's identity (32 bytes), the number
of positions and the sizes in bytes of tokens, k and v (uint64 each), the token ids (int32), k and v ([L, positions,
G, K] each, whatever the page size), and the SHA-256 of tokens, k and v. The header is compared field by field.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from layerskip_kernels.errors import SwapError
from layerskip_kernels.model.files import open_regular, read_exactly
from layerskip_kernels.model.model import Model

__all__ = ["SwapFolder", "SwappedKV", "read_swapped", "write_swapped"]

MAGIC = b"LSK-KV\r\n"  # the line end shows a file that was transferred as text
VERSION = 2
HEADER = struct.Struct("<8sI32sQQQQ")
DIGEST_BYTES = 32


@dataclass(frozen=True, eq=False)
class SwappedKV:
    """The committed positions of a sequence: tokens int32 [positions], k and v [L, positions, G, K], on the CPU.

    ``digest`` is the SHA-256 of the three; ``source`` is what errors call them: the file that they were read from.
    """

    model: Model
    tokens: Tensor
    k: Tensor
    v: Tensor
    digest: bytes
    source: str = "the swapped sequence"

    @classmethod
    def of(cls, model: Model, tokens: Sequence[int], k: Tensor, v: Tensor) -> SwappedKV:
        """Takes k and v, contiguous and on the CPU, as they are."""
        ids = torch.tensor(tokens, dtype=torch.int32)
        return cls(model, ids, k, v, _digest(ids, k, v))

    def check(self, model: Model, tokens: Sequence[int], k_cache: Tensor) -> None:
        """Raise SwapError unless these are positions of ``tokens``, for a cache [L, P, G, K, S] of this model."""
        shape = _shape(k_cache, len(self.tokens))
        for name, tensor in (("k", self.k), ("v", self.v)):
            if tensor.shape != shape or tensor.dtype != k_cache.dtype:
                got, expected = (tensor.dtype, list(tensor.shape)), (k_cache.dtype, list(shape))
                raise SwapError(f"{self.source}: swapped {name} has dtype and shape {got}, expected {expected}")
        if not self.model.has_kv_of(model):
            raise SwapError(
                f"{self.source} is another model's than {model.name!r}; one that was loaded twice counts as two "
                "unless the sequence is swapped to a file"
            )
        if self.digest != _digest(self.tokens, self.k, self.v):
            raise SwapError(f"{self.source} is damaged: its checksum differs; prefill computes it again")
        if self.tokens.tolist() != list(tokens[: len(self.tokens)]):
            raise SwapError(
                f"{self.source}: the {len(self.tokens)} swapped tokens are not the beginning of the sequence's"
            )


def write_swapped(path: Path, swapped: SwappedKV) -> Path:
    """Write a file, readable by its owner only, which appears whole or not at all. Raises SwapError.

    What a killed process leaves is a file of another name, beginning with a dot, which nobody reads.
    """
    tensors = (swapped.tokens, swapped.k, swapped.v)
    header = HEADER.pack(
        MAGIC, VERSION, swapped.model.identity, len(swapped.tokens), *(tensor.nbytes for tensor in tensors)
    )
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with open(handle, "wb") as file:
                file.write(header)
                for tensor in tensors:
                    file.write(_bytes(tensor))
                file.write(swapped.digest)
                file.flush()
                os.fsync(file.fileno())  # a disk that fails later must not fail after the pages are given up
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise SwapError(f"{path} cannot be written: {error}; the sequence is still in the cache") from error
    return path


def read_swapped(path: Path, model: Model, k_cache: Tensor) -> SwappedKV:
    """Read a regular file whose sizes fit a cache [L, P, G, K, S]; ``SwappedKV.check`` verifies what was read.

    Raises SwapError before more memory is taken than a sequence of the model can have.
    """
    try:
        with open_regular(path) as file:
            length = _read_header(path, file, model, k_cache)
            tokens = torch.empty(length, dtype=torch.int32)
            k, v = (torch.empty(_shape(k_cache, length), dtype=k_cache.dtype) for _ in "kv")
            digest = bytearray(DIGEST_BYTES)
            for buffer in (*map(_bytes, (tokens, k, v)), memoryview(digest)):
                read_exactly(file, buffer, str(path))
    except (FileNotFoundError, ValueError) as error:  # open_regular's, which name the file
        raise SwapError(str(error)) from error
    except OSError as error:
        raise SwapError(f"{path} cannot be read: {error}") from error
    return SwappedKV(model, tokens, k, v, bytes(digest), str(path))


def _read_header(path: Path, file: BinaryIO, model: Model, k_cache: Tensor) -> int:
    """The number of positions, after every field was compared."""
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise SwapError(f"{path} is truncated: {len(header)} bytes, the header alone has {HEADER.size}")
    magic, version, identity, length, *sizes = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise SwapError(f"{path} is not a swapped sequence of version {VERSION}: it begins with {header[:12]!r}")
    if length > model.config.max_positions:
        raise SwapError(f"{path} has {length} positions; the model has {model.config.max_positions}")
    expected = _sizes(k_cache, length)
    if sizes != expected:
        raise SwapError(f"{path} has tokens, k and v of {sizes} bytes; {length} positions of this model: {expected}")
    total, file_size = HEADER.size + sum(sizes) + DIGEST_BYTES, os.fstat(file.fileno()).st_size
    if file_size != total:
        raise SwapError(f"{path} has {file_size} bytes, expected {total}: it is truncated or not one file")
    if identity != model.identity:
        raise SwapError(f"{path} is another model's: weights, config, dtype or backend differ from {model.name!r}")
    return length


class SwapFolder:
    """A folder of this process's own under ``parent`` for swap files; removed with this object.

    A killed process leaves its folder behind; the next one made in the same place removes it. A living process keeps a
    lock in its folder, which the system releases when it dies.
    """

    PREFIX = "layerskip-swap-"

    def __init__(self, parent: str | os.PathLike[str]) -> None:
        for left in Path(parent).glob(f"{self.PREFIX}*"):
            with suppress(OSError), _FolderLock(left):
                shutil.rmtree(left, ignore_errors=True)
        hidden = Path(tempfile.mkdtemp(prefix=f".{self.PREFIX}", dir=parent))  # until it is locked
        self._lock = _FolderLock(hidden)
        self.path = hidden.rename(hidden.with_name(hidden.name[1:]))
        weakref.finalize(self, _remove_folder, self.path, os.getpid())


class _FolderLock:
    """A folder's lock, held until this object is closed or the process ends. Raises OSError where another has it."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self._close()


def _remove_folder(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child has the object as well, and not the folder
        shutil.rmtree(path, ignore_errors=True)


def _shape(k_cache: Tensor, length: int) -> torch.Size:
    L, _, G, K, _ = k_cache.shape
    return torch.Size((L, length, G, K))


def _sizes(k_cache: Tensor, length: int) -> list[int]:
    num_bytes = _shape(k_cache, length).numel() * k_cache.dtype.itemsize
    return [4 * length, num_bytes, num_bytes]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _digest(tokens: Tensor, k: Tensor, v: Tensor) -> bytes:
    digest = hashlib.sha256()
    for tensor in (tokens, k, v):
        digest.update(_bytes(tensor))
    return digest.digest()
