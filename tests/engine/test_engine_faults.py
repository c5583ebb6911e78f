"""The engine where things fail: memory at every call in turn, disks, interrupts, hostile requests. Nothing is lost,
nothing leaks, and whoever is not concerned gets the bits that it gets alone."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerskip_kernels import Engine, GenerationConfig, Model, PagedKVCache
from support.generations import KEEP, all_free, alone, same_as_alone
from support.models import cache_for, random_tokens, threads, tiny_model
from support.tokenizers import Letters


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


# ---- memory ----

CACHE = ("add_sequence", "commit", "export", "fork", "swap_in", "swap_out")
POOL = ("add_sequence", "append", "commit", "fork", "publish", "raise_rows")
OPS = ("draft_pass", "filter_logits", "gumbel_argmax", "run_layers", "verify_pass")


class Failing:
    """Stands in for an object: its methods of some names fail once, at the n-th call of any of them."""

    def __init__(self, inner, names, tick):
        self._inner, self._names, self._tick = inner, names, tick

    def __getattr__(self, name):
        found = getattr(self._inner, name)
        return self._ticking(found) if name in self._names else found

    def _ticking(self, call: Callable):
        def ticking(*args, **kwargs):
            self._tick()
            return call(*args, **kwargs)

        return ticking


@pytest.mark.parametrize(("error", "pool_calls"), [
    (MemoryError("no memory"), POOL), (RuntimeError("DefaultCPUAllocator: can't allocate"), ()),
], ids=["Python's", "torch's"])  # fmt: skip
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_memory_that_runs_out_at_every_call_in_turn(preemption, error, pool_calls, monkeypatch):
    """Each request ends once, with its own bits or with the error that is told, and all pages are free again."""
    model = tiny_model(num_layers=2)
    configs = [
        GenerationConfig(exit_layer=1, num_speculations=3, max_new_tokens=9, **KEEP),
        GenerationConfig(exit_layer=1, temperature=0.8, seed=3, max_new_tokens=9, num_samples=2, **KEEP),
        GenerationConfig("autoregressive", max_new_tokens=9, **KEEP),
    ]
    prompts = [random_tokens(9, seed=0), random_tokens(9, seed=1), random_tokens(9, seed=0)]
    expected = {}
    for prompt, config in zip(prompts, configs, strict=True):
        expected[len(expected)] = alone(model, prompt, config)
        if config.num_samples > 1:
            expected[len(expected)] = None  # the second text's tokens: any
    calls = errors = 0
    for n in range(10_000):
        calls = 0

        def tick(n=n):
            nonlocal calls
            calls += 1
            if calls == n + 1:
                raise error

        with monkeypatch.context() as patch:
            failing_ops = Failing(model.ops, OPS, tick)
            patch.setattr(Model, "ops", property(lambda _, ops=failing_ops: ops))
            cache = cache_for(model, 28, page_size=4, prefix_sharing=True)
            cache.pool = Failing(cache.pool, pool_calls, tick)
            for name in CACHE:
                patch.setattr(cache, name, Failing(cache, [name], tick)._ticking(getattr(cache, name)))
            engine = Engine(model, cache, chunk_size=5, drafts="fixed", preemption=preemption)
            ends = ended_outputs(engine, prompts, configs)
        assert sorted(ends) == list(expected), f"call {n}"
        for request_id, output in ends.items():
            if output.finish_reason == "error":
                assert output.error is error
                errors += 1
            elif expected[request_id] is not None:
                assert same_as_alone(output.generation, expected[request_id]), f"request {request_id} at call {n}"
        cache.check_integrity()
        assert (cache.num_free_pages, cache.pool.num_sequences) == (cache.pool.num_pages, 0), f"call {n}"
        if calls <= n:
            break
    assert 50 < n < 10_000 and engine.stats.preemptions > 0
    assert errors < n, "most failures pass, since what failed is tried again"


def ended_outputs(engine, prompts, configs):
    """All requests, added in the first steps, to the end: their last outputs by id, each seen once."""
    ends = {}
    for prompt, config in zip(prompts, configs, strict=True):
        engine.add_samples(prompt, config)
        keep_ended(engine.step(), ends)
    for _ in range(1000):
        if not engine.num_unfinished:
            return ends
        keep_ended(engine.step(), ends)
    raise AssertionError("the engine does not come to an end")


def keep_ended(outputs, ends):
    for output in outputs:
        if output.finish_reason is not None:
            assert output.request_id not in ends
            ends[output.request_id] = output


@pytest.mark.parametrize("name", ["swap_out", "swap_in"])
def test_no_memory_for_swapping_is_a_recomputation(name, monkeypatch):
    """As torch says it: a RuntimeError."""

    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(PagedKVCache, name, full)
    model = tiny_model()
    engine = Engine(model, cache_for(model, 110), chunk_size=16, preemption="swap")
    config = GenerationConfig(max_new_tokens=60, **KEEP)
    prompts = [random_tokens(20, seed=i) for i in range(3)]
    ids = [engine.add_request(prompt, config) for prompt in prompts]
    generations = engine.run()
    assert engine.stats.swap_errors > 0 == engine.stats.swapped_in
    assert all(same_as_alone(generations[i], alone(model, p, config)) for i, p in zip(ids, prompts, strict=True))
    assert all_free(engine)


def test_cancelled_while_its_pages_are_in_a_file(tmp_path):
    model = tiny_model()
    engine = Engine(model, cache_for(model, 110), chunk_size=16, preemption="swap", swap_dir=tmp_path)
    config = GenerationConfig(max_new_tokens=60, **KEEP)
    prompts = [random_tokens(20, seed=i) for i in range(3)]
    ids = [engine.add_request(prompt, config) for prompt in prompts]
    while not engine.stats.swapped_out:
        engine.step()
    [file] = [path for path in tmp_path.rglob("*") if path.is_file()]
    victim = int(file.stem)
    assert engine.cancel(victim)
    assert not file.exists()
    generations = engine.run()
    assert generations[victim].finish_reason == "cancelled" and generations[victim].token_ids
    for request_id, prompt in zip(ids, prompts, strict=True):
        if request_id != victim:
            assert same_as_alone(generations[request_id], alone(model, prompt, config))
    assert all_free(engine)


# ---- interrupts ----


@pytest.fixture
def interruptible():
    """A process that was started in the background may ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("place", ["commit", "_publish"])
