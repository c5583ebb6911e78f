"""The positions of a sequence in order, out of whatever pages and back into others: export and swaps."""

import pytest
import torch

from layerskip_kernels.ops import cache_ops
from support.cache_case import Cache, assert_same_cache, counting, make_cache, on_each_device, same_bits

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
        ([3, 5, 4], 20, "entry 1 of a list of pages names a page outside"),
        ([3, -1, 4], 20, "entry 1 of a list of pages names a page outside"),
        ([3], 20, "block 1 of a sequence lies beyond its list of pages"),
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


# ---- and back ----


def moved(pages, length, cache, to_host):
    """gather_kv, to the cache's device or into pinned memory."""
    if not to_host or not cache.k.is_cuda:
        return cache_ops.gather_kv(pages, length, cache.k, cache.v, cache.error)
    layers, _, heads, head_dim, _ = cache.k.shape
    shape = layers, length, heads, head_dim
    k, v = (torch.empty(shape, dtype=cache.k.dtype, pin_memory=True) for _ in "kv")
    cache_ops.gather_kv_into(pages, cache.k, cache.v, k, v, cache.error)
    return k, v


@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("to_host", [False, True], ids=["device", "host"])
def test_scattered_is_gathered_again(dtype, device, page_size, to_host):
    """Into other pages of another cache, from any position on; nothing else is written."""
    source, pages = make_cache(dtype, device, page_size), torch.tensor([3, 0, 4], dtype=torch.int32, device=device)
    others = torch.tensor([1, 4, 2, -1], dtype=torch.int32, device=device)
    length = 3 * page_size - (page_size > 1)
    k, v = moved(pages, length, source, to_host)
    cache_ops.check_error(source.error)
    for start in sorted({0, 1, page_size, length - 1, length}):
        target = Cache(*(counting(t.shape, dtype, device, 9) for t in source.tensors), cache_ops.new_error(device))
        expected = target.clone()
        positions = torch.arange(start, length, device=device)
        page, offset = others.long()[positions // page_size], positions % page_size
        expected.k[:, page, :, :, offset] = k[:, start:].transpose(0, 1).to(device)
        expected.v[:, page, :, offset, :] = v[:, start:].transpose(0, 1).to(device)
        indexed = target.clone()
        cache_ops.scatter_kv(others, start, k, v, target.k, target.v, target.error)
        cache_ops.check_error(target.error)
        assert_same_cache(target, expected)
        cache_ops.move_kv_by_indexing(others, start, k, v, indexed.k, indexed.v, False)
        assert_same_cache(indexed, expected)


def test_gathering_by_indexing_the_same(dtype, device):
    """What CUDA tensors get from a package that was built without its CUDA part."""
    cache, pages = make_cache(dtype, device), torch.tensor([3, 0, 4], dtype=torch.int32, device=device)
    expected = cache_ops.gather_kv(pages, 20, cache.k, cache.v, cache.error)
    got = [torch.zeros_like(tensor) for tensor in expected]
    cache_ops.move_kv_by_indexing(pages, 0, *got, cache.k, cache.v, True)
    assert all(map(same_bits, got, expected))


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([3, 5, 4], "entry 1 of a list of pages names a page outside"),
        ([3, -1, 4], "entry 1 of a list of pages names a page outside"),
        ([3], "block 1 of a sequence lies beyond its list of pages"),
    ],
    ids=["page", "no page", "column"],
)
def test_nothing_is_scattered_into_refused_pages(device, pages, message):
    cache = make_cache(torch.float32, device)
    expected = cache.clone()
    k, v = (counting((3, 14, 2, 6), torch.float32, device, seed) for seed in (5, 6))
    first = torch.tensor([3], dtype=torch.int32, device=device)
    cache_ops.scatter_kv(first, 0, k[:, :7].contiguous(), v[:, :7].contiguous(), expected.k, expected.v, expected.error)
    cache_ops.scatter_kv(torch.tensor(pages, dtype=torch.int32, device=device), 0, k, v, cache.k, cache.v, cache.error)
    assert_same_cache(cache, expected)
    with pytest.raises(ValueError, match=message):
        cache_ops.check_error(cache.error)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.update(start=-1), ValueError, r"start must be in 0\.\.9, got -1"),
        (lambda a: a.update(start=10), ValueError, r"start must be in 0\.\.9, got 10"),
        (lambda a: a.update(v=a["v"][:, :8].contiguous()), ValueError, "the positions of v must have the shape"),
        (lambda a: a.update(k=a["k"].half()), TypeError, "the positions of k must be Float, got Half"),
        (lambda a: a.update(k=a["k"].transpose(0, 1)), ValueError, "the positions of k must"),
        (lambda a: a.update(pages=a["pages"].long()), TypeError, "pages must be Int, got Long"),
        (lambda a: a.update(k_cache=a["k_cache"][:, :0]), ValueError, "none of them 0"),
    ],
)
def test_wrong_tensors_are_refused(device, change, error, message):
    cache = make_cache(torch.float32, device)
    k, v = (counting((3, 9, 2, 6), torch.float32, device, seed) for seed in (5, 6))
    pages = torch.tensor([1, 2], dtype=torch.int32, device=device)
    arguments = dict(pages=pages, start=0, k=k, v=v, k_cache=cache.k, v_cache=cache.v, error=cache.error)
    change(arguments)
    with pytest.raises(error, match=message):
        cache_ops.scatter_kv(**arguments)
