"""Hostile calls of every op: valid arguments with a few of them bent. As a program it survives all, or shows which.

``python -m support.fuzz_ops FIRST COUNT`` makes the calls with the seeds FIRST to FIRST + COUNT - 1 and prints each
seed before its call, so that the last one printed is the call that ended the process. ``... SEED 1`` repeats one.
"""

import random
import resource
import sys
from collections import Counter
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels.model.quantise import WEIGHT_TYPES
from support.op_arguments import arguments, registered

HOSTILE_INTS = (0, 1, -1, -16, -31, -46, 2**15, 2**31 - 1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63), -(2**63) + 1)
HOSTILE_FLOATS = (0.0, -0.0, -1.0, 1e-45, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))
DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
)
REFUSED = (ValueError, TypeError, RuntimeError, MemoryError)  # NotImplementedError is a RuntimeError
MORE_MEMORY = 4 << 30  # bytes of address space that the calls may take: a size without a bound shows as MemoryError


def bend_values(tensor: Tensor, rng: random.Random) -> Tensor:
    """Some elements, or all, become hostile."""
    bent = tensor.clone()
    if not bent.numel():
        return bent
    flat = bent.view(-1)
    where = slice(None) if rng.random() < 0.3 else rng.randrange(flat.numel())
    if bent.dtype.is_floating_point:
        flat[where] = torch.tensor(rng.choice(HOSTILE_FLOATS)).to(bent.dtype)
    elif bent.dtype != torch.bool:
        limits = torch.iinfo(bent.dtype)
        flat[where] = max(limits.min, min(limits.max, rng.choice(HOSTILE_INTS)))
    return bent


def bend_size(tensor: Tensor, rng: random.Random) -> Tensor:
    """One dimension becomes 0, one less, one more or twice as long."""
    if not tensor.dim():
        return tensor[None]
    dim = rng.randrange(tensor.dim())
    size = tensor.size(dim)
    match rng.randrange(4):
        case 0:
            return tensor.narrow(dim, 0, 0).contiguous()
        case 1:
            return tensor.narrow(dim, 0, max(0, size - 1)).contiguous()
        case 2:
            return torch.cat([tensor, tensor.narrow(dim, 0, min(1, size))], dim)
    return torch.cat([tensor, tensor], dim)


def bend_layout(tensor: Tensor, rng: random.Random) -> Tensor:
    """Other strides, another number of dimensions, another kind of tensor."""
    match rng.randrange(7):
        case 0:
            return tensor.transpose(0, -1) if tensor.dim() > 1 else torch.stack([tensor, tensor], -1)[..., 0]
        case 1:
            return tensor[None]
        case 2:
            return tensor.flatten() if tensor.dim() else tensor[None]
        case 3:
            return tensor[..., ::2] if tensor.dim() else tensor
        case 4:
            return tensor.new_empty(0, 2**40)
        case 5:
            return tensor[:1].expand(2**20, *tensor.shape[1:]) if tensor.dim() else tensor
    return tensor.to_sparse() if tensor.dtype != torch.bool else tensor


def bend_tensor(tensor: Tensor, rng: random.Random) -> Tensor:
    match rng.randrange(6):
        case 0:
            return bend_layout(tensor, rng)
        case 1:
            return tensor.to(rng.choice(DTYPES))
        case 2 | 3:
            return bend_size(tensor, rng)
    return bend_values(tensor, rng)


def bend_list(tensors: list[Tensor], rng: random.Random) -> list[Tensor]:
    bent, i = list(tensors), rng.randrange(len(tensors))
    match rng.randrange(5):
        case 0:
            del bent[i]
        case 1:
            bent.append(bent[i])
        case 2:
            bent[i] = rng.choice(tensors)
        case _:
            bent[i] = bend_tensor(bent[i], rng)
    return bent


def bend(value: Any, others: list[Any], rng: random.Random) -> Any:
    if rng.random() < 0.05:
        return rng.choice(others)
    if isinstance(value, Tensor):
        return bend_tensor(value, rng)
    if isinstance(value, list):
        return bend_list(value, rng)
    if isinstance(value, float):
        return rng.choice(HOSTILE_FLOATS)
    if isinstance(value, int):
        return rng.choice([*HOSTILE_INTS, value - 1, value + 1, 2 * value])
    return None if rng.random() < 0.5 else torch.zeros(rng.randrange(3))


def bend_together(values: list[Any], rng: random.Random) -> None:
    """The same size becomes 0 in every tensor that has it: what single changes would never get past the checks with."""
    sizes = [size for value in values if isinstance(value, Tensor) for size in value.shape if size]
    if not sizes:
        return
    gone = rng.choice(sizes)
    for i, value in enumerate(values):
        if isinstance(value, Tensor) and gone in value.shape:
            values[i] = value.new_empty([0 if size == gone else size for size in value.shape])


def call(seed: int, names: list[str]) -> str:
    """One hostile call; returns what came of it. Raises what no op should raise."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    name = rng.choice(names)
    values = list(arguments(name, rng.choice((None, None, *WEIGHT_TYPES))))
    if rng.random() < 0.3:
        bend_together(values, rng)
    for _ in range(rng.randrange(1, 4)):
        i = rng.randrange(len(values))
        with suppress(Exception):  # what is bent already may not bend that way as well
            values[i] = bend(values[i], values, rng)
    try:
        getattr(torch.ops.layerskip, name)(*values)
    except REFUSED as error:
        return type(error).__name__
    return "done"


def main() -> None:
    first, count = map(int, sys.argv[1:])
    names, outcomes = registered(), Counter()
    arguments(names[0])  # what the first call loads is not counted
    with open("/proc/self/statm") as sizes:
        taken = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MORE_MEMORY, resource.RLIM_INFINITY))
    for seed in range(first, first + count):
        print(seed, flush=True)
        outcomes[call(seed, names)] += 1
    print(dict(outcomes))


if __name__ == "__main__":
    main()
