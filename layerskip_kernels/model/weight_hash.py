"""Weights on their way to a GPU: hashed on the host, which what is there need not come back for, and checked there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from layerskip_kernels.model.finite import LateChecks, is_finite
from layerskip_kernels.model.weight_files import OnDemand

__all__ = ["HashedTensors", "UploadedTensors", "tensor_digest"]

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
        return self._hashed(name, self._tensors.pop(name))

    def _hashed(self, name: str, tensor: Tensor) -> Tensor:
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


class UploadedTensors(HashedTensors):
    """The same, but a tensor is on a GPU when it is popped, where ``place`` puts it.

    Values that nobody has checked yet are checked there: ``checks`` are to be settled when all tensors were popped.
    """

    def __init__(self, tensors: dict[str, Tensor], place: Callable[[Tensor], Tensor], checks: LateChecks) -> None:
        super().__init__(tensors)
        self._place, self._checks = place, checks

    def pop(self, name: str) -> Tensor:
        if not isinstance(self._tensors, OnDemand):
            return self._place(super().pop(name))
        self._collect()
        tensor = self._place(self._hashed(name, self._tensors.read(name).tensor))
        self._tensors.drop(name)
        self._checks.add(is_finite(tensor), partial(_refuse, name, self._tensors))
        return tensor


def _refuse(name: str, tensors: OnDemand) -> None:
    tensors.read(name).check()  # once more, on the CPU, which says what is wrong
    raise ValueError(f"tensor {name!r} holds a NaN or an infinity on the GPU, but none in its file; load it again")


def _digest(piece: memoryview) -> bytes:
    return hashlib.sha256(piece).digest()
