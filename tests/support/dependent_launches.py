"""What a dependent launch means, interpreted: a kernel begins before the one ahead of it has written anything."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from layerskip_kernels.triton_ops import launch

Memory = list[tuple[torch.UntypedStorage, torch.UntypedStorage]]  # of a kernel's arguments, and what it held


def _held(tensors: list[torch.Tensor]) -> Memory:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return [(storage, storage.clone()) for storage in storages.values()]


def _put_back(memory: Memory) -> None:
    for storage, held in memory:
        storage.copy_(held)


@contextmanager
def dependent_launches(waiting: bool = True) -> Iterator[Counter[str]]:
    """Kernels that may, begin early: what the one ahead wrote comes back at their first wait, unless not ``waiting``.

    Counts them by name. Raises AssertionError for one that ends without a wait.
    """
    begun: Counter[str] = Counter()
    ahead: Memory = []  # before the last kernel
    written: Memory = []  # by it, and not there yet
    interpreted, config_of = InterpretedFunction.run, launch.config_of

    def run(kernel: InterpretedFunction, *args: Any, **options: Any) -> None:
        before = _held([value for value in options.values() if isinstance(value, torch.Tensor)])
        if options.get("DEPENDENT"):
            begun[kernel.fn.__name__] += 1
            written[:] = [(storage, storage.clone()) for storage, _ in ahead]
            _put_back(ahead)
        interpreted(kernel, *args, **options)
        assert not written, f"{kernel.fn.__name__} ended without a wait"
        ahead[:] = before

    def wait() -> None:
        if waiting:
            _put_back(written)
        written.clear()

    with (
        patch.object(InterpretedFunction, "run", run),
        patch.object(tl.extra.cuda, "gdc_wait", wait),
        patch.object(tl.extra.cuda, "gdc_launch_dependents", lambda: None),
        patch.object(launch, "launches_depend", lambda: True),
        patch.object(launch, "config_of", lambda op: replace(config_of(op), dependent=True)),
    ):
        yield begun
