"""Early exit alone is the model cut off after its first layers: the same tokens, logits, K and V, in any company."""

from dataclasses import replace

import pytest
import torch

from layerskip_kernels import Engine, GenerationConfig, Model, PagedKVCache, generate
from layerskip_kernels.decoding.early_exit import early_exit_salt, early_exit_step
from layerskip_kernels.model.checkpoint import Checkpoint
from support.generations import KEEP, all_free, same_bits
from support.models import cache_for, checkpoint, config, random_tokens, tiny_model
from support.tokenizers import Letters

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLED = dict(temperature=0.9, top_k=30, seed=4)


def cut_off(dtype: torch.dtype, layers: int, backend: str = "cpu", weights: str | None = None) -> Model:
    """The tiny model's first layers, its final norm and its head, as a checkpoint of their own."""
    whole = checkpoint(config(), dtype)
    kept = {
        name: tensor
        for name, tensor in whole.tensors.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    short = Checkpoint(config=config(num_layers=layers), tensors=kept, tokenizer=None, name="short", dtype=dtype)
    return Model.from_checkpoint(short, backend, weights)


def early(exit_layer: int, **settings) -> GenerationConfig:
    return GenerationConfig("early_exit", exit_layer, **{**KEEP, **settings})


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("exit_layer", [1, 2])
def test_it_is_the_model_cut_off(dtype, exit_layer, settings):
    prompts = [random_tokens(n, seed=n) for n in (1, 20, 300)]
    ours = generate(tiny_model(dtype), prompts, early(exit_layer, max_new_tokens=12, **settings))
    plain = GenerationConfig("autoregressive", max_new_tokens=12, **KEEP, **settings)
    theirs = generate(cut_off(dtype, exit_layer), prompts, plain)
    assert all(map(same_bits, ours, theirs))
    assert all(g.kv[0].size(0) == exit_layer and g.drafted == 0 for g in ours)
    whole = generate(tiny_model(dtype), prompts, plain)
    assert [g.token_ids for g in ours] != [g.token_ids for g in whole], "all layers say the same: nothing is shown"


def test_every_backend_and_int8_agree():
    config = early(1, max_new_tokens=4)
    for weights in (None, "int8"):
        [expected] = generate(cut_off(torch.bfloat16, 1, weights=weights), [[1, 2, 3]], config_of_plain(config))
        for backend in ("cpu", "reference"):
            [found] = generate(tiny_model(torch.bfloat16, backend, weights=weights), [[1, 2, 3]], config)
            assert same_bits(found, expected)


def config_of_plain(config: GenerationConfig) -> GenerationConfig:
    return replace(config, strategy="autoregressive", exit_layer=None)


def test_a_draft_vocabulary_does_not_restrict_it():
    model, config = tiny_model(), early(2, max_new_tokens=8)
    assert same_bits(
        generate(model, [[1, 2]], config)[0], generate(model.with_draft_vocab(range(5)), [[1, 2]], config)[0]
    )


def test_unlike_depths_share_an_engine_and_no_pages():
    """One prompt by both exits, by drafting and plainly, twice each, with prefix sharing, short of pages."""
    model, prompt = tiny_model(), random_tokens(40)
    configs = [early(1, max_new_tokens=20), early(2, max_new_tokens=20, **SAMPLED)]
    configs += [GenerationConfig(exit_layer=1, max_new_tokens=20, **KEEP)]
    configs += [GenerationConfig("autoregressive", max_new_tokens=20, **KEEP)]
    expected = [generate(model, [prompt], config)[0] for config in configs]
    for preemption in ("swap", "recompute"):
        cache = cache_for(model, 240, prefix_sharing=True)
        engine = Engine(model, cache, chunk_size=16, preemption=preemption)
        ids = [engine.add_request(prompt, config) for config in 2 * configs]
        generations = engine.run()
        assert engine.stats.preemptions > 0 and cache.stats().hit_tokens > 0
        assert all(same_bits(generations[i], e) for i, e in zip(ids, 2 * expected, strict=True))
        assert all_free(engine)


def test_several_samples_and_stop_strings():
    model = replace(tiny_model(), tokenizer=Letters())
    config = early(1, max_new_tokens=20, num_samples=2, **SAMPLED)
    first, second = generate(model, [[1, 2]], config)
    assert first.token_ids != second.token_ids and first.text == Letters().decode(first.token_ids)
    stop = first.text[5:8]
    stopped, _ = generate(model, [[1, 2]], replace(config, stop=stop))
    assert (stopped.text, stopped.finish_reason) == (first.text[: first.text.index(stop)], "stop")


def test_a_salt_cannot_name_an_early_exits_pages():
    assert early_exit_salt(1, None) != early_exit_salt(1, b"") != early_exit_salt(2, b"")
    model, prompt = tiny_model(), random_tokens(40)
    engine = Engine(model, cache_for(model, 400, prefix_sharing=True))
    for salt in (None, b"tenant"):
        for asked in (early(1, max_new_tokens=2), GenerationConfig(max_new_tokens=2)):
            engine.add_request(prompt, asked, salt=salt)
            engine.run()
    assert engine.cache.stats().hit_tokens == 0


def test_a_step_that_fails_leaves_the_cache_as_it_was():
    model = tiny_model(max_positions=8)
    cache = PagedKVCache(model, 2, page_size=4)
    sequence = cache.add_sequence([1] * 8)
    cache.commit(early_exit_step(model, cache, [sequence], 1, [0]))
    sequence.tokens.append(3)
    with pytest.raises(ValueError, match="8 positions"):
        early_exit_step(model, cache, [sequence], 1, [0])
    assert cache.length(sequence) == cache.pool.length(sequence.id) == 8


@pytest.mark.parametrize(("settings", "message"), [
    (dict(strategy="early_exit"), "early_exit' needs exit_layer"),
    (dict(strategy="early_exit", exit_layer=1, num_speculations=3), "num_speculations=3 has no effect"),
    (dict(strategy="early_exit", exit_layer=1, acceptance="rejection"), "acceptance='rejection' has no effect"),
    (dict(strategy="autoregressive", exit_layer=1), "use strategy='early_exit' to stop at that layer"),
    (dict(strategy="autoregressive", num_speculations=2), "num_speculations=2 has no effect"),
    (dict(strategy="autoregressive", acceptance="rejection"), "acceptance='rejection' has no effect"),
    (dict(top_k=5), "top_k=5 has no effect at temperature 0"),
    (dict(top_p=0.5), "top_p=0.5 has no effect at temperature 0"),
    (dict(min_p=0.5), "min_p=0.5 has no effect at temperature 0"),
])  # fmt: skip
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**settings)


def test_an_exit_beyond_the_model_is_refused():
    with pytest.raises(ValueError, match=r"exit_layer must be in 1\.\.2"):
        generate(tiny_model(), [[1]], GenerationConfig("early_exit", 3))


def test_plain_is_the_config_that_drafting_is_compared_with():
    config = GenerationConfig(exit_layer=1, num_speculations=3, temperature=1.0, acceptance="rejection", seed=1)
    assert config.plain() == GenerationConfig("autoregressive", temperature=1.0, seed=1)
