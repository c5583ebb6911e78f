"""The engine where the backend's tensors are on another device than the host's (tests/support/two_devices.py)."""

import pytest
import torch

from layerskip_kernels import Engine, GenerationConfig, PagedKVCache, generate
from support.generations import KEEP, all_free, drafts_accepted, same_bits
from support.models import SMALL, agreeing_model, random_tokens
from support.two_devices import on_device

TWO_LAYERS = dict(SMALL, num_layers=2)
PROMPT = random_tokens(4, seed=1)


def engine_of(backend, pages=20, sizes=TWO_LAYERS, **settings):
    model = agreeing_model(backend=backend, **sizes)
    cache = PagedKVCache(model, pages, page_size=3, prefix_sharing=True)
    return Engine(model, cache, drafts="fixed", **settings)


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_a_crowd_gets_the_bits_of_the_cpu_backend(two_devices, preemption):
    """Two exits and plain decoding, greedy and sampled, log-probabilities, prompts in chunks, too few pages."""
    configs = [
        GenerationConfig(exit_layer=1, num_speculations=2, max_new_tokens=5, logprobs=2, **KEEP),
        GenerationConfig(exit_layer=2, num_speculations=1, max_new_tokens=3, temperature=0.7, seed=3, **KEEP),
        GenerationConfig("autoregressive", max_new_tokens=3, **KEEP),
    ]
    runs = []
    for backend in ("triton", "cpu"):
        engine = engine_of(backend, pages=4, sizes=SMALL, chunk_size=2, preemption=preemption)
        ids = [engine.add_request(random_tokens(3, seed=i + 1), config) for i, config in enumerate(configs)]
        generations = engine.run()
        assert engine.stats.preemptions > 0 and engine.stats.swap_errors == 0
        assert (engine.stats.swapped_in > 0) == (preemption == "swap")
        assert all_free(engine)
        runs.append([generations[i] for i in ids])
    device, cpu = runs
    assert all(same_bits(a, b) for a, b in zip(device, cpu, strict=True))
    assert device[0].logprobs == cpu[0].logprobs and len(cpu[0].logprobs) == 5
    assert drafts_accepted(device) == drafts_accepted(cpu) > 0
    assert [g.drafted for g in device] == [g.drafted for g in cpu]
    assert not any(on_device(tensor) for g in device for tensor in (g.logits, *g.kv))


def test_generate_drafts_as_on_the_cpu(two_devices):
    config = GenerationConfig(exit_layer=1, num_speculations=2, max_new_tokens=6)
    device, cpu = (
        generate(agreeing_model(backend=backend, **TWO_LAYERS), [PROMPT, PROMPT[:2]], config)
        for backend in ("triton", "cpu")
    )
    assert [g.token_ids for g in device] == [g.token_ids for g in cpu]
    assert [(g.drafted, g.accepted) for g in device] == [(g.drafted, g.accepted) for g in cpu]
    assert drafts_accepted(device) > 0


def test_several_texts_of_a_prompt_fork_its_pages(two_devices):
    config = GenerationConfig(
        exit_layer=1, num_speculations=1, max_new_tokens=3, num_samples=2, temperature=0.9, seed=5, **KEEP
    )
    runs = []
    for backend in ("triton", "cpu"):
        engine = engine_of(backend)
        ids = engine.add_samples(random_tokens(6, seed=1), config)
        generations = engine.run()
        assert engine.cache.stats().num_copies > 0
        runs.append([generations[i] for i in ids])
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))
    assert runs[0][0].token_ids != runs[0][1].token_ids


def test_cancelling_between_steps(two_devices):
    engine = engine_of("triton")
    config = GenerationConfig(exit_layer=1, num_speculations=2, max_new_tokens=5)
    cancelled, kept = (engine.add_request(PROMPT, config) for _ in range(2))
    for _ in range(2):
        engine.step()
    assert engine.cancel(cancelled)
    generations = engine.run()
    [alone] = generate(agreeing_model(**TWO_LAYERS), [PROMPT], config)
    assert generations[kept].token_ids == alone.token_ids
    assert generations[cancelled].finish_reason == "cancelled"
    assert alone.token_ids[: len(generations[cancelled].token_ids)] == generations[cancelled].token_ids
    assert all_free(engine)


def decoding(config):
    """An engine on the device with two requests of one config, their prompts gone through."""
    engine = engine_of("triton")
    for seed in (1, 2):
        engine.add_request(random_tokens(3, seed=seed), config)
    engine.step()
    return engine


def test_what_a_greedy_cycle_copies_and_waits_for(two_devices):
    """Tokens, counts and the error word come to the host, by one copy; the logits stay on the device."""
    engine = decoding(GenerationConfig(exit_layer=1, num_speculations=1, max_new_tokens=20))
    for _ in range(2):
        engine.step()
    with two_devices.watched() as seen:
        engine.step()
    assert [(copy.shape, copy.blocking) for copy in seen.to_host()] == [((4 * 16,), False)]
    assert [copy.blocking for copy in seen.to_device()] == [False] * 3  # what the two steps read, drafts apart
    assert seen.waits == 1
    assert len(seen.launches) > 20


@pytest.mark.parametrize("drafts", [2, 0])
def test_seconds_are_what_the_device_took(two_devices, drafts):
    """Each kernel takes a second of the device's time, and no call waits but the last."""
    strategy = dict(exit_layer=1, num_speculations=drafts) if drafts else dict(strategy="autoregressive")
    engine = decoding(GenerationConfig(max_new_tokens=20, **strategy))
    generation = engine._requests[0].generation
    before = generation.draft_seconds, generation.verify_seconds
    with two_devices.watched() as seen:
        engine.step()
    last = [i for i, name in enumerate(seen.launches) if name == "_take_draft_kernel"]
    drafting = last[-1] + 1 if drafts else 0
    assert len(last) == drafts
    assert generation.draft_seconds - before[0] == drafting
    assert generation.verify_seconds - before[1] == len(seen.launches) - drafting > 10


def test_logits_are_copied_for_those_who_ask_alone(two_devices):
    """Rows of logits are the large copies."""
    drawn = {"temperature": 0.5, "seed": 1}
    for changes, expected in (
        (drawn | {"top_p": 0.9, "logprobs": 3}, 0),
        (drawn | {"repetition_penalty": 1.3}, 0),
        ({"return_logits": True}, 1),
    ):
        engine = decoding(GenerationConfig("autoregressive", max_new_tokens=5, **changes))
        with two_devices.watched() as seen:
            engine.step()
        large = [copy for copy in seen.to_host() if torch.Size(copy.shape).numel() >= 101]
        assert (len(large) > 0) == bool(expected), (changes, seen.to_host())
