"""Copies between the host and a device, many tensors at a time: a copy takes microseconds whatever its size."""

import torch
from torch import Tensor

__all__ = ["to_device", "to_host"]

ALIGNMENT = 16  # bytes: Triton compiles kernels again for pointers that are aligned to less


def to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on ``device``: those of the host by one copy from pinned memory, which the host does not wait for."""
    if device.type != "cuda":
        return tuple(tensor.to(device) for tensor in tensors)
    given = [tensor for tensor in tensors if tensor.device != device]
    if not given:
        return tensors
    packed = torch.empty(_offsets(given)[-1], dtype=torch.uint8, pin_memory=True)  # torch keeps it until it is copied
    for tensor, part in zip(given, _parts(packed, given), strict=True):
        part.copy_(tensor)
    copied = iter(_parts(packed.to(device, non_blocking=True), given))
    return tuple(next(copied) if tensor.device != device else tensor for tensor in tensors)


def to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies on the CPU of tensors of one device, by one copy. Waits for what the device was asked before."""
    if tensors[0].device.type == "cpu":
        return tuple(tensor.clone() for tensor in tensors)
    packed = torch.empty(_offsets(tensors)[-1], dtype=torch.uint8, device=tensors[0].device)
    for tensor, part in zip(tensors, _parts(packed, tensors), strict=True):
        part.copy_(tensor)
    copied = packed.to("cpu", non_blocking=True)  # to pinned memory
    torch.cuda.current_stream(packed.device).synchronize()
    return tuple(_parts(copied, tensors))


def _offsets(tensors: tuple[Tensor, ...] | list[Tensor]) -> list[int]:
    """Where each tensor begins in the packed bytes, and where the last one ends."""
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
    return offsets


def _parts(packed: Tensor, tensors: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    """The parts of the packed bytes, as tensors like the given ones."""
    return [
        packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(_offsets(tensors), tensors, strict=False)
    ]
