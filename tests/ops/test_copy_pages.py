"""Copy-on-write: whole pages, every layer and the hidden states, whatever their width in bytes."""

import pytest
import torch

from layerskip_kernels.ops import cache_ops
from support.cache_case import assert_same_cache, make_cache, on_each_device

pytestmark = on_each_device


def pages(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


# Page sizes 7 and 1: spans of no whole 16 bytes; 16: 16 bytes at a time, in batches of words with a rest.
@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
def test_pages_are_copied_whole(dtype, device, page_size):
    cache = make_cache(dtype, device, page_size)
    expected = cache.clone()
    for layer in range(3):
        for target, source in ((4, 0), (2, 0)):
            expected.k[layer, target], expected.v[layer, target] = cache.k[layer, source], cache.v[layer, source]
            expected.hidden[target] = cache.hidden[source]
    cache_ops.copy_pages(pages([0, 1, 0, -1], device), pages([4, -1, 2, 3], device), *cache.tensors, cache.error)
    assert_same_cache(cache, expected)
    cache_ops.check_error(cache.error)


def test_unaligned_tensors_are_copied_too(device):
    """A cache that does not begin at 16 bytes is moved by narrower words."""
    aligned = make_cache(torch.bfloat16, device, page_size=16)
    shifted = [torch.empty(t.numel() + 1, dtype=t.dtype, device=device)[1:].view(t.shape).copy_(t)
               for t in aligned.tensors]  # fmt: skip
    for tensors in (aligned.tensors, shifted):
        cache_ops.copy_pages(pages([1], device), pages([3], device), *tensors, aligned.error)
    assert torch.equal(aligned.k.view(torch.int16), shifted[0].view(torch.int16))
    assert torch.equal(aligned.v[:, 3].view(torch.int16), shifted[1][:, 1].view(torch.int16))
    cache_ops.check_error(aligned.error)


def test_by_indexing_the_same(dtype, device):
    """What CUDA tensors get from a package that was built without its CUDA part."""
    cache = make_cache(dtype, device)
    indexed = cache.clone()
    moves = pages([0, 1, 0, -1], device), pages([4, -1, 2, 3], device)
    cache_ops.copy_pages(*moves, *cache.tensors, cache.error)
    cache_ops.copy_pages_by_indexing(*moves, *indexed.tensors, indexed.error)
    assert_same_cache(cache, indexed)


def test_nothing_to_copy(device):
    cache = make_cache(torch.float32, device)
    before = cache.clone()
    cache_ops.copy_pages(pages([], device), pages([], device), *cache.tensors, cache.error)
    assert_same_cache(cache, before)


@pytest.mark.parametrize(
    ("sources", "targets", "refused", "message"),
    [
        ([0, 5], [1, 2], [1], r"entry 1 of .* names a page outside"),
        ([0, 3], [1, -2], [1], r"entry 1 of .* names a page outside"),
        ([0, 3], [1, 2**31 - 1], [1], r"entry 1 of .* names a page outside"),
        ([0, 3, 4], [1, 2, 2], [1, 2], r"copy 1 of copy_pages touches a page"),
        ([0, 1, 4], [1, 2, 3], [0, 1], r"copy 0 of copy_pages touches a page"),
        ([0, 4], [1, 4], [1], r"copy 1 of copy_pages touches a page"),
    ],
    ids=["source", "negative", "target", "same target", "chain", "itself"],
)
def test_stray_and_clashing_moves_are_refused(device, sources, targets, refused, message):
    cache = make_cache(torch.float16, device)
    expected = cache.clone()
    kept = [n for n in range(len(sources)) if n not in refused]
    cache_ops.copy_pages(
        pages([sources[n] for n in kept], device), pages([targets[n] for n in kept], device), *expected.tensors,
        expected.error,
    )  # fmt: skip
    cache_ops.copy_pages(pages(sources, device), pages(targets, device), *cache.tensors, cache.error)
    assert_same_cache(cache, expected)
    with pytest.raises(ValueError, match=message):
        cache_ops.check_error(cache.error)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.update(targets=a["targets"][:1]), ValueError, r"targets must have the shape \[2\]"),
        (lambda a: a.update(sources=a["sources"].long()), TypeError, "sources must be Int, got Long"),
        (lambda a: a.update(v_cache=a["v_cache"].transpose(-1, -2)), ValueError, "v must have the shape"),
        (lambda a: a.update(hidden_cache=a["hidden_cache"][:, 1:]), ValueError, "hidden must have the shape"),
        (lambda a: a.update(hidden_cache=a["hidden_cache"].float()), TypeError, "hidden must be Half, got Float"),
    ],
)
def test_wrong_tensors_are_refused(device, change, error, message):
    cache = make_cache(torch.float16, device)
    names = ("k_cache", "v_cache", "hidden_cache", "error")
    arguments = dict(sources=pages([0, 1], device), targets=pages([2, 3], device))
    arguments.update(zip(names, (*cache.tensors, cache.error), strict=True))
    change(arguments)
    with pytest.raises(error, match=message):
        cache_ops.copy_pages(**arguments)
