"""Sampling: speculation changes no token, settings do what Transformers does, texts end where they should."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from layerskip_kernels import (
    Draft,
    GenerationConfig,
    PagedKVCache,
    draft_step,
    generate,
    make_sampler,
    prefill,
    verify_step,
)
from layerskip_kernels.decoding.early_exit import early_exit_step
from layerskip_kernels.decoding.sampling import choose_tokens, logit_edits, top_logprobs
from support.generations import KEEP, same_bits, sampled
from support.models import cache_for, random_tokens, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

PENALTIES = dict(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2)
SETTINGS = {
    "temperature": dict(temperature=1.0),
    "filters": dict(temperature=0.8, top_k=30, top_p=0.9, min_p=0.02),
    "penalties": dict(temperature=1.2, logit_bias={3: 2.0, 90: -4.0}, **PENALTIES),
    "all": dict(
        temperature=0.6, top_k=60, top_p=0.97, logit_bias={7: 1.5}, min_new_tokens=6, eos_token_ids=(78,), **PENALTIES
    ),
}  # fmt: skip


EXIT = {"autoregressive": None, "self_speculative": 1}


# ---- exact: the text of plain sampling ----


@pytest.mark.parametrize("name", SETTINGS)
def test_speculation_changes_no_token(name):
    """50 seeds; exits and draft lengths change with them."""
    model, drafted, accepted = tiny_model(), 0, 0
    for seed in range(50):
        config = GenerationConfig(max_new_tokens=10, seed=seed, **SETTINGS[name])
        plain = sampled(model, config.plain())[0]
        speculative = sampled(model, config, exit_layer=1 + seed % 2, num_speculations=1 + seed % 5)[0]
        assert speculative.token_ids == plain.token_ids
        drafted, accepted = drafted + speculative.drafted, accepted + speculative.accepted
    assert 0 < accepted < drafted, "both acceptance and rejection must occur in this test"


@pytest.mark.parametrize("exit_layer", [1, 2])
@pytest.mark.parametrize("num_speculations", [1, 4, 8])
def test_logits_and_kv_are_the_same_too(dtype, exit_layer, num_speculations):
    model = tiny_model(dtype)
    config = GenerationConfig(max_new_tokens=16, seed=5, **SETTINGS["penalties"], **KEEP)
    plain = sampled(model, config.plain())[0]
    assert same_bits(sampled(model, config, exit_layer=exit_layer, num_speculations=num_speculations)[0], plain)


@pytest.mark.parametrize("acceptance", ["exact", "rejection"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_reference_agrees(name, acceptance):
    config = GenerationConfig(exit_layer=1, max_new_tokens=6, seed=1, acceptance=acceptance, **SETTINGS[name], **KEEP)
    cpu, reference = (sampled(tiny_model(backend=backend), config)[0] for backend in ("cpu", "reference"))
    assert same_bits(cpu, reference)
    assert cpu.accepted == reference.accepted


def test_a_draft_vocabulary_changes_no_token():
    """Noise goes by the token's id, not by its place in the list."""
    model = tiny_model()
    accepted = 0
    for seed in range(10):
        config = GenerationConfig(exit_layer=2, max_new_tokens=12, seed=seed, temperature=1.0)
        drafted = sampled(model.with_draft_vocab(range(0, 101, 2)), config)[0]
        assert drafted.token_ids == sampled(model, config.plain())[0].token_ids
        accepted += drafted.accepted
    assert accepted > 10


@pytest.mark.parametrize("acceptance", ["exact", "rejection"])
def test_neighbours_do_not_matter(acceptance):
    model, prompts = tiny_model(), [random_tokens(n, seed=n) for n in (1, 17, 40)]
    config = GenerationConfig(
        exit_layer=2, max_new_tokens=12, seed=3, acceptance=acceptance, **SETTINGS["filters"], **KEEP
    )
    for prompt, generation in zip(prompts, generate(model, prompts, config), strict=True):
        assert same_bits(generation, generate(model, [prompt], config)[0])


