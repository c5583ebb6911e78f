"""What ``with_memory`` and ``Engine(memory=)`` take, in bytes: as many pages as fit, and not one byte more."""

import pytest
import torch

from layerskip_kernels import Engine, PagedKVCache
from support.models import tiny_model


def held_bytes(cache: PagedKVCache) -> int:
    return sum(tensor.nbytes for tensor in cache.tensors)


@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_memory_in_bytes(dtype, page_size, backend):
    """K and V of every layer and KV head, and the hidden states: worked out by hand, then counted."""
    model = tiny_model(dtype, backend)
    c = model.config
    position = 2 * c.num_layers * c.num_kv_heads * c.head_dim + c.hidden_size
    page = position * page_size * dtype.itemsize
    for num_bytes, pages in ((page, 1), (10 * page - 1, 9), (10 * page, 10), (10 * page + page // 2, 10)):
        cache = PagedKVCache.with_memory(model, num_bytes, page_size)
        assert cache.pool.num_pages == pages
        assert held_bytes(cache) == pages * page <= num_bytes
    with pytest.raises(ValueError, match=f"at least {page} bytes, one page of this model, got {page - 1}"):
        PagedKVCache.with_memory(model, page - 1, page_size)


def test_an_engine_takes_what_it_is_given():
    model = tiny_model(torch.float32)
    for memory in (200_000, 1_000_000):
        held = held_bytes(Engine(model, memory=memory).cache)
        page = held_bytes(PagedKVCache(model, 1))
        assert memory - page < held <= memory
