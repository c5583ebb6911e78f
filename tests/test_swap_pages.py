"""Pages go out to host memory and come back, to the same pages or to others."""

import pytest
import torch
from cache_case import assert_same_cache, make_cache, on_each_device, same_bits

from layerskip_kernels import cache_ops

pytestmark = on_each_device


def pages(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def swapped_out(cache, numbers):
    device = cache.k.device
    records = cache_ops.new_records(len(numbers), cache.k, cache.hidden)
    cache_ops.swap_out(pages(numbers, device), *cache.tensors, records, cache.error)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return records


@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_a_record_is_a_page_in_order(dtype, device, page_size):
    cache = make_cache(dtype, device, page_size)
    records = swapped_out(cache, [3, 1, 3])
    for record, page in zip(records, (3, 1, 3), strict=True):
        parts = [cache.k[:, page].flatten(), cache.v[:, page].flatten(), cache.hidden[page].flatten()]
        assert same_bits(record, torch.cat(parts).cpu())
    cache_ops.check_error(cache.error)


@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_pages_come_back_elsewhere(dtype, device, page_size):
    cache = make_cache(dtype, device, page_size)
    records = swapped_out(cache, [3, 1])
    expected = cache.clone()
    for page, source in ((0, 3), (4, 1)):
        expected.k[:, page], expected.v[:, page] = cache.k[:, source], cache.v[:, source]
        expected.hidden[page] = cache.hidden[source]
    cache_ops.swap_in(pages([0, 4], device), records, *cache.tensors, cache.error)
    assert_same_cache(cache, expected)
    cache_ops.check_error(cache.error)


def test_skipped_and_stray_pages_are_left_alone(device):
    cache = make_cache(torch.bfloat16, device)
    records = cache_ops.new_records(4, cache.k, cache.hidden).fill_(7)
    cache_ops.swap_out(pages([-1, 5, 2, -2], device), *cache.tensors, records, cache.error)
    with pytest.raises(ValueError, match=r"entry 1 of .* names a page outside the cache"):
        cache_ops.check_error(cache.error)
    assert bool((records[[0, 1, 3]] == 7).all()) and not bool((records[2] == 7).all())
    before = cache.clone()
    cache_ops.swap_in(pages([-1, 5, 2, 2**30], device), records, *cache.tensors, cache.error)
    with pytest.raises(ValueError, match=r"entry 1 of .* names a page outside the cache"):
        cache_ops.check_error(cache.error)
    assert_same_cache(cache, before)  # record 2 was page 2


def test_two_records_for_one_page_are_refused(device):
    cache = make_cache(torch.float32, device)
    records = cache_ops.new_records(3, cache.k, cache.hidden).fill_(7)
    before = cache.clone()
    cache_ops.swap_in(pages([4, 2, 4], device), records, *cache.tensors, cache.error)
    with pytest.raises(ValueError, match="move 0 of copy_pages or swap_in touches"):
        cache_ops.check_error(cache.error)
    assert same_bits(cache.k[:, 4], before.k[:, 4]) and bool((cache.k[:, 2] == 7).all())


def test_records_must_fit(device):
    cache = make_cache(torch.float32, device)
    records = cache_ops.new_records(2, cache.k, cache.hidden)
    for wrong in (records[:1], records[:, 1:]):
        with pytest.raises(ValueError, match=r"records must have the shape \[2, 574\]"):
            cache_ops.swap_out(pages([0, 1], device), *cache.tensors, wrong, cache.error)
    with pytest.raises(TypeError, match="records must be Float, got Half"):
        cache_ops.swap_in(pages([0, 1], device), records.half(), *cache.tensors, cache.error)


def test_a_gpu_needs_pinned_records(device):
    if device == "cpu":
        pytest.skip("host memory is in reach of the CPU")
    cache = make_cache(torch.float32, device)
    records = torch.empty(1, cache_ops.new_records(1, cache.k, cache.hidden).size(1))
    with pytest.raises(ValueError, match="pinned host memory"):
        cache_ops.swap_out(pages([0], device), *cache.tensors, records, cache.error)