def test_greedy_beside_sampled():
    """One batch, a sampler for one of two sequences only: each gets what it gets alone."""
    model, prompts = tiny_model(), [random_tokens(7, seed=1), random_tokens(12, seed=2)]
    config = GenerationConfig(temperature=1.0, seed=4, exit_layer=1, max_new_tokens=12)
    cache = cache_for(model, 100)
    sequences = [cache.add_sequence(prompt) for prompt in prompts]
    samplers = [None, make_sampler(model, config, len(prompts[1]))]
    cache.commit(prefill(model, cache, sequences, samplers))
    for counts in ([3, 2], [0, 4], [4, 0], [1, 1]):
        draft = draft_step(model, cache, sequences, 1, counts, samplers)
        cache.commit(verify_step(model, cache, draft, samplers))
    for sequence, prompt, alone in zip(sequences, prompts, (replace(config, temperature=0.0), config), strict=True):
        gained = sequence.tokens[len(prompt) :]
        assert gained == generate(model, [prompt], alone)[0].token_ids[: len(gained)]


@pytest.mark.parametrize("name", [*SETTINGS, "greedy with penalties"])
def test_drafts_are_what_early_exit_decodes(dtype, name):
    """Each draft counts those before it: a call that drafts five against a step of its own for each."""
    model, exit_layer, prompts = tiny_model(dtype), 2, [random_tokens(n, seed=n) for n in (3, 12, 30)]
    settings = SETTINGS.get(name, dict(logit_bias={3: 2.0}, min_new_tokens=4, **PENALTIES))
    config = GenerationConfig(seed=9, **settings)
    cache = cache_for(model, 200, page_size=7)
    sequences = [cache.add_sequence(prompt) for prompt in prompts]
    samplers = [make_sampler(model, config, 3), make_sampler(model, config, 12, sample=1), None]
    cache.commit(prefill(model, cache, sequences, samplers))
    draft = draft_step(model, cache, sequences, exit_layer, [5, 4, 3], samplers)
    found, histories = [draft.of(b) for b in range(3)], [list(s.tokens) for s in sequences]
    assert draft.confidences.keys() == {0, 1, 2}
    cache.rollback(sequences)
    alone = cache_for(model, 200, page_size=7)
    exits = [alone.add_sequence(history) for history in histories]
    for _ in range(5):
        alone.commit(early_exit_step(model, alone, exits, exit_layer, [0] * 3, samplers))
    for sequence, history, drafts in zip(exits, histories, found, strict=True):
        assert sequence.tokens[len(history) :][: len(drafts)] == drafts


@pytest.mark.parametrize("name", ["penalties", "all"])
def test_drafts_of_samplers_that_edit_logits_take_one_call(name, monkeypatch):
    """Beside those that do not, and what they draft is kept for the rejection rule."""
    model, calls = tiny_model().with_draft_vocab(range(0, 101, 2)), []
    ops = type(model.ops)
    monkeypatch.setattr(ops, "run_layers", lambda *_: calls.append("run_layers"))
    monkeypatch.setattr(ops, "draft_pass", lambda *a, run=ops.draft_pass: (calls.append("draft_pass"), run(*a))[1])
    config = GenerationConfig(seed=9, acceptance="rejection", **SETTINGS[name])
    prompts = [random_tokens(n, seed=n) for n in (3, 12, 30)]
    cache = cache_for(model, 200, page_size=7)
    sequences = [cache.add_sequence(prompt) for prompt in prompts]
    samplers = [
        make_sampler(model, replace(config, **SETTINGS["temperature"]), 3),
        make_sampler(model, config, 12),
        None,
    ]
    cache.commit(prefill(model, cache, sequences, samplers))
    draft = draft_step(model, cache, sequences, 2, [4, 2, 3], samplers)
    assert calls == ["draft_pass"] and draft.counts == [4, 2, 3]
    assert [len(draft.scores[b]) for b in (0, 1)] == [4, 2]
    assert all(row[token].isfinite() for b in (0, 1) for row, token in zip(draft.scores[b], draft.of(b), strict=True))


