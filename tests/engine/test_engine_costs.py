"""What the engine learns about its own costs, and how far it lets requests draft: simulated, so nothing is timed."""

import random
from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod

import numpy as np
import pytest

from layerskip_kernels.engine.acceptance import EDGES, MIDDLES, Calibration, DraftHistory
from layerskip_kernels.engine.costs import Costs, Pass, StepRows
from layerskip_kernels.engine.draft_lengths import DraftLengths
from layerskip_kernels.engine.drafts import DraftRequest
from layerskip_kernels.model.tensor_names import tensor_shapes
from support.models import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_layers=12, hidden_size=64, intermediate_size=192, vocab_size=1000)


@dataclass
class Machine:
    """Costs nothing more for a few rows, then grows with them; some measurements are far off."""

    free_rows: float = 5.0
    noise: float = 0.05
    seed: int = 0

    def __post_init__(self):
        self.rng = random.Random(self.seed)

    def exact(self, passes) -> float:
        return sum(weights * max(1.0, rows / self.free_rows) for weights, rows in passes) * 1e-10

    def seconds(self, passes) -> float:
        """What is measured."""
        outlier = 10 if self.rng.random() < 0.01 else 1
        return self.exact(passes) * self.rng.uniform(1 - self.noise, 1 + self.noise) * outlier


def test_passes_of_a_step(model):
    """Two exit layers, plain decoding and a prompt: every layer with the rows that reach it."""
    shapes = tensor_shapes(model.config)
    layer = sum(prod(shape) for name, shape in shapes.items() if name.startswith("model.layers.0.") and len(shape) == 2)
    head = 1000 * 64
    rows = StepRows(((4, 2), (4, 1), (6, 3), (1, 0)), prompt=10, judged=1)
    four, six = [(4 * layer + head, 2), (4 * layer + head, 1)], [(6 * layer + head, 1)] * 3
    assert sorted(rows.draft_passes(model)) == sorted(four + six)
    assert rows.verify_passes(model) == [(4 * layer, 14), (2 * layer, 17), (6 * layer, 20), (head, 4 + 6 + 1)]


def test_a_prompt_alone_passes_no_head(model):
    assert len(StepRows((), prompt=7).verify_passes(model)) == 1
    assert [p.rows for p in StepRows((), prompt=7, judged=1).verify_passes(model)] == [7, 1]


def test_costs_converge_to_the_machine():
    machine, costs, rng = Machine(), Costs(), random.Random(1)
    for _ in range(400):
        passes = [Pass(rng.randint(1, 9) * 100_000, rng.choice([1, 2, 4, 5, 8, 16, 40])) for _ in range(3)]
        costs.observe(passes, machine.seconds(passes))
    for rows in (1, 2, 4, 8, 16, 40):
        passes = [Pass(1_000_000, rows)]
        assert costs.seconds(passes) == pytest.approx(machine.exact(passes), rel=0.25), rows


def test_more_rows_never_seem_cheaper():
    costs, rng = Costs(), random.Random(0)
    for _ in range(200):
        costs.observe([Pass(1000, rng.randint(1, 300))], rng.uniform(1e-3, 1e-2))
        seconds = [costs.seconds([Pass(1000, rows)]) for rows in range(1, 300)]
        assert all(b >= a * (1 - 1e-12) for a, b in pairwise(seconds))


def test_acceptance_fades():
    stats = Calibration(0.97)
    for _ in range(50):
        stats.add([0.4] * 4, accepted=4)
    assert stats.mean(0.5, 1) > 0.9
    for _ in range(100):
        stats.add([0.4] * 4, accepted=0)
    assert stats.mean(0.5, 1) < 0.1


def test_calibration_finds_what_a_confidence_is_worth():
    """Drafts of each confidence are right with a probability of their own, which is not the confidence."""
    rng, stats = random.Random(3), Calibration(0.999)
    truth = [0.02, 0.1, 0.15, 0.4, 0.5, 0.75, 0.9, 0.99]
    for _ in range(3000):
        buckets = [rng.randrange(len(truth)) for _ in range(4)]
        accepted = next((i for i, k in enumerate(buckets) if rng.random() >= truth[k]), 4)
        stats.add([float(MIDDLES[k]) for k in buckets], accepted)
    prior = np.full(len(truth), 0.5)
    assert stats.rates(prior, 2.0) == pytest.approx(truth, abs=0.1)
    assert stats.shares(prior / prior.sum(), 2.0) == pytest.approx(np.full(len(truth), 1 / len(truth)), abs=0.05)


def test_only_drafts_up_to_the_first_wrong_one_are_judged():
    stats = Calibration(1.0)
    stats.add([0.4, 0.4, 0.4, 0.4], accepted=1)
    assert (stats.judged, stats.mean(0.0, 0.0)) == (2.0, 0.5)


def confident(rng, right):
    """A confidence that says something about a draft, and not too much."""
    return rng.betavariate(6, 2) if right else rng.betavariate(3, 3)


