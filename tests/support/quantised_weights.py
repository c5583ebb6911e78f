"""Quantised weights of any bytes, and activations for them."""

import numpy as np
import torch

from layerskip_kernels.ops import reference

BLOCKS = list(reference.BLOCK_TYPES)
TYPES = [*BLOCKS, "int8", "int15"]


def random_weight(name: str, n: int, k: int, seed: int = 0, scales: str = "usual") -> torch.Tensor:
    """Any bytes, codes of -128 among them, with scales that are numbers; or subnormal ones, or zeros."""
    generator = np.random.default_rng(seed)
    if name in ("int8", "int15"):
        numbers = torch.from_numpy(generator.normal(size=(n, k)).astype(np.float32))
        weight = (reference.quantise_int8 if name == "int8" else reference.quantise_int15)(numbers)
        weight[:, : -(-k // 32) * 32 : 7] = torch.iinfo(weight.dtype).min
        return weight
    kind = reference.BLOCK_TYPES[name]
    raw = generator.integers(0, 256, (n, -(-k // kind.size), kind.nbytes), dtype=np.uint8)
    for at in kind.fp16:
        values = generator.normal(size=raw.shape[:2]) * {"usual": 0.1, "subnormal": 2**-22, "zero": 0}[scales]
        raw[..., at : at + 2] = values.astype(np.float16)[..., None].view(np.uint8)
    return torch.from_numpy(raw)


def activations(rows: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))
    return (x * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
