"""Seconds by stage, on which every published speed-up stands, and how much `generate` drafts: by a clock of our own."""

from dataclasses import replace

import pytest

from layerskip_kernels import Engine, GenerationConfig, Model, generate
from layerskip_kernels.engine.draft_lengths import DraftLengths
from layerskip_kernels.model.defaults import DraftDefaults
from support.models import cache_for, checkpoint, config, random_tokens, tiny_model
from support.step_clock import StepClock

pytestmark = pytest.mark.usefixtures("one_thread")


def test_seconds_by_stage(monkeypatch):
    clock = StepClock(monkeypatch)
    drafting = GenerationConfig(exit_layer=1, num_speculations=4, max_new_tokens=21)
    [generation] = generate(tiny_model(), [random_tokens(300)], drafting)
    assert generation.prefill_seconds == 2 * 5.0, "two chunks of the prompt"
    assert clock.drafts > 3
    drafted_each = [4.0] * (generation.drafted // 4)
    assert generation.draft_seconds == 3.0 * (sum(drafted_each) + generation.drafted % 4)
    assert generation.verify_seconds == 5.0 * generation.cycles
    assert generation.tokens_per_second == 20 / (generation.draft_seconds + generation.verify_seconds)


def test_plain_decoding_takes_no_time_to_draft(monkeypatch):
    StepClock(monkeypatch)
    [generation] = generate(tiny_model(), [[1, 2]], GenerationConfig("autoregressive", max_new_tokens=7))
    assert (generation.prefill_seconds, generation.draft_seconds, generation.verify_seconds) == (5.0, 0.0, 30.0)


def test_a_step_is_prefill_for_one_and_decoding_for_another(monkeypatch):
    """Both report the whole of a step that they share."""
    StepClock(monkeypatch)
    model = tiny_model()
    engine = Engine(model, cache_for(model, 400), chunk_size=10, drafts="fixed")
    first = engine.add_request([1], GenerationConfig(exit_layer=1, num_speculations=2, max_new_tokens=2))
    engine.step()
    second = engine.add_request(random_tokens(10), GenerationConfig("autoregressive", max_new_tokens=1))
    generations = engine.run()
    assert (generations[first].draft_seconds, generations[first].verify_seconds) == (0.0, 5.0)
    assert generations[second].prefill_seconds == 5.0


# ---- how much generate drafts ----


def model_whose_drafts_are(right: bool) -> Model:
    """Layers above the first add nothing, so that its drafts are right; or drafts may only be a token that never is."""
    if not right:
        plain = generate(tiny_model(), [[1, 2, 3]], GenerationConfig("autoregressive", max_new_tokens=200))[0]
        return tiny_model().with_draft_vocab([min(set(range(101)) - set(plain.token_ids))])
    whole = checkpoint(config(), tiny_model().dtype)
    for name, tensor in whole.tensors.items():
        if name.startswith(("model.layers.1.", "model.layers.2.")) and ("o_proj" in name or "down_proj" in name):
            tensor.zero_()
    return Model.from_checkpoint(whole)


def seconds_per_token(model: Model, asked: GenerationConfig) -> tuple[float, int]:
    [generation] = generate(model, [[1, 2, 3]], asked)
    return (generation.draft_seconds + generation.verify_seconds) / (len(generation.token_ids) - 1), generation.drafted


@pytest.mark.parametrize("length", [16, 64, 200])
def test_speculation_that_never_helps_costs_next_to_nothing(monkeypatch, length):
    """Out of the box: no measured defaults, nothing said in the config. Fixed drafting would be twice as slow."""
    StepClock(monkeypatch, draft=0.4, verify=1.0, row=0.02)
    model, asked = model_whose_drafts_are(right=False), GenerationConfig(max_new_tokens=length)
    plain, _ = seconds_per_token(model, asked.plain())
    ours, drafted = seconds_per_token(model, asked)
    fixed, _ = seconds_per_token(model, replace(asked, exit_layer=1))
    steps = length - 1
    assert ours * steps < plain * (1.02 * steps + 0.65), "1 %, and 0.6 of a step at the start"
    assert fixed > 2 * plain
    assert drafted or length < 64, "it must have tried"


def test_speculation_that_helps_is_used(monkeypatch):
    StepClock(monkeypatch, draft=0.15, verify=1.0, row=0.02)
    model, asked = model_whose_drafts_are(right=True), GenerationConfig(max_new_tokens=200)
    plain, _ = seconds_per_token(model, asked.plain())
    ours, drafted = seconds_per_token(model, asked)
    assert ours < plain / 1.5 and drafted > 80


@pytest.mark.parametrize(("defaults", "settings", "counts"), [
    (None, dict(exit_layer=1), {4}), (None, dict(num_speculations=3), {3}), (DraftDefaults(2, 6), {}, {6}),
], ids=["exit layer", "number of drafts", "measured defaults"])  # fmt: skip
def test_what_is_said_is_done(monkeypatch, defaults, settings, counts):
    """A config or a model that says how to draft gets that, whatever it costs."""
    StepClock(monkeypatch, draft=9.0)
    lengths = []
    model = replace(tiny_model(), defaults=defaults)
    generate(
        model, [[1, 2, 3]], GenerationConfig(max_new_tokens=60, **settings),
        on_draft=lambda _, drafts, __: lengths.append(len(drafts)),
    )  # fmt: skip
    assert set(lengths[: len(lengths) // 2]) == counts


def test_measured_and_fixed_requests_share_an_engine(monkeypatch):
    """drafts="auto": each request by its own rule."""
    StepClock(monkeypatch, draft=9.0)
    model = model_whose_drafts_are(right=False)
    engine = Engine(model, cache_for(model, 400), drafts="auto")
    open_ = engine.add_request([1, 2, 3], GenerationConfig(max_new_tokens=40))
    fixed = engine.add_request([1, 2, 3], GenerationConfig(max_new_tokens=40, num_speculations=2))
    generations = engine.run()
    assert generations[open_].token_ids == generations[fixed].token_ids
    assert generations[open_].drafted < 5 and generations[fixed].drafted > 70


def test_where_nothing_pays_nothing_is_asked_for_many_steps(monkeypatch):
    """Choosing and learning cost time of their own; a request that joins is asked about at once."""
    StepClock(monkeypatch, draft=9.0)
    asked, choose = [], DraftLengths.choose

    def noting(lengths, requests, *arguments):
        asked.append(len(requests))
        return choose(lengths, requests, *arguments)

    monkeypatch.setattr(DraftLengths, "choose", noting)
    engine = Engine(model := model_whose_drafts_are(right=False), cache_for(model, 800), drafts="auto")
    engine.add_request([1, 2, 3], GenerationConfig(max_new_tokens=200))
    for _ in range(100):
        engine.step()
    assert len(asked) < 40 and set(asked) == {1}
    engine.add_request([4, 5], GenerationConfig(max_new_tokens=200))
    for _ in range(2):
        engine.step()
    assert asked[-1] == 2
    asked.clear()
    engine.run()
    assert 2 in asked and len(asked) < 60
