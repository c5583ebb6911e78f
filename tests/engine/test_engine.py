"""The engine: its answers are those of each request alone, nothing is lost, nothing leaks, errors stay at home."""

import random
from dataclasses import replace
from threading import Thread

import pytest
import torch

from layerskip_kernels import CacheFull, Draft, Engine, GenerationConfig, PagedKVCache, verify_step
from layerskip_kernels.decoding.steps import draft_step
from layerskip_kernels.errors import SwapError
from support.generations import KEEP, all_free, alone, drafts_accepted, same_as_alone
from support.models import cache_for, random_tokens, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def random_config(rng: random.Random, **changes) -> GenerationConfig:
    sampled = rng.random() < 0.4
    settings = dict(
        exit_layer=rng.choice([1, 2]),
        num_speculations=rng.randint(1, 7),
        max_new_tokens=rng.randint(1, 40),
        stop_token_ids=tuple(rng.sample(range(101), 2)),
        temperature=rng.choice([0.5, 1.0]) if sampled else 0.0,
        top_k=rng.choice([0, 5]) if sampled else 0,
        repetition_penalty=rng.choice([1.0, 1.3]),
        seed=rng.randrange(2**40) if sampled else None,
        **KEEP,
    )
    config = GenerationConfig(**{**settings, **changes})
    return config.plain() if rng.random() < 1 / 3 else config


# ---- the same bits in any company ----


@pytest.mark.parametrize("seed", range(8))
def test_any_schedule_gives_the_bits_of_each_request_alone(dtype, seed, tmp_path):
    """Random requests at random times through a random engine, short of pages: tokens, logits, K and V.

    Some prompts begin like others, so that pages are shared, copied before a write, evicted.
    """
    rng = random.Random(seed)
    model = tiny_model(dtype)
    cache = cache_for(model, rng.choice([100, 150, 400]), rng.choice([1, 7, 16]), prefix_sharing=rng.random() < 0.7)
    engine = Engine(
        model,
        cache,
        max_batch=rng.randint(1, 6),
        chunk_size=rng.choice([1, 5, 64]),
        drafts=rng.choice(["measured", "fixed"]),
        preemption=rng.choice(["auto", "swap", "recompute"]),
        swap_dir=rng.choice([None, tmp_path]),
    )
    expected, got = {}, {}
    for n in range(10):
        prompt, config = random_tokens(rng.randint(1, 50), seed=rng.choice([seed, n])), random_config(rng)
        salt = rng.choice([None, b"tenant"])
        expected[engine.add_request(prompt, config, salt=salt)] = alone(model, prompt, config)
        for _ in range(rng.randint(0, 6)):
            got.update((output.request_id, output.generation) for output in engine.step() if output.generation)
    got.update(engine.run())
    assert got.keys() == expected.keys()
    for request_id, generation in got.items():
        assert same_as_alone(generation, expected[request_id]), f"request {request_id} of seed {seed}"
    drafted = sum(generation.drafted for generation in got.values())
    assert drafted < 10 or drafts_accepted(got.values()) > 0
    assert all_free(engine)


