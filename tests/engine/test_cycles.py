"""Steps that would be alike are cycles of one call: the same texts, counts and outputs, with fewer calls."""

from dataclasses import replace

import pytest

from layerskip_kernels import Engine, GenerationConfig, PagedKVCache, generate, load_model
from layerskip_kernels.engine.drafting import DraftPlanner
from layerskip_kernels.ops.cpu import CpuOps
from support.exit_adapters import random_adapter
from support.models import agreeing_model, random_tokens

PLAIN = GenerationConfig("autoregressive", max_new_tokens=60, eos_token_ids=())
DRAFTED = GenerationConfig(exit_layer=1, num_speculations=3, max_new_tokens=60, eos_token_ids=())
AUTO = replace(DRAFTED, exit_layer="auto", num_speculations="auto")


@pytest.fixture
def calls(monkeypatch):
    """The number of cycles of each decode_pass."""
    found, run = [], CpuOps.decode_pass

    def decode_pass(*args, **named):
        cycles = run(*args, **named)
        found.append(len(cycles))
        return cycles

    monkeypatch.setattr(CpuOps, "decode_pass", decode_pass)
    return found


def in_single_steps(run):
    """What ``run`` gives where every cycle is a call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftPlanner, "MOST_CYCLES", 1)
        return run()


@pytest.mark.parametrize("kind", [None, 1, "mlp"])
@pytest.mark.parametrize("config", [PLAIN, DRAFTED, AUTO], ids=["plain", "drafted", "auto"])
def test_texts_and_counts_are_those_of_single_steps(calls, config, kind):
    model = agreeing_model()
    model = model if kind is None else model.with_exit_adapter(1, random_adapter(model, kind))
    prompts = [random_tokens(n, seed=n) for n in (5, 30)]

    def run():
        return generate(model, prompts, replace(config, return_kv=True))

    single = in_single_steps(run)
    assert max(calls) == 1
    calls.clear()
    together = run()
    assert sum(calls) > 10 and max(calls) > 1
    for one, other in zip(together, single, strict=True):
        assert one.token_ids == other.token_ids and one.finish_reason == other.finish_reason == "length"
        assert all((a == b).all() for a, b in zip(one.kv, other.kv, strict=True))
        if config is not AUTO:
            assert (one.cycles, one.drafted, one.accepted) == (other.cycles, other.drafted, other.accepted)
        assert (one.accepted > 0) == (config is DRAFTED) or config is AUTO
        assert one.verify_seconds > 0


@pytest.mark.parametrize("config", [PLAIN, DRAFTED], ids=["plain", "drafted"])
def test_a_text_ends_where_it_ends(calls, config):
    model, prompt = agreeing_model(), random_tokens(8)
    [whole] = generate(model, [prompt], config)
    ends = [n for n in range(10, 60) if whole.token_ids[n] not in whole.token_ids[:n]]
    assert ends
    for n in ends[:3]:
        for reason, setting in (("eos", "eos_token_ids"), ("stop", "stop_token_ids")):
            calls.clear()
            [ended] = generate(model, [prompt], replace(config, **{setting: (whole.token_ids[n],)}))
            assert ended.token_ids == whole.token_ids[: n + 1] and ended.finish_reason == reason
            assert max(calls) > 1 and ended.cycles <= n
    [short] = generate(model, [prompt], replace(config, max_new_tokens=17, return_kv=True))
    assert short.token_ids == whole.token_ids[:17] and short.kv[0].size(1) == len(prompt) + 16


def test_outputs_come_cycle_by_cycle(calls):
    model = agreeing_model()
    engine = Engine(model, PagedKVCache.with_room_for(model, [100, 100]), drafts="fixed")
    ids = [engine.add_request(random_tokens(9, seed=i), DRAFTED) for i in range(2)]
    outputs = []
    while engine.num_unfinished:
        outputs += engine.step()
    for request_id in ids:
        own = [output for output in outputs if output.request_id == request_id]
        generation = own[-1].generation
        assert [token for output in own for token in output.tokens] == generation.token_ids
        assert all(len(output.tokens) <= output.num_accepted + 1 <= 4 for output in own)
        assert sum(len(output.drafts) for output in own) == generation.drafted > generation.accepted > 0
    assert max(calls) > 1


@pytest.mark.parametrize("changes", [
    dict(temperature=0.8, seed=1), dict(stop=("zzz",)), dict(return_logits=True), dict(logprobs=2),
    dict(repetition_penalty=1.2), dict(min_new_tokens=10, eos_token_ids=(3,)),
], ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_what_must_be_seen_after_each_cycle_is_no_part_of_a_call(calls, changes):
    model = load_model("layerskip-tiny-code") if "stop" in changes else agreeing_model()  # which needs a tokenizer
    generate(model, [random_tokens(5)], replace(PLAIN, max_new_tokens=12, **changes))
    assert not calls


def test_other_requests_are_not_kept_waiting(calls):
    """A call is no longer than CALL_SECONDS by the pace of the cycle before it, and no call has prompts in it."""
    model = agreeing_model()
    engine = Engine(model, PagedKVCache.with_room_for(model, [200] * 3))
    first = engine.add_request(random_tokens(5), replace(PLAIN, max_new_tokens=100))
    for _ in range(4):
        engine.step()
    assert max(calls) == DraftPlanner.MOST_CYCLES
    calls.clear()
    second = engine.add_request(random_tokens(150, seed=2), replace(PLAIN, max_new_tokens=3))
    outputs = engine.step()
    assert not calls and {output.request_id for output in outputs} <= {first, second}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftPlanner, "CALL_SECONDS", 0.0)
        done = engine.run()
        assert max(calls) == 1 and {*done} == {first, second}


def test_a_call_that_fails_is_tried_in_single_steps(monkeypatch):
    model, prompt = agreeing_model(), random_tokens(5)
    [expected] = generate(model, [prompt], PLAIN)

    def fails(*args, **named):
        raise RuntimeError("no cycles today")

    monkeypatch.setattr(CpuOps, "decode_pass", fails)
    engine = Engine(model, PagedKVCache.with_room_for(model, [100]))
    request_id = engine.add_request(prompt, PLAIN)
    with pytest.warns(RuntimeWarning, match="no cycles today"):
        done = engine.run()
    assert done[request_id].token_ids == expected.token_ids and engine.stats.draft_errors > 0


def test_pages_that_run_short_make_single_steps(calls):
    model = agreeing_model()
    prompts = [random_tokens(6, seed=i) for i in range(3)]
    expected = [generate(model, [prompt], PLAIN)[0].token_ids for prompt in prompts]
    calls.clear()
    engine = Engine(model, PagedKVCache(model, 12, page_size=8))
    ids = [engine.add_request(prompt, PLAIN) for prompt in prompts]
    done = engine.run()
    assert [done[i].token_ids for i in ids] == expected
    assert engine.stats.preemptions > 0 and max(calls) > 1
    engine.cache.check_integrity()
