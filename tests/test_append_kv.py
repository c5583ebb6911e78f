"""Rows of K and V go to the slots they are given, and nowhere else."""

import pytest
import torch
from cache_case import counting, make_cache, on_each_device, same_bits

from layerskip_kernels import cache_ops

pytestmark = on_each_device
PAGES = 5


def arguments(dtype, device, rows=4, page_size=7):
    cache = make_cache(dtype, device, page_size, PAGES, layers=1)
    k, v = counting((rows, 2, 6), dtype, device, 4), counting((rows, 2, 6), dtype, device, 5)
    slots = torch.randperm(PAGES * page_size, generator=torch.Generator().manual_seed(rows))[:rows].to(device)
    return k, v, slots, cache.k[0], cache.v[0], cache.error


@pytest.mark.parametrize("rows", [0, 1, 3, 5])
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_rows_reach_their_slots(dtype, device, rows, page_size):
    k, v, slots, k_pages, v_pages, error = arguments(dtype, device, rows, page_size)
    slots[1:2] = -1
    expected_k, expected_v = k_pages.clone(), v_pages.clone()
    kept = slots >= 0
    page, offset = slots[kept] // page_size, slots[kept] % page_size
    expected_k[page, :, :, offset] = k[kept]
    expected_v[page, :, offset] = v[kept]
    cache_ops.append_kv(k, v, slots, k_pages, v_pages, error)
    assert same_bits(k_pages, expected_k) and same_bits(v_pages, expected_v)
    cache_ops.check_error(error)


@pytest.mark.parametrize("slot", [35, 2**40, -2, -(2**63), 2**63 - 1])
def test_stray_slots_are_refused_and_the_others_written(dtype, device, slot):
    k, v, slots, k_pages, v_pages, error = arguments(dtype, device)
    slots[2] = slot
    before = k_pages.clone(), v_pages.clone()
    skipped = slots.clone()
    skipped[2] = -1
    cache_ops.append_kv(k, v, skipped, *before, cache_ops.new_error(device))
    cache_ops.append_kv(k, v, slots, k_pages, v_pages, error)
    assert same_bits(k_pages, before[0]) and same_bits(v_pages, before[1])
    with pytest.raises(ValueError, match=r"slot_mapping\[2\] lies outside the pages"):
        cache_ops.check_error(error)
    cache_ops.check_error(error)  # emptied


def test_the_record_keeps_the_first_refused(device):
    k, v, slots, k_pages, v_pages, error = arguments(torch.float16, device, rows=30)
    slots[5:] = 99
    cache_ops.append_kv(k, v, slots, k_pages, v_pages, error)
    with pytest.raises(ValueError, match=r"slot_mapping\[5\]"):
        cache_ops.check_error(error)


@pytest.mark.parametrize(
    ("index", "change", "error", "message"),
    [
        (0, lambda k: k[:, :1].contiguous(), ValueError, r"the rows of k must have the shape \[4, 2, 6\]"),
        (1, lambda v: v.float(), TypeError, "the rows of v must be BFloat16, got Float"),
        (1, lambda v: v.transpose(0, 1).contiguous().transpose(0, 1), ValueError, "v must be contiguous"),
        (2, lambda s: s.int(), TypeError, "slot_mapping must be Long, got Int"),
        (3, lambda k: k.to(torch.int16), TypeError, "k must be bfloat16, float16 or float32, got Short"),
        (3, lambda k: k[0], ValueError, r"k must have the shape \[P, G, K, S\]"),
        (4, lambda v: v[1:], ValueError, r"v must have the shape \[5, 2, 7, 6\]"),
        (5, lambda e: e.new_zeros(2), ValueError, r"error must have the shape \[1\]"),
    ],
)
def test_wrong_tensors_are_refused(device, index, change, error, message):
    args = list(arguments(torch.bfloat16, device))
    args[index] = change(args[index])
    with pytest.raises(error, match=message):
        cache_ops.append_kv(*args)
