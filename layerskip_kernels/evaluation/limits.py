"""What bounds every step: the rates at which this machine reads memory and multiplies, timed beside the steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from layerskip_kernels.evaluation.bandwidth import measure_read_bandwidth, read_buffer
from layerskip_kernels.evaluation.timing import Candidate, Timing

__all__ = ["FMA", "PAIRS", "READ", "Limits", "limit_candidates"]

READ, FMA, PAIRS = "memory reads", "fp32 matrix product", "bf16 matrix product"
READ_SECONDS = 0.03
PEAK_SIZE = 1536


@dataclass(frozen=True)
class Limits:
    """What bounds every step, measured in the same run."""

    read_bandwidth_gb_s: float
    fma_peak_gflop_s: float
    read_bandwidth_iqr_gb_s: float  # the bandwidth of shared machines drifts
    bf16_peak_gflop_s: float | None = None  # where products of bf16 have an instruction of their own

    @classmethod
    def of(cls, timings: Mapping[str, Timing]) -> Limits:
        """From the timings of ``limit_candidates``."""
        bandwidth = Timing(tuple(1 / seconds for seconds in timings[READ].seconds))
        fp32, bf16 = (2 * PEAK_SIZE**3 / timings[p].median / 1e9 if p in timings else None for p in (FMA, PAIRS))
        assert fp32 is not None
        return cls(bandwidth.median, fp32, bandwidth.iqr, bf16)


def limit_candidates() -> dict[str, Candidate]:
    """The limits as candidates, to be timed among the others: the bandwidth of shared machines drifts.

    ``READ``: seconds for a GB of `measure_read_bandwidth`. ``FMA``: torch's fp32 product of two square
    matrices of 1536 rows, 2 * 1536**3 operations: a tuned library's figure (MKL, OpenBLAS) and so slightly below
    what the cores could do. ``PAIRS``: the same in bf16, where the CPU backend multiplies bf16 numbers in pairs, too.
    All with torch's current threads.
    """
    buffer = read_buffer()
    limits = {
        READ: Candidate(lambda: measure_read_bandwidth(READ_SECONDS, buffer), seconds=lambda gb_s: 1 / gb_s),
        FMA: _square_product(torch.float32),
    }
    if torch.ops.layerskip.instruction_set() == "avx512_bf16":
        limits[PAIRS] = _square_product(torch.bfloat16)
    return limits


def _square_product(dtype: torch.dtype) -> Candidate:
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Candidate(lambda: torch.mm(a, b, out=out))