def test_unlike_requests_share_one_pass(dtype):
    """Plain decoding, two exit layers and a prompt in one call of the backend for verification."""
    model, calls = tiny_model(dtype), []
    engine = Engine(model, cache_for(model, 400), chunk_size=8, drafts="fixed")
    configs = [
        GenerationConfig("autoregressive", max_new_tokens=30, **KEEP),
        GenerationConfig(exit_layer=1, max_new_tokens=30, **KEEP),
        GenerationConfig(exit_layer=2, num_speculations=6, max_new_tokens=30, **KEEP),
    ]
    prompts = [random_tokens(5, seed=i) for i in range(3)]
    ids = [engine.add_request(prompt, config) for prompt, config in zip(prompts, configs, strict=True)]
    for _ in range(3):
        engine.step()
    late = random_tokens(100, seed=9)
    ids.append(engine.add_request(late, configs[0]))

    def counted(model, cache, draft, samplers):
        calls.append([count - waiting for count, waiting in zip(draft.counts, draft.num_waiting, strict=True)])
        return verify_step(model, cache, draft, samplers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerskip_kernels.engine.forward.verify_step", counted)
        outputs = engine.step()
    assert calls == [[0, 4, 6, 8 - 100]]
    assert [output.request_id for output in outputs] == ids[:3]
    generations = {output.request_id: output.generation for output in outputs if output.generation} | engine.run()
    for request_id, prompt, config in zip(ids, [*prompts, late], [*configs, configs[0]], strict=True):
        assert same_as_alone(generations[request_id], alone(model, prompt, config))


def crowd(model, **settings):
    """Four requests that do not fit together, run to the end: the engine, their generations, the answers alone."""
    engine = Engine(model, cache_for(model, 110), chunk_size=16, drafts="fixed", **settings)
    config = GenerationConfig(exit_layer=2, max_new_tokens=60, temperature=0.7, seed=3, **KEEP)
    prompts = [random_tokens(20, seed=i) for i in range(4)]
    ids = [engine.add_request(prompt, config) for prompt in prompts]
    generations = engine.run()
    return engine, [generations[i] for i in ids], [alone(model, prompt, config) for prompt in prompts]


@pytest.mark.parametrize("preemption", ["recompute", "swap", "swap to files", "auto"])
def test_preempted_requests_resume_with_the_same_bits(dtype, preemption, tmp_path):
    settings = dict(preemption=preemption.split()[0], swap_dir=tmp_path if "files" in preemption else None)
    engine, generations, answers = crowd(tiny_model(dtype), **settings)
    stats = engine.stats
    assert stats.preemptions >= 2
    if preemption != "auto":
        expected = stats.preemptions if "swap" in preemption else 0
        assert (stats.swapped_out, stats.swapped_in, stats.swap_errors) == (expected, expected, 0)
    assert all(map(same_as_alone, generations, answers))
    assert all_free(engine)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing"])
def test_a_damaged_swap_file_is_computed_again(fault, tmp_path, monkeypatch):
    swap_out = PagedKVCache.swap_out

    def damaged(cache, sequence, to=None):
        path = swap_out(cache, sequence, to)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[:-9] if fault == "truncated" else content)
        if fault == "missing":
            path.unlink()
        return path

    monkeypatch.setattr(PagedKVCache, "swap_out", damaged)
    engine, generations, answers = crowd(tiny_model(), preemption="swap", swap_dir=tmp_path)
    assert engine.stats.swap_errors == engine.stats.swapped_out > 0
    assert all(map(same_as_alone, generations, answers))
    assert all_free(engine)


def test_a_full_disk_is_no_reason_to_lose_a_request(tmp_path, monkeypatch):
    def full(*_):
        raise SwapError("no space left on device")

    monkeypatch.setattr(PagedKVCache, "swap_out", full)
    engine, generations, answers = crowd(tiny_model(), preemption="swap", swap_dir=tmp_path)
    assert engine.stats.swap_errors == engine.stats.preemptions > 0
    assert all(map(same_as_alone, generations, answers))


def test_a_prompt_seen_before_skips_its_prefill():
    """Also one with a longer beginning in common; another salt shares nothing."""
    model, prompt = tiny_model(), random_tokens(64)
    engine = Engine(model, cache_for(model, 400, prefix_sharing=True), chunk_size=16)
    config = GenerationConfig("autoregressive", max_new_tokens=4, **KEEP)
    answer, steps = alone(model, prompt, config), []
    for salt in (None, None, b"other"):
        request_id, count = engine.add_request(prompt, config, salt=salt), 0
        while engine.num_unfinished:
            [generation] = [output.generation for output in engine.step() if output.generation] or [None]
            count += 1
        steps.append(count)
        assert same_as_alone(generation, answer), request_id
    assert steps == [4 + 3, 1 + 3, 4 + 3]
    assert engine.cache.stats().hit_tokens == 48


