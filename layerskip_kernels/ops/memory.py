"""Tensors in huge pages: what every decoded token streams through, weights and KV pages."""

import math
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

import layerskip_kernels.ops.extension  # noqa: F401 - registers the ops

__all__ = ["Arena", "HostMemory", "empty"]

ALIGNMENT = 64  # bytes: a cache line
BLOCK_BYTES = 256 << 20  # of address space; untouched pages are never committed


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """As torch.empty on the CPU, in huge pages where the system has them."""
    return torch.ops.layerskip.empty_huge(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


class Arena:
    """Blocks shared by many tensors, so that also those smaller than a huge page lie in huge pages."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def place(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor in the arena."""
        if self._used + tensor.nbytes > self._block.nbytes:
            self._block, self._used = empty(max(BLOCK_BYTES, tensor.nbytes), dtype=torch.uint8), 0
        start, end = self._used, self._used + tensor.nbytes
        self._used = -(-end // ALIGNMENT) * ALIGNMENT
        return self._block[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)


class HostMemory:
    """The memory of a backend whose tensors are the CPU's."""

    empty = staticmethod(empty)

    def placer(self) -> Callable[[Tensor], Tensor]:
        return Arena().place

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    def to_host(self, k_cache: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    def forget_errors(self, k_cache: Tensor) -> None:
        """Errors are raised at once here."""

    # Every op has done its work when it returns.

    def synchronize(self) -> None: ...

    def mark(self) -> float:
        return perf_counter()