def test_greedy_with_processors_speculates_exactly():
    model = tiny_model()
    config = GenerationConfig(max_new_tokens=30, exit_layer=2, logit_bias={5: 3.0}, **PENALTIES, **KEEP)
    plain = sampled(model, config.plain())[0]
    assert same_bits(sampled(model, config)[0], plain)
    assert plain.token_ids != sampled(model, GenerationConfig(max_new_tokens=30))[0].token_ids
    assert plain.seed is None


def test_seeds_samples_and_runs():
    model, config = tiny_model(), GenerationConfig(temperature=1.0, max_new_tokens=12, exit_layer=1, seed=8)
    first, again, other = (sampled(model, config, seed=seed)[0].token_ids for seed in (8, 8, 9))
    assert first == again != other
    several = sampled(model, config, num_samples=3)
    assert [g.sample for g in several] == [0, 1, 2]
    assert several[0].token_ids == first
    assert len({tuple(g.token_ids) for g in several}) == 3
    plain = sampled(model, config.plain(), num_samples=3, prompts=[random_tokens(9), [5]])
    assert [g.token_ids for g in plain[:3]] == [g.token_ids for g in several]
    unseeded = [sampled(model, config, seed=None)[0] for _ in range(2)]
    assert unseeded[0].seed != unseeded[1].seed
    assert sampled(model, config, seed=unseeded[0].seed)[0].token_ids == unseeded[0].token_ids


def test_samples_share_the_pages_of_their_prompt():
    """Five texts after 64 tokens in a cache that holds the prompt once; each has the bits it has alone."""
    model, prompt = tiny_model(), random_tokens(64)
    config = GenerationConfig(exit_layer=1, max_new_tokens=12, num_samples=5, seed=6, **SETTINGS["penalties"], **KEEP)
    cache = PagedKVCache(model, num_pages=4 + 5, page_size=16)
    together = generate(model, [prompt], config, cache=cache)
    assert cache.pool.num_sequences == 0
    for sample, generation in enumerate(together):
        alone = PagedKVCache(model, num_pages=5, page_size=16)
        sequence = alone.add_sequence(prompt)
        samplers = [make_sampler(model, config, len(prompt), sample)]
        alone.commit(prefill(model, alone, [sequence], samplers))
        while len(sequence.tokens) < 64 + 12:
            alone.commit(verify_step(model, alone, Draft.none([sequence]), samplers))
        assert sequence.tokens[64:] == generation.token_ids
        assert all(torch.equal(a, b) for a, b in zip(alone.export(sequence), generation.kv, strict=True))
    assert len({tuple(generation.token_ids) for generation in together}) == 5


def test_samples_of_greedy_decoding_are_alike():
    model, config = tiny_model(), GenerationConfig(max_new_tokens=6, num_samples=3)
    several = sampled(model, config, prompts=[[1, 2], [3]])
    for i, prompt in enumerate(([1, 2], [3])):
        expected = sampled(model, config, prompts=[prompt], num_samples=1)[0].token_ids
        assert [g.token_ids for g in several[3 * i : 3 * i + 3]] == [expected] * 3


# ---- processors, against Transformers ----


def processed(model, logits, tokens, prompt_length, drafted=0, **settings):
    """Logits after ``tokens``, of which the last ``drafted`` are not in the edits."""
    known, preceding = tokens[: len(tokens) - drafted], torch.tensor(tokens[len(tokens) - drafted :], dtype=torch.int64)
    sampler = make_sampler(model, GenerationConfig(seed=0, **settings), prompt_length)
    edits = logit_edits([None, sampler], [[1], known])
    rows = torch.tensor([1]), torch.tensor([len(tokens)]), preceding[None]
    edited = model.ops.edit_logits(logits[None], *rows, edits)[0]
    assert torch.equal(model.ops.edit_logits(logits[None], rows[0] * 0, *rows[1:], edits)[0], logits)
    return edited


