"""The ``triton`` backend: triton_ops with the names and signatures of reference.py, and tensors where they belong.

Weights, pages and what the kernels pass on stay on the GPU (under TRITON_INTERPRET=1: on the CPU). Row counts, depths
and draft counts are read on the host, so that a step is a fixed sequence of launches; ``to_host`` is the one wait of a
cycle. Sampling's ops run on the CPU, from logits that were copied there: the same bits, for any backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

import layerskip_kernels.triton_ops as triton_ops
from layerskip_kernels.triton_ops.graphs import PlannedSteps

__all__ = ["TritonOps"]


def _device() -> torch.device:
    if triton.knobs.runtime.interpret:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(
            "backend 'triton' needs a GPU that torch can use (`layerskip doctor` says what it finds), or "
            "TRITON_INTERPRET=1 in the environment, set before Python starts, to interpret the kernels on the CPU"
        )
    return torch.device("cuda", torch.cuda.current_device())


class TritonOps:
    """Raises RuntimeError where there is neither a GPU nor Triton's interpreter."""

    def __init__(self) -> None:
        self.device = _device()
        self._steps = PlannedSteps()

    def __getattr__(self, name: str) -> Any:
        """The ops that need nothing but their tensors; sampling's, philox and gumbel on the CPU."""
        if hasattr(triton_ops, name):
            return getattr(triton_ops, name)
        op = getattr(torch.ops.layerskip, name)
        return lambda *args: op(*(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args))

    def placer(self) -> Callable[[Tensor], Tensor]:
        return self._place

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def pack_weight(self, weight: Tensor) -> Tensor:
        return triton_ops.pack_weight(weight.to(self.device))

    def to_host(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Copies on the CPU; waits for the steps so far, and raises what they noted."""
        copies = tuple(tensor.to("cpu", copy=True) for tensor in tensors)
        triton_ops.check_error(triton_ops.error_of(self.device))
        return copies

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def run_layers(self, weights: list[Tensor], *args: Any) -> None:
        *caches, tokens, positions, depths, query_start_loc, block_table = args[:8]
        tokens, positions, block_table = map(self._place, (tokens, positions, block_table))
        triton_ops.run_layers(
            weights, *caches, tokens, positions, depths, query_start_loc, block_table, *args[8:]
        )  # fmt: skip

    def draft_step(self, *args: Any) -> Tensor:
        """As reference.draft_step; the drafts stay on the device."""
        return self._steps.draft_step(*args).clone()  # the plan's next step writes into the same memory

    def verify_step(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As reference.verify_step; the results stay on the device."""
        num_accepted, next_tokens, logits = self._steps.verify_step(*args)
        return num_accepted, next_tokens, logits.clone()  # for the same reason
