"""Errors that are worked around are counted and warned about: drafting that never works must not look like success."""

import warnings

import pytest
import torch

from layerskip_kernels import Engine, GenerationConfig, generate
from layerskip_kernels.decoding.steps import draft_step, verify_step
from support.generations import KEEP, alone, same_as_alone
from support.models import cache_for, random_tokens, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = GenerationConfig(exit_layer=2, max_new_tokens=12, **KEEP)
MIXED = RuntimeError("expected all tensors on one device")


def failing(*_):
    raise MIXED


def run(engine, prompts):
    ids = [engine.add_request(prompt, CONFIG) for prompt in prompts]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generations = engine.run()
    return [generations[i] for i in ids], [str(warning.message) for warning in caught]


@pytest.mark.parametrize("count", [1, 3])
def test_drafting_that_fails_is_counted_and_warned_about_once(monkeypatch, count):
    model, prompts = tiny_model(), [random_tokens(9, seed=i) for i in range(count)]
    monkeypatch.setattr("layerskip_kernels.engine.forward.draft_step", failing)
    engine = Engine(model, cache_for(model, 400), drafts="fixed")
    generations, messages = run(engine, prompts)
    assert all(same_as_alone(g, alone(model, p, CONFIG)) for g, p in zip(generations, prompts, strict=True))
    assert engine.stats.draft_errors == sum(g.cycles - 1 for g in generations)  # the last token needs no draft
    [message] = messages
    assert engine.stats.batch_errors == 0
    assert str(MIXED) in message and "RuntimeError" in message and "draft_errors" in message
    assert all(g.drafted == 0 for g in generations)


def test_generate_warns_too(monkeypatch):
    monkeypatch.setattr("layerskip_kernels.engine.forward.draft_step", failing)
    with pytest.warns(RuntimeWarning, match="drafting failed where plain decoding succeeded: RuntimeError: expected"):
        generate(tiny_model(), [[1, 2, 3]], CONFIG)


def test_what_fails_only_in_a_batch_is_counted(monkeypatch):
    def alone_only(model, cache, draft, samplers):
        if len(draft.sequences) > 1:
            raise MIXED
        return verify_step(model, cache, draft, samplers)

    model, prompts = tiny_model(), [random_tokens(9, seed=i) for i in range(2)]
    monkeypatch.setattr("layerskip_kernels.engine.forward.verify_step", alone_only)
    engine = Engine(model, cache_for(model, 400), drafts="fixed")
    generations, messages = run(engine, prompts)
    assert all(same_as_alone(g, alone(model, p, CONFIG)) for g, p in zip(generations, prompts, strict=True))
    assert engine.stats.batch_errors > 3 and engine.stats.draft_errors == 0
    [message] = messages
    assert "2 requests failed" in message and str(MIXED) in message


def test_a_request_at_fault_is_no_batch_error():
    """Its error is told in its output; nothing is worked around."""
    model = tiny_model(torch.float32)
    model.weights.embedding[100 // 16, :, 100 % 16] = torch.nan
    engine = Engine(model, cache_for(model, 400), drafts="fixed")
    generations, messages = run(engine, [[100], random_tokens(9, vocab_size=90)])
    assert [g.finish_reason for g in generations] == ["error", "length"]
    assert (engine.stats.batch_errors, messages) == (0, [])


def test_nothing_is_counted_where_nothing_fails():
    model = tiny_model()
    engine = Engine(model, cache_for(model, 400), drafts="fixed")
    generations, messages = run(engine, [random_tokens(9, seed=i) for i in range(3)])
    assert sum(g.accepted for g in generations) > 0
    assert (engine.stats.draft_errors, engine.stats.batch_errors, messages) == (0, 0, [])


def test_one_failed_draft_among_many_is_one(monkeypatch):
    calls = 0

    def once(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MIXED
        return draft_step(*arguments)

    monkeypatch.setattr("layerskip_kernels.engine.forward.draft_step", once)
    model = tiny_model()
    engine = Engine(model, cache_for(model, 400), drafts="fixed")
    [generation], _ = run(engine, [[1, 2, 3]])
    assert engine.stats.draft_errors == 1 and generation.drafted > 0
    assert same_as_alone(generation, alone(model, [1, 2, 3], CONFIG))
