"""A cache belongs to one model: every way in refuses another, and none of them hashes the weights for it."""

from dataclasses import replace

import pytest
import torch

from layerskip_kernels import (
    Draft,
    Engine,
    GenerationConfig,
    Model,
    PagedKVCache,
    draft_step,
    generate,
    prefill,
    verify_step,
)
from support.models import cache_for, random_tokens, tiny_model

PROMPT = random_tokens(30)


@pytest.fixture
def mixed_up():
    """A model, a cache of another one of the same shape, and a sequence with its prompt in that cache."""
    model = tiny_model(seed=1)
    cache = cache_for(model, 200, prefix_sharing=True)
    sequence = cache.add_sequence(PROMPT)
    cache.commit(prefill(model, cache, [sequence]))
    return tiny_model(seed=2), cache, sequence


WAYS_IN = {
    "prefill": lambda model, cache, sequence: prefill(model, cache, [cache.add_sequence(PROMPT[:5])]),
    "draft_step": lambda model, cache, sequence: draft_step(model, cache, [sequence], 1, 3),
    "verify_step": lambda model, cache, sequence: verify_step(model, cache, Draft.none([sequence])),
    "Engine": lambda model, cache, sequence: Engine(model, cache),
    "generate": lambda model, cache, sequence: generate(model, [PROMPT], cache=cache),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_cache_of_another_model_is_refused(way, mixed_up):
    _, cache, sequence = mixed_up
    stats, kv = cache.stats(), cache.export(sequence)
    with pytest.raises(ValueError, match=r"made for another model than the 'tiny' .*PagedKVCache\.with_memory"):
        WAYS_IN[way](*mixed_up)
    assert all(map(torch.equal, cache.export(sequence), kv))
    after = cache.stats()
    assert (after.num_cached, after.num_evictions) == (stats.num_cached, stats.num_evictions)
    cache.check_integrity()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: replace(model, config=replace(model.config, rms_norm_eps=1e-3)),
        lambda model: replace(model, backend="reference"),
        lambda model: tiny_model(seed=1),  # equal weights, loaded twice
    ],
    ids=["config", "backend", "loaded twice"],
)
def test_what_makes_another_model(change):
    model = tiny_model(seed=1)
    cache = cache_for(model, 100)
    with pytest.raises(ValueError, match="made for another model"):
        cache.check_model(change(model))


def test_a_copy_with_another_draft_vocabulary_is_the_same_model():
    """What was computed by one is continued by the other, from shared pages, with the bits of plain decoding."""
    model = tiny_model()
    few = replace(model.with_draft_vocab(range(0, 101, 2)), name="renamed", defaults=None)
    config = GenerationConfig(max_new_tokens=20, exit_layer=1, eos_token_ids=(), return_logits=True)
    [plain] = generate(model, [PROMPT], replace(config, strategy="autoregressive", exit_layer=None))
    cache = cache_for(model, 300, prefix_sharing=True)
    for user in (model, few, model):
        [got] = generate(user, [PROMPT], config, cache=cache)
        assert got.token_ids == plain.token_ids and torch.equal(got.logits, plain.logits) and got.drafted > 0
    assert cache.stats().hit_tokens > 0


def test_nothing_hashes_the_weights_before_a_swap_file(monkeypatch, tmp_path):
    def hashed(self: Model) -> bytes:
        raise AssertionError("the weights were hashed")

    model = tiny_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "identity", property(hashed))
        engine = Engine(model, memory=1 << 20)
        request = engine.add_request(PROMPT, GenerationConfig(max_new_tokens=5))
        assert len(engine.run()[request].token_ids) == 5
        cache = PagedKVCache.with_room_for(model, [100], prefix_sharing=True)
        sequence = cache.add_sequence(PROMPT)
        cache.commit(prefill(model, cache, [sequence]))
        cache.swap_in(sequence, cache.swap_out(sequence))
        with pytest.raises(AssertionError, match="hashed"):
            cache.swap_out(sequence, tmp_path / "swapped")
    assert cache.length(sequence) == 30
    cache.swap_in(sequence, cache.swap_out(sequence, tmp_path / "swapped"))
    assert cache.length(sequence) == 30