def test_ctrl_c_between_what_belongs_together(interruptible, place):
    """While the cache keeps what was accepted, before or after it does: the requests still get it."""
    model, prompts = tiny_model(), [random_tokens(20), random_tokens(9, seed=1)]
    config = GenerationConfig(exit_layer=2, max_new_tokens=30, **KEEP)
    engine = Engine(model, cache_for(model, 200, prefix_sharing=True), drafts="fixed")
    ids = [engine.add_request(prompt, config) for prompt in prompts]
    engine.step()
    inner, interrupts = getattr(engine.cache, place), 0

    def interrupted(*args):
        nonlocal interrupts
        interrupts += 1
        os.kill(os.getpid(), signal.SIGINT)
        return inner(*args)

    setattr(engine.cache, place, interrupted)
    while engine._scheduler.running:
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        assert signal.getsignal(signal.SIGINT) is before
    assert interrupts > 3
    generations = engine.run()
    assert all(same_as_alone(generations[i], alone(model, p, config)) for i, p in zip(ids, prompts, strict=True))
    assert all_free(engine)


# ---- hostile requests ----

HUGE = 2**70
HOSTILE_PROMPTS = [
    [], [101], [-1], [HUGE], [1.5], ["a"], [None], [[1]], [1] * 1025, [1] * 10**6, None, 7, "", b"\xff\xff",
    b"\1\2", bytearray([1, 2]), {1: 2}, {1, 2}, np.array([1.0]), torch.tensor([[1, 2]]),
]  # fmt: skip


