"""What a checkpoint's values must be: numbers. Asked where a tensor is, on the host or on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from layerskip_kernels.ops.reference import has_finite_scales

__all__ = ["LateChecks", "check_finite", "is_finite"]


def is_finite(tensor: Tensor) -> Tensor:
    """Whether numbers, or the scales of blocks (uint8 [N, blocks, bytes]), hold no NaN and no infinity. bool []."""
    if tensor.dtype == torch.uint8:
        return has_finite_scales(tensor)
    # One pass without a temporary: aminmax hands a NaN on.
    return torch.stack(tensor.aminmax()).isfinite().all()


def check_finite(what: object, tensor: Tensor, source: Tensor) -> None:
    """Raise ValueError when ``tensor``, converted from ``source``, holds a NaN or an infinity."""
    if is_finite(tensor):
        return
    if is_finite(source):
        wider = "torch.bfloat16 or torch.float32" if tensor.dtype is torch.float16 else "torch.float32"
        raise ValueError(f"{what} has values beyond the range of {tensor.dtype}; ask for dtype={wider}")
    if source.dtype == torch.uint8:
        raise ValueError(f"{what} has a block whose scale is a NaN or an infinity; the file is damaged")
    raise ValueError(f"{what} holds a NaN or an infinity; the file is damaged or the training diverged")


class LateChecks:
    """Questions to a device whose answers are read all at once, so that no tensor waits for its own."""

    def __init__(self) -> None:
        self._answers: list[Tensor] = []
        self._refusals: list[Callable[[], None]] = []

    def add(self, answer: Tensor, refuse: Callable[[], None]) -> None:
        """``answer``: bool [] on the device. ``refuse`` raises where it is False; it must hold no weight."""
        self._answers.append(answer)
        self._refusals.append(refuse)

    def settle(self) -> None:
        """Wait for the answers, if there are any, and raise for the first False."""
        if self._answers:
            for answer, refuse in zip(torch.stack(self._answers).tolist(), self._refusals, strict=True):
                if not answer:
                    refuse()
