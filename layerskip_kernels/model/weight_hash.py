"""A hash of weights, made while they are loaded: what a GPU holds need not come back for it."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["HashedTensors", "tensor_digest"]

PIECE_BYTES = 16 << 20  # that a thread hashes at a time


def tensor_digest(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(_header(tensor))
    digest.update(_bytes(tensor.detach().cpu()))
    return digest.digest()


def _header(tensor: Tensor) -> bytes:
    return repr((tensor.dtype, tuple(tensor.shape))).encode() + b"\n"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


class HashedTensors:
    """Tensors on the CPU, by name, each of which is hashed from when it is popped to when the next one is.

    So no more than one is in memory for it. With torch's number of threads.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors, self._threads = tensors, ThreadPoolExecutor(torch.get_num_threads())
        self._hash = hashlib.sha256()
        self._pieces: list[Future[bytes]] = []

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def pop(self, name: str) -> Tensor:
        self._collect()
        tensor = self._tensors.pop(name)
        self._hash.update(name.encode() + b"\n" + _header(tensor))
        data = _bytes(tensor.detach())
        pieces = [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]
        self._pieces = [self._threads.submit(_digest, piece) for piece in pieces]
        return tensor

    def digest(self) -> bytes:
        """SHA-256 of the names, dtypes, shapes and pieces of all that were popped, in their order."""
        self._collect()
        self._threads.shutdown()
        return self._hash.digest()

    def _collect(self) -> None:
        for piece in self._pieces:
            self._hash.update(piece.result())
        self._pieces = []  # which hold the tensor's memory


def _digest(piece: memoryview) -> bytes:
    return hashlib.sha256(piece).digest()
