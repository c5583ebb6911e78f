"""The backends: what each op means, and who computes it.

- ``reference``: plain PyTorch, row-major weights. It says what each op means.
- ``cpu``: C++ (csrc/), weights packed by ``pack_weight``. Checks its arguments.
- ``triton``: kernels for GPUs (``triton_ops/``); its passes leave their results on the device.

All three have the names and operands of ``Backend``. Schemas of the C++ ops are in csrc/bindings.cpp, their fakes in
``fakes``; data movement in the cache is in ``cache_ops``.
"""

import os
from functools import cache

import torch

from layerskip_kernels import machine
from layerskip_kernels.config import BACKENDS
from layerskip_kernels.ops import cache_ops, fakes
from layerskip_kernels.ops.backend import Backend
from layerskip_kernels.ops.cpu import CpuOps
from layerskip_kernels.ops.reference import ReferenceOps

__all__ = ["BACKENDS", "Backend", "backend", "cache_ops", "fakes"]

HOST_BACKENDS: dict[str, Backend] = {"cpu": CpuOps(), "reference": ReferenceOps()}


def backend(name: str, device: torch.device | None = None) -> Backend:
    """The ops of a backend, by name; ``device``: of the triton backend's tensors (None: the current one).

    Raises ValueError for a name or a device that does not exist, RuntimeError for a backend that cannot run here.
    """
    if name in HOST_BACKENDS:
        if device is not None and device.type != "cpu":
            raise ValueError(f"backend {name!r} runs on the CPU; device {device} takes backend='triton'")
        return HOST_BACKENDS[name]
    if name == "triton":
        from layerskip_kernels.ops import triton  # Triton is not installed everywhere

        return _triton(triton.device_of(device))
    raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


@cache
def _triton(device: torch.device) -> Backend:
    from layerskip_kernels.ops.triton import TritonOps

    return TritonOps(device)


def _compute_with_one_thread() -> None:
    """OpenMP's threads do not survive a fork, and torch's next parallel region in the child would wait for them."""
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_compute_with_one_thread)  # csrc/cpu/parallel.cpp does the same for our own regions


def _follow_quota() -> None:
    """No more threads than the cgroup's CPU quota pays for, where nobody has chosen how many: torch takes all cores."""
    cpus = machine.usable_cpus()
    untouched = torch.get_num_threads() in (len(cpus), machine.physical_cores(cpus))
    if untouched and "OMP_NUM_THREADS" not in os.environ and machine.cpu_quota() is not None:
        torch.set_num_threads(machine.usable_cores())


_follow_quota()
