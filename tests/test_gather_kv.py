"""The export of a sequence: its positions in order, whatever the pages."""

import pytest
import torch
from cache_case import make_cache, on_each_device, same_bits

from layerskip_kernels import cache_ops

pytestmark = on_each_device


def by_indexing(cache, pages, length):
    positions = torch.arange(length, device=cache.k.device)
    size = cache.k.size(-1)
    page, offset = pages.long()[positions // size], positions % size
    return cache.k[:, page, :, :, offset].transpose(0, 1), cache.v[:, page, :, offset, :].transpose(0, 1)


@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("pages", [[3, 0, 4], [2, 1, 0, 3, 4, -1]])
def test_as_plain_indexing(dtype, device, page_size, pages):
    cache = make_cache(dtype, device, page_size)
    pages = torch.tensor(pages, dtype=torch.int32, device=device)
    whole = int((pages >= 0).sum()) * page_size
    for length in {0, 1, page_size, max(0, whole - 1), whole}:
        for got, expected in zip(
            cache_ops.gather_kv(pages, length, cache.k, cache.v, cache.error),
            by_indexing(cache, pages, length),
            strict=True,
        ):
            assert same_bits(got, expected.contiguous())
    cache_ops.check_error(cache.error)


@pytest.mark.parametrize(
    ("pages", "length", "message"),
    [
        ([3, 5, 4], 20, "entry 1 of a list of pages or a block table names a page outside"),
        ([3, -1, 4], 20, "entry 1 of a list of pages or a block table names a page outside"),
        ([3], 20, "position 1 .* lies beyond its block table"),
    ],
    ids=["page", "no page", "column"],
)
def test_refused_pages_are_zero(device, pages, length, message):
    cache = make_cache(torch.float32, device)
    got_k, got_v = cache_ops.gather_kv(
        torch.tensor(pages, dtype=torch.int32, device=device), length, cache.k, cache.v, cache.error
    )
    with pytest.raises(ValueError, match=message):
        cache_ops.check_error(cache.error)
    assert not got_k[:, 7:14].any() and not got_v[:, 7:14].any()
    first = by_indexing(cache, torch.tensor([3], device=device), 7)
    assert same_bits(got_k[:, :7].contiguous(), first[0].contiguous())
    assert same_bits(got_v[:, :7].contiguous(), first[1].contiguous())


def test_negative_length(device):
    cache = make_cache(torch.float32, device)
    with pytest.raises(ValueError, match="length must be 0 or more, got -1"):
        cache_ops.gather_kv(torch.zeros(1, dtype=torch.int32, device=device), -1, cache.k, cache.v, cache.error)