@pytest.mark.parametrize("prompt", HOSTILE_PROMPTS, ids=lambda prompt: repr(prompt)[:20])
def test_a_hostile_prompt_is_refused_and_nobody_notices(prompt):
    with_neighbours(lambda engine: engine.add_request(prompt, GenerationConfig(max_new_tokens=4)), refused=True)


HOSTILE_CONFIGS = [
    dict(max_new_tokens=HUGE), dict(num_speculations=HUGE), dict(exit_layer=HUGE), dict(top_k=HUGE),
    dict(temperature=float("inf")), dict(repetition_penalty=float("inf")), dict(presence_penalty=float("-inf")),
    dict(frequency_penalty=float("nan")), dict(logit_bias={5: float("nan")}), dict(logit_bias={HUGE: 1.0}),
    dict(stop_token_ids=(HUGE,)), dict(eos_token_ids=(HUGE,)), dict(stop=("x" * 10_000,)), dict(stop=("",)),
    dict(seed=HUGE), dict(logprobs=HUGE), dict(num_samples=HUGE),
]  # fmt: skip


@pytest.mark.parametrize("settings", HOSTILE_CONFIGS, ids=lambda settings: repr(settings)[:40])
def test_a_hostile_setting_is_refused(settings):
    with_neighbours(lambda engine: engine.add_request([1, 2], GenerationConfig(**settings)), refused=True)


EXTREME_CONFIGS = [
    dict(logit_bias={i: -1e6 for i in range(101)}), dict(logit_bias={7: 1e6}), dict(temperature=1e6, top_p=0.0),
    dict(temperature=1e-4), dict(repetition_penalty=100.0, frequency_penalty=-100.0, temperature=1.0),
    dict(temperature=1.0, min_p=1.0, top_k=1), dict(min_new_tokens=64, stop_token_ids=tuple(range(101))),
    dict(stop=("ab" * 500,) * 16), dict(temperature=1.0, logprobs=100),
]  # fmt: skip


@pytest.mark.parametrize("settings", EXTREME_CONFIGS, ids=lambda settings: repr(settings)[:40])
def test_an_extreme_setting_concerns_its_request_alone(settings):
    with_neighbours(lambda engine: engine.add_request([1, 2], GenerationConfig(exit_layer=1, **settings)))


@pytest.mark.parametrize("salt", [5, HUGE, "\ud800", b"x" * 10**6], ids=["int", "huge", "surrogate", "long"])
def test_a_hostile_salt_concerns_its_request_alone(salt):
    config = GenerationConfig(max_new_tokens=4)
    with_neighbours(lambda engine: engine.add_request([1, 2], config, salt=salt), refused=not isinstance(salt, bytes))


def with_neighbours(add, refused=False):
    """Two requests before and after a hostile one get what they get alone; it is refused, or ends somehow."""
    model = replace(tiny_model(), tokenizer=Letters())
    config = GenerationConfig(exit_layer=2, max_new_tokens=12, **KEEP)
    engine = Engine(model, cache_for(model, 2200, prefix_sharing=True))
    first = engine.add_request([1, 2, 3], config)
    engine.step()
    hostile = None
    if refused:
        with pytest.raises((ValueError, TypeError)):
            add(engine)
    else:
        hostile = add(engine)
    second = engine.add_request([1, 2, 3, 4], config)
    generations = engine.run()
    assert set(generations) == {first, second, *([hostile] if hostile is not None else [])}
    for request_id, prompt in ((first, [1, 2, 3]), (second, [1, 2, 3, 4])):
        assert same_as_alone(generations[request_id], alone(model, prompt, config))
    assert all_free(engine)


def test_numbers_of_other_libraries_are_token_ids():
    model = tiny_model()
    for prompt in (np.array([3, 1, 2]), torch.tensor([3, 1, 2]), (3, 1, 2), range(1, 4)):
        engine = Engine(model, cache_for(model, 64))
        request_id = engine.add_request(prompt, GenerationConfig(max_new_tokens=6, **KEEP))
        answer = alone(model, [int(token) for token in prompt], GenerationConfig(max_new_tokens=6))
        assert same_as_alone(engine.run()[request_id], answer)
