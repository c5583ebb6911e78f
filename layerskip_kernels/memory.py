"""Tensors in huge pages: what every decoded token streams through, weights and KV pages."""

import math

import torch
from torch import Tensor

import layerskip_kernels._C  # noqa: F401 - registers the ops

__all__ = ["Arena", "empty"]

ALIGNMENT = 64  # bytes: a cache line
BLOCK_BYTES = 256 << 20  # of address space; what no tensor touches takes no memory


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
