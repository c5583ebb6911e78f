"""Tensors in huge pages: what every decoded token streams through, weights and KV pages."""

import math

import torch
from torch import Tensor

import layerskip_kernels._C  # noqa: F401 - registers the ops

__all__ = ["Arena", "empty"]

ALIGNMENT = 64  # bytes: a cache line


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """As torch.empty on the CPU, in huge pages where the system has them."""
    return torch.ops.layerskip.empty_huge(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


class Arena:
    """One block for many tensors, so that also those smaller than a huge page lie in huge pages."""

    def __init__(self, num_bytes: int, num_tensors: int) -> None:
        self._block = empty(num_bytes + num_tensors * ALIGNMENT, dtype=torch.uint8)
        self._used = 0

    def place(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor in the arena."""
        start, end = self._used, self._used + tensor.nbytes
        self._used = -(-end // ALIGNMENT) * ALIGNMENT
        return self._block[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
