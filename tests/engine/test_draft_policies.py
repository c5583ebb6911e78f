"""Whatever decides how much is drafted, with which exit and where it stops: tokens, logits, K and V are plain's."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from layerskip_kernels import Engine, GenerationConfig, generate
from layerskip_kernels.engine.acceptance import BUCKETS, DraftHistory
from layerskip_kernels.engine.costs import StepRows
from layerskip_kernels.engine.draft_lengths import DraftLengths
from layerskip_kernels.engine.drafts import DraftRequest, Drafts
from layerskip_kernels.engine.expectation import expected_drafts, least_products
from support.generations import KEEP, all_free, alone, drafts_accepted, same_as_alone, same_bits
from support.models import agreeing_model, cache_for, early_model, random_tokens, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

AUTO = dict(exit_layer="auto", num_speculations="auto")


def chance(random):
    """A policy that knows nothing: exits, counts and stops by chance, for every step."""

    def choose(self, requests, prompt=0, judged=0):
        chosen = []
        for request in requests:
            count = random.randint(0, request.max_drafts)
            acceptance = np.array([random.random() for _ in range(BUCKETS)])
            least = np.array([random.random() * 0.7 for _ in range(max(1, count))])
            rule = (acceptance, least) if request.stops and random.random() < 0.8 else ()
            chosen.append(Drafts(random.choice(request.exits), count, *rule))
        return chosen

    return choose


@pytest.mark.parametrize("number", range(8))
def test_any_policy_gives_the_bits_of_plain_decoding(number, dtype, monkeypatch):
    """Greedy and sampled requests, with penalties and without, in one batch."""
    model = agreeing_model(dtype, num_layers=4)
    monkeypatch.setattr(DraftLengths, "choose", chance(Random(number)))
    configs = [
        GenerationConfig(max_new_tokens=24, **AUTO, **KEEP),
        GenerationConfig(max_new_tokens=17, temperature=0.8, seed=number, **AUTO, **KEEP),
        GenerationConfig(max_new_tokens=20, temperature=0.5, top_k=9, seed=number, repetition_penalty=1.2, **KEEP),
        GenerationConfig("autoregressive", max_new_tokens=9, **KEEP),
        GenerationConfig(max_new_tokens=30, exit_layer=2, num_speculations="auto", **KEEP),
    ]
    engine = Engine(model, cache_for(model, 200, page_size=5), chunk_size=7)
    prompts = [random_tokens(3 + 5 * i, seed=i) for i in range(len(configs))]
    ids = [engine.add_request(prompt, config) for prompt, config in zip(prompts, configs, strict=True)]
    generations = engine.run()
    for i, prompt, config in zip(ids, prompts, configs, strict=True):
        assert same_as_alone(generations[i], alone(model, prompt, config))
    assert drafts_accepted(generations.values()) > 10
    assert all_free(engine) and engine.stats.draft_errors == engine.stats.batch_errors == 0


@pytest.mark.parametrize("settings", [{}, dict(temperature=0.7, seed=3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_auto_gives_the_bits_of_plain_decoding(backend, settings, monkeypatch):
    monkeypatch.setattr(DraftLengths, "learn", _as_weighed(DraftLengths.learn))
    model = agreeing_model(backend=backend, num_layers=4, late=0.05)
    config = GenerationConfig(max_new_tokens=40, **AUTO, **settings, **KEEP)
    [plain] = generate(model, [random_tokens(9)], replace(config.plain(), **KEEP))
    for _ in range(2):  # the second time, what drafts are worth is known
        [found] = generate(model, [random_tokens(9)], config)
        assert same_bits(found, plain)
    assert found.accepted > 0


def test_a_sequence_stops_where_its_exit_is_not_confident(monkeypatch):
    """All drafts are right, and those of low confidence are said not to be: drafting stops there and nowhere else."""
    model = early_model(num_layers=3)
    model.weights.final_norm.mul_(5)  # confidences of all kinds
    acceptance = np.array([0.1, 0.1, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0])  # 0.7 is the border

    def choose(self, requests, prompt=0, judged=0):
        return [Drafts(1, min(6, r.max_drafts), acceptance, np.full(6, 0.5)) for r in requests]

    monkeypatch.setattr(DraftLengths, "choose", choose)
    said = []
    learn = DraftLengths.learn

    def noting(self, requests, drafts, accepted, prompt, draft, verify, confidences=None):
        said.extend(zip(drafts, confidences, strict=True))
        learn(self, requests, drafts, accepted, prompt, draft, verify, confidences)

    monkeypatch.setattr(DraftLengths, "learn", noting)
    config = GenerationConfig(max_new_tokens=60, exit_layer=1, num_speculations="auto")
    [generation] = generate(model, [random_tokens(9)], config)
    assert generation.accepted == generation.drafted > 10
    counts = set()
    for (_, count), confidences in said:
        if count and count < 6:
            assert all(c >= 0.7 for c in confidences[:-1])
        counts.add(count)
    assert len(counts) > 2


def test_an_exit_that_is_right_is_found(monkeypatch):
    """The first layer is never right and the second always: every later text drafts with the second."""
    model = early_model(exit_layer=2, num_layers=8, vocab_size=499)
    exits = []
    choose = DraftLengths.choose

    def noting(self, *args):
        chosen = choose(self, *args)
        exits.append([(d.exit_layer, d.count) for d in chosen if d.count])
        return chosen

    monkeypatch.setattr(DraftLengths, "choose", noting)
    monkeypatch.setattr(DraftLengths, "learn", _as_weighed(DraftLengths.learn))
    config = GenerationConfig(max_new_tokens=200, **AUTO)
    for seed in range(3):
        [generation] = generate(model, [random_tokens(9, seed=seed)], config)
    last = [pair for step in exits[-20:] for pair in step]
    assert sum(e == 2 for e, _ in last) > len(last) / 2
    assert generation.accepted > 100


def _as_weighed(learn):
    """Steps take a nanosecond for each weight that passes, however many rows: nothing is timed."""

    def learnt(self, requests, drafts, accepted, prompt, _, __, confidences=None):
        rows = StepRows(tuple(drafts), *prompt)
        draft, verify = (
            sum(p.weights for p in passes) * 1e-9
            for passes in (rows.draft_passes(self.model), rows.verify_passes(self.model))
        )
        learn(self, requests, drafts, accepted, prompt, draft, verify, confidences)

    return learnt


# ---- what is expected of stopping ----


def test_expected_drafts_are_those_of_a_simulation():
    rng = np.random.default_rng(5)
    rates, shares = np.array([[0.15, 0.5, 0.8, 0.97]]), np.array([[0.2, 0.2, 0.25, 0.35]])
    least, most = np.linspace(0.2, 0.6, 8)[None], np.array([7.0])
    made, gained = expected_drafts(rates, shares, least, most)
    count, runs = np.zeros((2, 8)), 20_000
    for _ in range(runs):
        product, right = 1.0, True
        for i in range(7):
            if product < least[0, i]:
                break
            bucket = rng.choice(4, p=shares[0])
            right = right and rng.random() < rates[0, bucket]
            product *= rates[0, bucket]
            count[:, i] += 1, right
    np.testing.assert_allclose(made[0], count[0] / runs, atol=0.05)
    np.testing.assert_allclose(gained[0], count[1] / runs, atol=0.05)


def test_a_draft_that_costs_more_than_it_is_worth_is_not_made():
    least = least_products(np.array([[0.1, 0.6]]), value=1.0, mean=np.array([0.5]))
    assert least.tolist() == [[0.2, 1.2]]
    made, _ = expected_drafts(np.array([[0.9]]), np.array([[1.0]]), least, np.array([2.0]))
    assert made.tolist() == [[1.0, 0.0]]


def test_a_gain_for_one_kind_of_prompt_in_a_mix():
    """Of eight sequences, four are always right and four never: only the former draft."""
    model = tiny_model(num_layers=12, hidden_size=64, intermediate_size=192, vocab_size=1000)
    lengths = DraftLengths(model)
    requests = [DraftRequest((2,), 8, 8, DraftHistory()) for _ in range(8)]
    counts = np.zeros(8)
    prompt = sum(p.weights for p in StepRows((), 32, 1).verify_passes(model)) * 1e-9
    lengths.learn([], [], [], (32, 1), 0.0, prompt)  # so many rows are known to cost no more than one
    for step in range(300):
        chosen = lengths.choose(requests)
        made = [d.count for d in chosen]
        accepted = [count if b < 4 else 0 for b, count in enumerate(made)]
        rows = StepRows(tuple((2, count) for count in made))
        draft, verify = (
            sum(p.weights * max(1.0, p.rows / 32) for p in passes) * 1e-9
            for passes in (rows.draft_passes(model), rows.verify_passes(model))
        )
        said = [[0.9] * count for count in made]
        lengths.learn(requests, rows.drafts, accepted, (0, 0), draft, verify, said)
        counts += made if step >= 200 else 0
    assert counts[:4].min() > 100 and counts[4:].max() < 20
