"""The rate at which this machine reads memory: the limit of decoding."""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import Tensor

from layerskip_kernels.machine import last_level_cache_bytes, usable_cpus
from layerskip_kernels.ops.memory import empty

__all__ = ["measure_read_bandwidth", "read_buffer"]

MIN_BUFFER_BYTES, MAX_BUFFER_BYTES = 256 << 20, 2 << 30


def measure_read_bandwidth(seconds: float = 1.0, buffer: Tensor | None = None) -> float:
    """GB/s (10^9 bytes) at which torch's current threads read memory and write none: the median of many passes.

    One pass adds up ``buffer``, int64 (default: a new ``read_buffer``).
    """
    buffer = read_buffer() if buffer is None else buffer
    buffer.sum()
    passes: list[float] = []
    while sum(passes) < seconds or len(passes) < 3:
        start = time.perf_counter()
        buffer.sum()
        passes.append(time.perf_counter() - start)
    return buffer.nbytes / median(passes) / 1e9


def read_buffer(num_bytes: int | None = None) -> Tensor:
    """Ones, int64, in huge pages as the weights are: reading through small pages is up to 1.8 times as slow.

    Default: at least 256 MiB and four times the last-level caches, at most 2 GiB.
    """
    if num_bytes is None:
        caches = last_level_cache_bytes(usable_cpus()) or 0
        num_bytes = min(max(MIN_BUFFER_BYTES, 4 * caches), MAX_BUFFER_BYTES)
    return empty(num_bytes // 8, dtype=torch.int64).fill_(1)  # written: pages never written may share memory