def simulate(model, machine, batch, acceptance, steps, most=4, exit_layer=4, say=None):
    """Seconds and tokens of ``steps`` steps, and how much was drafted; acceptance may be a function of the step.

    What is learnt is what is measured, outliers and all; what counts are the seconds without noise, since a run that
    happens to see no outlier says nothing about the choice of drafts. ``say``: the confidence of a draft that is right
    or wrong, by which it may stop; None: unknown.
    """
    lengths, rng = DraftLengths(model), random.Random(7)
    requests = [DraftRequest((exit_layer,), most, most, DraftHistory(), say is not None) for _ in range(batch)]
    total = tokens = drafted = 0.0
    for step in range(steps):
        rate = acceptance(step) if callable(acceptance) else acceptance
        made = [follow(chosen, rng, rate, say) for chosen in lengths.choose(requests)]
        counts = [len(right) for right, _ in made]
        accepted = [(*right, False).index(False) for right, _ in made]
        rows = StepRows(tuple((exit_layer, count) for count in counts))
        drafting, verifying = rows.draft_passes(model), rows.verify_passes(model)
        draft_seconds = machine.seconds(drafting) if drafting else 0.0
        said = [confidences if say else None for _, confidences in made]
        lengths.learn(requests, rows.drafts, accepted, (0, 0), draft_seconds, machine.seconds(verifying), said)
        total += machine.exact(drafting) + machine.exact(verifying)
        tokens += batch + sum(accepted)
        drafted += sum(counts)
    return total, tokens, drafted


def follow(chosen, rng, rate, say):
    """What draft_pass makes of a choice: which drafts are right, and how confident the exit was of each."""
    right, confidences, expected = [], [], 1.0
    while len(right) < chosen.count:
        right.append(rng.random() < rate)
        confidences.append(say(rng, right[-1]) if say else 0.0)
        if chosen.acceptance is not None:
            expected *= chosen.acceptance[bisect_right(EDGES, confidences[-1])]
            if expected < chosen.least[len(right) - 1]:
                break
    return right, confidences


@pytest.mark.parametrize("batch", [1, 4, 8, 16])
@pytest.mark.parametrize("acceptance", [0.0, 0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("exit_layer", [2, 4, 8])
@pytest.mark.parametrize("say", [None, confident], ids=["unknown confidence", "confidence"])
def test_never_much_slower_than_plain(model, batch, acceptance, exit_layer, say):
    """From the first step on, whatever the acceptance and the exit; 64 steps and 400, several sequences of events.

    Drafts that are hardly ever right cost 3 % at most. Where some are, a gain is risked again: 4 % of a short text.
    """
    for steps, seed in ((64, 0), (64, 1), (64, 2), (400, 3)):
        run = partial(
            simulate, model, batch=batch, acceptance=acceptance, steps=steps, exit_layer=exit_layer, say=say, most=16
        )
        seconds, tokens, _ = run(Machine(seed=seed))
        plain, plain_tokens, drafted = run(Machine(seed=seed), most=0)
        assert drafted == 0
        limit = 1.03 if acceptance < 0.1 or steps == 400 else 1.04
        assert seconds / tokens < limit * plain / plain_tokens


def test_speculation_where_it_pays(model):
    """Good drafts at batch 1: nearly the speed of the best fixed length."""
    seconds, tokens, drafted = simulate(model, Machine(), 1, 0.9, 400)
    plain, plain_tokens, _ = simulate(model, Machine(), 1, 0.9, 400, most=0)
    assert drafted > 800
    assert tokens / seconds > 1.3 * plain_tokens / plain


def test_no_drafts_where_rows_cost_time(model):
    """Poor drafts in a batch bound by arithmetic: a trial now and then, no more."""
    _, _, drafted = simulate(model, Machine(free_rows=1.0), 16, 0.2, 300)
    assert drafted < 100


def test_a_change_for_the_worse_is_noticed_and_a_better_one_too(model):
    def acceptance(step):
        return 0.9 if step < 200 or step >= 600 else 0.0

    seconds, tokens, _ = simulate(model, Machine(), 1, acceptance, 800)
    plain, plain_tokens, _ = simulate(model, Machine(), 1, acceptance, 800, most=0)
    assert tokens / seconds > 1.05 * plain_tokens / plain
    bad = simulate(model, Machine(), 1, lambda step: 0.9 if step < 200 else 0.0, 260)
    good = simulate(model, Machine(), 1, 0.9, 200)
    bad_time = (bad[0] - good[0]) / (bad[1] - good[1])
    assert bad_time < 1.3 * plain / plain_tokens


def test_the_first_measurement_sets_the_scale_of_all_rows():
    """Also where it lies between two knots, of which the lower has little part in it."""
    for rows in (1, 5, 65, 124, 300):
        costs = Costs()
        guessed = costs.seconds([Pass(10**8, rows)]) / costs.seconds([Pass(10**8, 1)])
        costs.observe([Pass(10**8, rows)], 0.08)
        assert costs.seconds([Pass(10**8, rows)]) == pytest.approx(0.08)
        assert costs.seconds([Pass(10**8, 1)]) == pytest.approx(0.08 / guessed)