@pytest.mark.parametrize("drafted", [0, 3, 10])
def test_processors_equal_those_of_transformers(drafted):
    model, tokens = tiny_model(eos_token_ids=(4, 9)), random_tokens(40)
    logits = torch.randn(101, generator=torch.Generator().manual_seed(0)) * 5
    ids, bias = torch.tensor([tokens]), {3: 2.5, 100: -7.0, tokens[0]: 1.0}
    by_transformers = {
        "logit_bias": SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
        "repetition_penalty": RepetitionPenaltyLogitsProcessor(1.7),
        "min_new_tokens": MinNewTokensLengthLogitsProcessor(30, 12, [4, 9]),
    }
    ours = {"logit_bias": bias, "repetition_penalty": 1.7, "min_new_tokens": 12}
    chained = logits[None]
    for name, processor in by_transformers.items():
        assert torch.equal(
            processed(model, logits, tokens, 30, drafted, **{name: ours[name]}), processor(ids, logits[None])[0]
        )
        chained = processor(ids, chained)
    assert torch.equal(processed(model, logits, tokens, 30, drafted, **ours), chained[0])
    assert (chained[0] != logits).sum() > 20


@pytest.mark.parametrize("drafted", [0, 1, 2, 3])
def test_presence_and_frequency_count_what_was_generated(drafted):
    """As OpenAI defines them: mu[j] - c[j] * frequency - (c[j] > 0) * presence; the prompt does not count."""
    model, logits = tiny_model(), torch.arange(101.0)
    scores = processed(model, logits, [5, 6, 6, 7, 7, 7], 3, drafted, presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits.clone()
    expected[7] -= 3 * 0.25 + 0.5
    assert torch.equal(scores, expected)


def test_min_new_tokens_delays_every_end():
    model = tiny_model()
    config = GenerationConfig(seed=2, temperature=1.0, max_new_tokens=20, exit_layer=1)
    free = sampled(model, config)[0].token_ids
    ends = dict(eos_token_ids=(free[1],), stop_token_ids=(free[4],))
    assert len(sampled(model, config, **ends)[0].token_ids) == 2
    delayed = sampled(model, config, min_new_tokens=10, **ends)[0]
    assert len(delayed.token_ids) > 10
    assert not {free[1], free[4]} & set(delayed.token_ids[:10])


def test_stop_tokens_and_end_of_text_have_their_own_reasons():
    model, config = tiny_model(), GenerationConfig(seed=2, temperature=1.0, max_new_tokens=20, exit_layer=1)
    free = sampled(model, config)[0].token_ids
    for setting, reason in (("eos_token_ids", "eos"), ("stop_token_ids", "stop")):
        generation = sampled(model, config, **{setting: (free[6],)})[0]
        assert generation.finish_reason == reason
        assert generation.token_ids == free[: free.index(free[6]) + 1]


# ---- log-probabilities ----


def test_logprobs_are_those_of_the_models_own_logits():
    model = tiny_model()
    config = GenerationConfig(
        seed=2, max_new_tokens=10, exit_layer=1, logprobs=3, return_logits=True, **SETTINGS["filters"]
    )
    generation, plain = sampled(model, config)[0], sampled(model, config.plain())[0]
    assert generation.logprobs == plain.logprobs
    true = generation.logits.double().log_softmax(dim=1)
    for row, token, found in zip(true, generation.token_ids, generation.logprobs, strict=True):
        assert found.token_id == token
        assert abs(found.logprob - float(row[token])) < 1e-6
        assert [i for i, _ in found.top] == row.topk(3).indices.tolist()
        assert max(abs(value - float(row[i])) for i, value in found.top) < 1e-6
    assert sampled(model, config, logprobs=0)[0].logprobs[0].top == ()
    assert sampled(model, config, logprobs=None)[0].logprobs is None


def test_equal_logprobs_come_by_rising_id():
    [found] = top_logprobs(tiny_model().ops, torch.zeros(1, 50), [7], 4)
    assert [token for token, _ in found.top] == [0, 1, 2, 3]


# ---- what can't be ----


@pytest.mark.parametrize(("settings", "error", "message"), [
    (dict(temperature=-1), ValueError, "temperature must be in 0..1e"),
    (dict(temperature=1e-9), ValueError, "temperature must be 0 .greedy. or at least 0.0001"),
    (dict(temperature=float("nan")), ValueError, "temperature must be in 0"),
    (dict(temperature="1"), TypeError, "temperature must be a number"),
    (dict(top_k=-1), ValueError, "top_k must be at least 0"),
    (dict(top_k=1.5), TypeError, "top_k must be an int"),
    (dict(top_p=1.1), ValueError, "top_p must be in 0..1, got 1.1"),
    (dict(min_p=-0.1), ValueError, "min_p must be in 0..1"),
    (dict(repetition_penalty=float("inf")), ValueError, "repetition_penalty must be in 0.01..100, got inf"),
    (dict(repetition_penalty=0), ValueError, "repetition_penalty must be in"),
    (dict(presence_penalty=float("inf")), ValueError, "presence_penalty must be in -100..100, got inf"),
    (dict(frequency_penalty=float("nan")), ValueError, "frequency_penalty must be in -100..100, got nan"),
    (dict(logit_bias={3: float("inf")}), ValueError, "logit_bias of token 3 must be in"),
    (dict(logit_bias={-3: 1.0}), ValueError, "each token id of logit_bias must be at least 0"),
    (dict(logit_bias={"3": 1.0}), TypeError, "each token id of logit_bias must be an int"),
    (dict(logit_bias=[3]), TypeError, "logit_bias must map token ids"),
    (dict(seed=-1), ValueError, "seed must be at least 0"),
    (dict(seed=2**63), ValueError, "seed must be at most"),
    (dict(seed=1.0), TypeError, "seed must be an int"),
    (dict(acceptance="maybe"), ValueError, "acceptance must be one of 'exact', 'rejection'"),
    (dict(logprobs=-1), ValueError, "logprobs must be at least 0"),
    (dict(logprobs=101), ValueError, "logprobs must be at most 100"),
    (dict(num_samples=0), ValueError, "num_samples must be at least 1"),
    (dict(min_new_tokens=65), ValueError, "min_new_tokens must be at most max_new_tokens .64., got 65"),
    (dict(stop_token_ids=(1.0,)), TypeError, "each of stop_token_ids must be an int"),
    (dict(stop={"end"}), TypeError, "stop must be a text or several, got {'end'} .set."),
    (dict(stop={"x" * 10**6}), TypeError, r"^stop must be .{1,200}$"),
    (dict(stop=(3,)), TypeError, "each of stop must be a str"),
    (dict(stop=("",)), ValueError, "each of stop must have 1..1000 characters, got 0"),
    (dict(stop=("x" * 10_000,)), ValueError, "each of stop must have 1..1000 characters, got 10000"),
    (dict(stop=("a",) * 17), ValueError, "stop must hold at most 16 strings, got 17"),
    (dict(stop=("\ud800",)), ValueError, "lone surrogate"),
], ids=str)  # fmt: skip
def test_a_bad_setting_is_named(settings, error, message):
    with pytest.raises(error, match=message):
        GenerationConfig(**settings)


@pytest.mark.parametrize("settings", [
    dict(logit_bias={101: 1.0}), dict(stop_token_ids=(500,)), dict(eos_token_ids=(101,)),
], ids=str)  # fmt: skip
def test_token_ids_outside_the_vocabulary_are_named(settings):
    model, [token] = tiny_model(), [i for ids in settings.values() for i in ids]
    cache = cache_for(model, 64)
    with pytest.raises(ValueError, match=f"must name tokens in 0..100, got {token}"):
        generate(model, [[1]], GenerationConfig(temperature=1.0, max_new_tokens=8, **settings), cache=cache)
    assert cache.pool.num_sequences == 0 and cache.pool.num_free == cache.pool.num_pages


def test_lists_are_taken_for_tuples():
    config = GenerationConfig(eos_token_ids=[2, 7], stop_token_ids=[], stop=["a", "b"])
    assert config == GenerationConfig(eos_token_ids=(2, 7), stop=("a", "b")) and hash(config)
    assert config.stop_strings == ("a", "b")


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match="use stop_token_ids"):
        generate(tiny_model(), [[1]], GenerationConfig(stop=("a",)))


