"""The cache with its tensors: sharing, forks and swaps change no bit; damage and full disks lose nothing."""

import pytest
import torch
from conftest import cache_for, random_tokens, tiny_model

from layerskip_kernels import PagedKVCache, draft_step, prefill, verify_step


def sharing_cache(model, positions, page_size=4):
    cache = PagedKVCache.with_room_for(model, [positions], page_size, prefix_sharing=True)
    for tensor in cache.tensors:
        tensor.fill_(torch.nan)
    return cache


def decode(model, cache, sequence, count):
    """Decode on, drafting; the logits that each new token was chosen by, fp32 [tokens, V]."""
    logits = []
    while sum(map(len, logits)) < count:
        verdict = verify_step(model, cache, draft_step(model, cache, [sequence], 1, 3))
        cache.commit(verdict)
        logits.append(verdict.new_logits(0))
    return torch.cat(logits)


def run(model, cache, sequence, count=20):
    """Prefill and decode: tokens, the logits of each new one, k and v."""
    verdict = prefill(model, cache, [sequence])
    cache.commit(verdict)
    logits = torch.cat([verdict.new_logits(0), decode(model, cache, sequence, count)])
    cache.check_integrity()
    return sequence.tokens, logits, *cache.export(sequence)


def run_alone(model, prompt, count=20):
    """The same in a cache of its own, without sharing."""
    cache = cache_for(model, len(prompt) + count + 10)
    return run(model, cache, cache.add_sequence(prompt), count)


def assert_same(got, expected):
    assert got[0] == expected[0]
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("page_size", [1, 4, 7])
def test_a_prefix_hit_changes_no_bit(dtype, page_size):
    model, prompt = tiny_model(dtype), random_tokens(30)
    expected = run_alone(model, prompt)
    cache = sharing_cache(model, 160, page_size)
    for _ in range(2):
        sequence = cache.add_sequence(prompt)
        hit = cache.length(sequence)
        assert_same(run(model, cache, sequence), expected)
        cache.free(sequence)
    assert hit == 29 // page_size * page_size
