"""The promise: self-speculative decoding gives the tokens, logits and KV bytes of plain decoding."""

import pytest
import torch

from layerskip_kernels import CacheFull, GenerationConfig, generate
from layerskip_kernels.model.quantise import WEIGHT_TYPES
from support.generations import KEEP, same_bits
from support.models import cache_for, random_tokens, threads, tiny_model


def plain(model, prompts, **settings):
    return generate(model, prompts, GenerationConfig("autoregressive", **{**KEEP, **settings}))


@pytest.mark.parametrize("num_speculations", range(1, 9))
@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_speculation_changes_no_bit(dtype, exit_layer, num_speculations):
    model, prompt = tiny_model(dtype, num_layers=4), random_tokens(20)
    settings = dict(exit_layer=exit_layer, num_speculations=num_speculations, max_new_tokens=40)
    drafted = generate(model, [prompt], GenerationConfig(**settings, **KEEP))[0]
    assert same_bits(drafted, plain(model, [prompt], max_new_tokens=40)[0])
    assert 0 < drafted.accepted < drafted.drafted, "both acceptance and rejection must occur in this test"


def test_a_draft_vocabulary_changes_no_bit(dtype):
    model, prompt = tiny_model(dtype), random_tokens(20)
    drafted = generate(model.with_draft_vocab(range(0, 101, 2)), [prompt], GenerationConfig(exit_layer=2, **KEEP))[0]
    assert same_bits(drafted, plain(model, [prompt])[0])
    assert drafted.accepted > 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_quantised_weights_change_no_bit_either(one_thread, dtype, weights, tied):
    """Another model than in 16 bits, but the same one in both backends and strategies."""
    models = [tiny_model(dtype, backend, weights=weights, tie_word_embeddings=tied) for backend in ("cpu", "reference")]
    prompt, settings = random_tokens(20), dict(max_new_tokens=12)
    expected = plain(models[1], [prompt], **settings)[0]
    for model in (*models, models[0].with_draft_vocab(range(0, 101, 2))):
        drafted = generate(model, [prompt], GenerationConfig(exit_layer=2, **settings, **KEEP))[0]
        assert same_bits(drafted, expected)
        assert drafted.accepted > 0
    full = plain(tiny_model(dtype, tie_word_embeddings=tied), [prompt], **settings)[0]
    assert not torch.equal(full.logits[0], expected.logits[0])


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match="weights must be None, '16bit' or one of int8, int15, q4_0"):
        tiny_model(weights="int4")


def test_the_reference_agrees(dtype):
    prompt, settings = random_tokens(20), dict(max_new_tokens=12)
    expected = plain(tiny_model(dtype, "reference"), [prompt], **settings)[0]
    for backend in ("cpu", "reference"):
        drafted = generate(tiny_model(dtype, backend), [prompt], GenerationConfig(exit_layer=2, **settings, **KEEP))[0]
        assert same_bits(drafted, expected)
        assert drafted.accepted > 0


def test_every_instruction_set_agrees(dtype, isa):
    expected = plain(tiny_model(dtype, "reference"), [random_tokens(9)], max_new_tokens=10)[0]
    assert same_bits(plain(tiny_model(dtype), [random_tokens(9)], max_new_tokens=10)[0], expected)


@pytest.mark.parametrize("strategy", ["autoregressive", "self_speculative"])
def test_neighbours_do_not_matter(dtype, strategy):
    """A batch of unlike lengths against each of its sequences alone."""
    model = tiny_model(dtype)
    prompts = [random_tokens(n, seed=n) for n in (1, 17, 255, 300)]
    config = GenerationConfig(exit_layer=1, max_new_tokens=30, **KEEP)
    config = config.plain() if strategy == "autoregressive" else config
    together = generate(model, prompts, config)
    for prompt, generation in zip(prompts, together, strict=True):
        assert same_bits(generation, plain(model, [prompt], max_new_tokens=30)[0])


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize("count", [1, 2])
def test_pages_and_threads_do_not_matter(dtype, page_size, count):
    model, prompt = tiny_model(dtype), random_tokens(250)
    expected = plain(model, [prompt], max_new_tokens=20)[0]
    with threads(count):
        cache = cache_for(model, 280, page_size)
        config = GenerationConfig(exit_layer=2, max_new_tokens=20, **KEEP)
        assert same_bits(generate(model, [prompt], config, cache=cache)[0], expected)
    assert cache.pool.num_free == cache.pool.num_pages