@pytest.mark.parametrize("strategy", ["autoregressive", "self_speculative"])
def test_logits_that_leave_no_choice_leave_the_cache_empty(strategy):
    """Every token but one banned; and a head that gives NaN."""
    model = tiny_model(eos_token_ids=(50,))
    cache = cache_for(model, 80)
    config = GenerationConfig(strategy, exit_layer=EXIT[strategy], temperature=1.0, min_new_tokens=5, max_new_tokens=8,
                              stop_token_ids=tuple(range(101)))  # fmt: skip
    with pytest.raises(RuntimeError, match="no token can be chosen"):
        generate(model, [[1, 2]], config, cache=cache)
    model.weights.final_norm.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="a logit is NaN"):
        generate(model, [[1, 2]], GenerationConfig(strategy, exit_layer=EXIT[strategy], temperature=1.0), cache=cache)
    assert cache.pool.num_sequences == 0 and cache.pool.num_free == cache.pool.num_pages


def test_a_logit_that_overflows_is_an_error():
    model = tiny_model()
    sampler = make_sampler(model, GenerationConfig(temperature=1e-4, seed=0), 0)
    with pytest.raises(RuntimeError, match="The logits overflowed"):
        choose_tokens(model.ops, torch.full((1, 101), 3e38), [sampler], [0])


