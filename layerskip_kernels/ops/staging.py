"""Positions of a cache to host memory and back: through pinned memory where the cache is on a GPU.

A GPU reaches pinned memory by itself, and pinned memory is scarce. So positions pass through two pinned buffers of a
cache, in pieces: while the GPU fills or empties one, the host copies the other's from or to memory that is not pinned.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

from layerskip_kernels.ops import cache_ops

__all__ = ["Staging"]

BUFFER_BYTES = 32 << 20  # of each of the two, unless a page is larger


class _Buffer:
    """Pinned memory, as large as was needed so far, and when the device will have done with it."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._done: torch.cuda.Event | None = None

    def take(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """k and v of a shape, and an error record: in memory that nobody uses any more."""
        self.wait()
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        total = 8 + 2 * nbytes
        if self._memory is None or self._memory.nbytes < total:
            self._memory = torch.empty(total, dtype=torch.uint8, pin_memory=True)
        error, k, v = self._memory[:total].split([8, nbytes, nbytes])
        return k.view(dtype).view(shape), v.view(dtype).view(shape), error.view(torch.int64)

    def asked(self, device: torch.device) -> None:
        """The device was asked to use the memory."""
        with torch.cuda.device(device):
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()
            self._done = None


class Staging:
    """The way of one cache's positions to and from host memory; of one sequence at a time."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._buffers = (_Buffer(), _Buffer())

    def fetch(
        self, pages: Tensor, length: int, k_cache: Tensor, v_cache: Tensor, error: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """cache_ops.gather_kv into host memory that is not pinned. Waits for it, and raises what it refused."""
        if not k_cache.is_cuda:
            k, v = cache_ops.gather_kv(pages, length, k_cache, v_cache, error)
            cache_ops.check_error(error)
            return k, v
        layers, _, heads, head_dim, page_size = k_cache.shape
        k, v = (torch.empty(layers, length, heads, head_dim, dtype=k_cache.dtype) for _ in "kv")
        filled: list[tuple[_Buffer, slice, tuple[Tensor, Tensor, Tensor]]] = []

        def empty_oldest() -> None:
            buffer, positions, (part_k, part_v, noted) = filled.pop(0)
            buffer.wait()
            cache_ops.raise_noted(int(noted), error)
            k[:, positions], v[:, positions] = part_k, part_v

        with self._lock:
            for n, positions in enumerate(_pieces(0, length, k_cache)):
                if len(filled) == len(self._buffers):
                    empty_oldest()
                buffer = self._buffers[n % 2]
                count = positions.stop - positions.start
                parts = part_k, part_v, noted = buffer.take((layers, count, heads, head_dim), k_cache.dtype)
                cache_ops.gather_kv_into(pages[positions.start // page_size :], k_cache, v_cache, part_k, part_v, error)
                noted.copy_(error, non_blocking=True)
                buffer.asked(k_cache.device)
                filled.append((buffer, positions, parts))
            while filled:
                empty_oldest()
        return k, v

    def bring(
        self, pages: Tensor, start: int, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, error: Tensor
    ) -> None:
        """cache_ops.scatter_kv from host memory. Waits for it, and raises what it refused."""
        if not k_cache.is_cuda:
            cache_ops.scatter_kv(pages, start, k, v, k_cache, v_cache, error)
            cache_ops.check_error(error)
            return
        layers, length, heads, head_dim = k.shape
        page_size, noted = k_cache.size(-1), None
        with self._lock:
            for n, positions in enumerate(_pieces(start, length, k_cache)):
                buffer, first = self._buffers[n % 2], positions.start
                part_k, part_v, noted = buffer.take((layers, positions.stop - first, heads, head_dim), k.dtype)
                part_k.copy_(k[:, positions])
                part_v.copy_(v[:, positions])
                theirs, skipped = pages[first // page_size :], max(0, start - first)
                cache_ops.scatter_kv(theirs, skipped, part_k, part_v, k_cache, v_cache, error)
                noted.copy_(error, non_blocking=True)
                buffer.asked(k_cache.device)
            for buffer in self._buffers:
                buffer.wait()
            if noted is not None:
                cache_ops.raise_noted(int(noted), error)


def _pieces(start: int, stop: int, k_cache: Tensor) -> list[slice]:
    """Positions start .. stop - 1 in pieces that fit into a buffer, each from the beginning of a page on."""
    layers, _, heads, head_dim, page_size = k_cache.shape
    page_bytes = 2 * layers * heads * head_dim * page_size * k_cache.dtype.itemsize
    step = max(1, BUFFER_BYTES // page_bytes) * page_size
    first = start // page_size * page_size
    return [slice(begin, min(begin + step, stop)) for begin in range(first, stop, step)]