def test_another_seed_of_weights_differs():
    """The comparison can fail: other weights give other bits."""
    a, b = (plain(tiny_model(seed=seed), [random_tokens(20)])[0] for seed in (0, 1))
    assert not same_bits(a, b)


def test_stops_at_end_of_text(dtype):
    model, prompt = tiny_model(dtype), random_tokens(20)
    free = plain(model, [prompt], max_new_tokens=30)[0].token_ids
    stop = free[12]
    first = free.index(stop) + 1
    settings = dict(max_new_tokens=30, eos_token_ids=(stop,))
    stopped = plain(model, [prompt], **settings)[0]
    assert (stopped.token_ids, stopped.finish_reason) == (free[:first], "eos")
    for num_speculations in (1, 4, 8):
        config = GenerationConfig(exit_layer=2, num_speculations=num_speculations, **settings, **KEEP)
        assert same_bits(generate(model, [prompt], config)[0], stopped)


def test_stops_at_the_last_position():
    model = tiny_model(max_positions=32)
    for strategy in ("autoregressive", "self_speculative"):
        generation = generate(model, [random_tokens(30)], GenerationConfig(strategy, max_new_tokens=10))[0]
        assert (len(generation.token_ids), generation.finish_reason) == (3, "length")


def test_statistics_add_up():
    generation = generate(tiny_model(), [random_tokens(20)], GenerationConfig(exit_layer=1, max_new_tokens=40))[0]
    assert len(generation.token_ids) == 1 + generation.accepted + generation.cycles == 40
    assert generation.acceptance_rate == generation.accepted / generation.drafted
    assert generation.tokens_per_cycle == 39 / generation.cycles
    assert min(generation.prefill_seconds, generation.draft_seconds, generation.verify_seconds) > 0


def test_tokens_stream_as_they_come():
    seen: dict[int, list[int]] = {0: [], 1: []}
    prompts = [random_tokens(5), random_tokens(9)]
    generations = generate(tiny_model(), prompts, on_tokens=lambda i, tokens: seen[i].extend(tokens))
    assert [generation.token_ids for generation in generations] == [seen[0], seen[1]]


def test_bad_input_leaves_the_cache_empty():
    model = tiny_model()
    cache = cache_for(model, 64)
    with pytest.raises(ValueError, match="token 0 is 500"):
        generate(model, [[1, 2], [500]], GenerationConfig(max_new_tokens=9), cache=cache)
    with pytest.raises(CacheFull):
        generate(model, [random_tokens(100)], cache=cache)
    with pytest.raises(ValueError, match="tokenizer"):
        generate(model, ["text"], cache=cache)
    assert cache.pool.num_sequences == 0
    with pytest.raises(ValueError, match="exit_layer"):
        generate(model, [[1]], GenerationConfig(exit_layer=3), cache=cache)
    assert cache.pool.num_free == cache.pool.num_pages
    assert cache.pool.num_sequences == 0
    assert generate(model, [[1, 2]], GenerationConfig(max_new_tokens=60), cache=cache)[0].token_ids


@pytest.mark.parametrize("prompts", [{"a": 1}, 7, b"ab"], ids=repr)
def test_what_is_no_list_of_prompts_is_refused(prompts):
    with pytest.raises(TypeError, match="prompt"):
        generate(tiny_model(), prompts)