def test_several_texts_of_one_prompt():
    """The prompt goes through once; the first is what one alone would be, the others have noise of their own."""
    model, prompt = tiny_model(), random_tokens(30)
    config = GenerationConfig(temperature=1.0, seed=5, max_new_tokens=20, num_samples=3, **KEEP)
    engine = Engine(model, cache_for(model, 400), chunk_size=64)
    ids = engine.add_samples(prompt, config)
    rows = []

    def counted(model, cache, draft, samplers):
        rows.append(
            sum(
                len(s.tokens) + count - waiting - cache.length(s)
                for s, count, waiting in zip(draft.sequences, draft.counts, draft.num_waiting, strict=True)
            )
        )
        return verify_step(model, cache, draft, samplers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerskip_kernels.engine.forward.verify_step", counted)
        generations = engine.run()
    assert rows[:2] == [30, 1 + 2]
    assert same_as_alone(generations[ids[0]], alone(model, prompt, replace(config, num_samples=1)))
    assert len({tuple(generations[i].token_ids) for i in ids}) == 3
    assert all_free(engine)
    with pytest.raises(ValueError, match="add_samples"):
        engine.add_request(prompt, GenerationConfig(num_samples=2))


# ---- nobody is lost ----


def test_a_thousand_requests_with_room_for_four():
    model = tiny_model(num_layers=2)
    rng = random.Random(0)
    engine = Engine(model, PagedKVCache(model, 4 * 3, page_size=8), max_batch=8, chunk_size=16)
    lengths, waiting = {}, 1000
    ended: dict[int, int] = {}
    while waiting or engine.num_unfinished:
        for _ in range(min(waiting, rng.randint(0, 40))):
            waiting -= 1
            config = GenerationConfig(exit_layer=1, max_new_tokens=rng.randint(1, 6))
            config = rng.choice([config, config.plain()])
            request_id = engine.add_request(random_tokens(rng.randint(1, 18), seed=waiting), config)
            lengths[request_id] = config.max_new_tokens
        for output in engine.step():
            if output.generation is not None:
                assert output.request_id not in ended
                assert output.finish_reason == "length"
                ended[output.request_id] = len(output.generation.token_ids)
    assert ended == lengths and len(ended) == 1000
    assert all_free(engine)


def test_cancelled_at_every_stage():
    """Waiting, in its prompt, with its first token, in its text, preempted, over: the others do not notice."""
    model, prompt = tiny_model(), random_tokens(40)
    config = GenerationConfig(exit_layer=1, max_new_tokens=30, **KEEP)
    other = random_tokens(25, seed=1)
    expected = alone(model, other, config)
    for steps in range(14):
        engine = Engine(model, cache_for(model, 110), chunk_size=10, drafts="fixed")
        survivor, victim = engine.add_request(other, config), engine.add_request(prompt, config)
        outputs = [output for _ in range(steps) for output in engine.step()]
        gained = [token for output in outputs if output.request_id == victim for token in output.tokens]
        assert engine.cancel(victim)
        assert not engine.cancel(victim)
        rest = engine.step()
        [end] = [output for output in rest if output.request_id == victim]
        assert (end.finish_reason, end.generation.token_ids) == ("cancelled", gained)
        generations = {o.request_id: o.generation for o in (*outputs, *rest) if o.generation} | engine.run()
        assert same_as_alone(generations[survivor], expected)
        assert all_free(engine)
        assert not engine.cancel(survivor)


def test_the_oldest_is_never_starved():
    """First come, first served: a long request is not overtaken by the short ones after it."""
    model = tiny_model()
    engine = Engine(model, cache_for(model, 96), chunk_size=32)
    engine.add_request(random_tokens(8), GenerationConfig(max_new_tokens=20))
    long = engine.add_request(random_tokens(60), GenerationConfig(max_new_tokens=30))
    short = [engine.add_request(random_tokens(4, seed=i), GenerationConfig(max_new_tokens=20)) for i in range(6)]
    order = list(engine.run())
    assert order.index(long) < min(order.index(request_id) for request_id in short[2:])


# ---- errors stay at home ----


def test_bad_requests_are_refused_and_change_nothing():
    model = tiny_model(max_positions=64)
    engine = Engine(model, cache_for(model, 48))
    good = engine.add_request([1, 2, 3], GenerationConfig(max_new_tokens=8, **KEEP))
    for prompt, config, error, message in [
        ([], {}, ValueError, "empty"),
        ([5, 101], {}, ValueError, "token 1 is 101"),
        ([-1], {}, ValueError, "token 0 is -1"),
        ([1] * 65, {}, ValueError, "65 tokens"),
        ("\ud800", {}, ValueError, "tokenizer"),
        ([1], dict(exit_layer=3), ValueError, "exit_layer"),
        ([1], dict(stop=("x",)), ValueError, "stop_token_ids"),
        ([1], dict(logit_bias={500: 1.0}), ValueError, "500"),
        ([1] * 40, dict(max_new_tokens=10), CacheFull, r"40 tokens and 10 new ones need 4 pages .* has 3"),
    ]:
        with pytest.raises(error, match=message):
            engine.add_request(prompt, GenerationConfig(**config))
    assert engine.num_unfinished == 1
    assert list(engine.run()) == [good]
    assert all_free(engine)


def test_refusal_comes_with_its_numbers():
    model = tiny_model()
    engine = Engine(model, cache_for(model, 48))
    with pytest.raises(CacheFull) as error:
        engine.add_request([1] * 40, GenerationConfig(max_new_tokens=100))
    assert (error.value.needed, error.value.free) == (9, 3)


def test_pages_in_other_hands_are_an_error_not_a_dead_engine():
    """A cache of which somebody else holds most: what does not fit beside it ends with the numbers."""
    model = tiny_model()
    cache = cache_for(model, 96)
    other = cache.add_sequence(random_tokens(60))
    cache.commit(verify_step(model, cache, Draft.none([other])))
    for preemption in ("swap", "recompute"):
        engine = Engine(model, cache, preemption=preemption)
        fits = [engine.add_request([i], GenerationConfig(max_new_tokens=20)) for i in range(3)]
        too_long = engine.add_request([1], GenerationConfig(max_new_tokens=60))
        ends = {}
        while engine.num_unfinished:
            ends.update((output.request_id, output) for output in engine.step() if output.finish_reason)
        assert [ends[request_id].finish_reason for request_id in fits] == ["length"] * 3
        assert (ends[too_long].error.needed, ends[too_long].error.free) == (1, 0)
        assert len(ends[too_long].generation.token_ids) == 32
    cache.free(other)
    assert all_free(engine)


def poisoned(model, token):
    """The model with a token after which every logit is NaN."""
    embedding = model.weights.embedding
    embedding[token // 16, :, token % 16] = torch.nan  # fp32: packed [groups][K][16], column by column
    return model


def test_nan_logits_end_one_request():
    """In the middle of a batch, in its prompt or at its first token: an error for that request, equality for others."""
    config = GenerationConfig(exit_layer=2, max_new_tokens=20, **KEEP)
    prompts = [random_tokens(n, vocab_size=90, seed=n) for n in (5, 9, 30, 12)]
    bad = [[*prompts[0], 100], [100], [*prompts[2][:10], 100, *prompts[2][10:]]]
    expected = [alone(tiny_model(torch.float32), prompt, config) for prompt in prompts]
    assert all(100 not in tokens for tokens, *_ in expected)
    model = poisoned(tiny_model(torch.float32), 100)
    engine = Engine(model, cache_for(model, 600), chunk_size=13, drafts="fixed")
    ids = [engine.add_request(prompt, config) for prompt in (*prompts[:2], *bad, *prompts[2:])]
    ends = {}
    while engine.num_unfinished:
        ends.update((output.request_id, output) for output in engine.step() if output.finish_reason)
    for request_id in ids[2:5]:
        assert ends[request_id].finish_reason == "error"
        assert "NaN" in str(ends[request_id].error)
    for request_id, answer in zip([*ids[:2], *ids[5:]], expected, strict=True):
        assert same_as_alone(ends[request_id].generation, answer)
    assert all_free(engine)


def test_a_draft_that_breaks_is_not_the_requests_error():
    """Plain decoding would never have visited the drafted token, so neither its NaN nor its error exists."""
    config = GenerationConfig(exit_layer=1, num_speculations=5, max_new_tokens=40, **KEEP)
    prompt = random_tokens(20)
    tokens, *_ = expected = alone(tiny_model(torch.float32), prompt, config)
    model = tiny_model(torch.float32)
    cache = cache_for(model, 80)
    sequence = cache.add_sequence(prompt)
    drafted = set()
    while len(sequence.tokens) < 60:
        draft = Draft.none([sequence])
        if cache.length(sequence):
            draft = draft_step(model, cache, [sequence], 1, 5)
            drafted |= set(draft.of(0))
        cache.commit(verify_step(model, cache, draft))
    harmless = sorted(drafted - set(tokens) - set(prompt))
    assert harmless, "a token must be drafted that is never generated"
    engine = Engine(poisoned(model, harmless[0]), cache_for(model, 80), drafts="fixed")
    request_id = engine.add_request(prompt, config)
    assert same_as_alone(engine.run()[request_id], expected)


def test_a_request_without_choices_ends_alone():
    """A sampler's error (every token is excluded) is as private as any other."""
    model = tiny_model()
    engine = Engine(model, cache_for(model, 400))
    banned = GenerationConfig(stop_token_ids=tuple(range(101)), min_new_tokens=2)
    bad = engine.add_request([1, 2], banned)
    good = engine.add_request([3], GenerationConfig(max_new_tokens=5))
    generations = engine.run()
    assert generations[bad].finish_reason == "error"
    assert generations[good].finish_reason == "length"
    with pytest.raises(RuntimeError, match="no token can be chosen"):
        list(engine.stream(engine.add_request([1, 2], banned)))


def test_an_interrupted_step_can_be_repeated():
    """Ctrl-C in the middle of a step: the cache is as before it, and the engine goes on."""
    model, prompt = tiny_model(), random_tokens(20)
    config = GenerationConfig(exit_layer=2, max_new_tokens=30, **KEEP)
    engine = Engine(model, cache_for(model, 200), drafts="fixed")
    request_id = engine.add_request(prompt, config)
    engine.step()

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerskip_kernels.engine.forward.verify_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert same_as_alone(engine.run()[request_id], alone(model, prompt, config))


# ---- streams ----


def test_streams_in_turn_and_from_threads():
    model, config = tiny_model(), GenerationConfig(exit_layer=2, max_new_tokens=30)
    engine = Engine(model, cache_for(model, 400))
    expected = {engine.add_request([i, i + 1], config): alone(model, [i, i + 1], config)[0] for i in range(4)}
    ids, texts = list(expected), {}

    def read(request_id):
        *some, end = engine.stream(request_id)
        texts[request_id] = [token for output in (*some, end) for token in output.tokens]
        assert end.generation.token_ids == texts[request_id]

    read(ids[0])  # drives the others, too; nothing of theirs is lost
    readers = [Thread(target=read, args=(request_id,)) for request_id in ids[1:]]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert texts == expected
    with pytest.raises(ValueError, match="handed out already"):
        list(engine.stream(ids[0]))


def test_a_stream_that_is_left_keeps_nothing_to_itself():
    """Of two outputs that wait, one is taken; the other, which is the end, comes with the next step."""
    model, config = tiny_model(), GenerationConfig("autoregressive", max_new_tokens=5)
    engine = Engine(model, cache_for(model, 64))
    driving, left = engine.add_request([1], replace(config, max_new_tokens=9)), engine.add_request([2], config)
    list(engine.stream(driving))
    first = next(engine.stream(left))
    rest = engine.step()
    tokens = [token for output in (first, *rest) for token in output.tokens]
    assert rest[-1].finish_reason == "length"
    assert tokens == rest[-1].generation.token_ids == alone(model, [2], config)[0]


def test_bad_settings():
    for settings in (dict(max_batch=0), dict(chunk_size=0), dict(drafts="always"), dict(memory=10)):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Engine(tiny_model(), **settings)
