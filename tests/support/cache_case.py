"""What the tests of the cache ops share: devices, and a small cache whose every element is different."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from layerskip_kernels.ops import cache_ops

HAS_GPU = cache_ops.CUDA_MISSING is None and torch.cuda.is_available()
on_each_device = pytest.mark.parametrize("device", ["cpu", "cuda"] if HAS_GPU else ["cpu"])


@dataclass
class Cache:
    k: Tensor  # [L, P, G, K, S]
    v: Tensor  # [L, P, G, S, K]
    hidden: Tensor  # [P, S, D]
    error: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.k, self.v, self.hidden

    def clone(self) -> "Cache":
        return Cache(self.k.clone(), self.v.clone(), self.hidden.clone(), self.error.clone())


def counting(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Random bits, NaN patterns among them: compared with same_bits, so that a changed payload shows."""
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    generator = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(bits)
    return torch.randint(limits.min, limits.max, shape, dtype=bits, generator=generator).view(dtype).to(device)


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = torch.int16 if a.dtype.itemsize == 2 else torch.int32
    return a.shape == b.shape and torch.equal(a.view(bits), b.view(bits))


def make_cache(
    dtype: torch.dtype, device: str, page_size: int = 7, num_pages: int = 5, layers: int = 3, heads: int = 2,
    head_dim: int = 6, hidden_size: int = 10,
) -> Cache:  # fmt: skip
    return Cache(
        counting((layers, num_pages, heads, head_dim, page_size), dtype, device, 1),
        counting((layers, num_pages, heads, page_size, head_dim), dtype, device, 2),
        counting((num_pages, page_size, hidden_size), dtype, device, 3),
        cache_ops.new_error(device),
    )


def assert_same_cache(a: Cache, b: Cache) -> None:
    for one, other in zip(a.tensors, b.tensors, strict=True):
        assert same_bits(one, other)