def test_settings_are_copied():
    bias = {3: 1.0}
    config = GenerationConfig(logit_bias=bias)
    bias[4] = 1.0
    assert config.logit_bias == {3: 1.0}
    assert hash(config) == hash(replace(config))


# ---- cancelling and watching ----


def test_cancelling_returns_what_there_is():
    model, seen = tiny_model(), []
    config = GenerationConfig(temperature=1.0, seed=1, exit_layer=1, max_new_tokens=30, return_logits=True)
    free = sampled(model, config)[0]
    cache = cache_for(model, 64)
    generation = generate(
        model, [random_tokens(9)], config, cache=cache, on_tokens=lambda _, t: seen.extend(t),
        cancelled=lambda: len(seen) >= 7,
    )[0]  # fmt: skip
    assert generation.finish_reason == "cancelled"
    assert 7 <= len(generation.token_ids) < 30
    assert generation.token_ids == seen == free.token_ids[: len(seen)]
    assert len(generation.logits) == len(seen)
    assert cache.pool.num_free == cache.pool.num_pages


def test_drafts_can_be_watched():
    events = []
    config = GenerationConfig(exit_layer=1, max_new_tokens=20)
    [generation] = generate(
        tiny_model(), [random_tokens(9)], config,
        on_tokens=lambda i, tokens: events.append(("tokens", i, tokens)),
        on_draft=lambda i, drafts, accepted: events.append(("draft", i, drafts, accepted)),
    )  # fmt: skip
    drafts = [event for event in events if event[0] == "draft"]
    assert sum(len(event[2]) for event in drafts) == generation.drafted
    assert sum(event[3] for event in drafts) == generation.accepted
    for (kind, _, drafted, accepted), following in zip(
        drafts, (events[events.index(d) + 1] for d in drafts), strict=True
    ):
        assert kind == "draft" and following[2][:accepted] == drafted[:accepted]
