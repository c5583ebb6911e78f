"""What the engine learns about its own costs, and how far it lets requests draft: simulated, so nothing is timed."""

import random
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod

import pytest
from conftest import tiny_model

from layerskip_kernels.costs import Costs, DraftLengths, Evidence, Pass, Rows, Wish
from layerskip_kernels.llama_tensors import tensor_shapes


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
    rows = Rows(((4, 2), (4, 1), (6, 3), (1, 0)), prompt=10, judged=1)
    four, six = [(4 * layer, 2), (head, 2), (4 * layer, 1), (head, 1)], [(6 * layer, 1), (head, 1)] * 3
    assert sorted(rows.draft_passes(model)) == sorted(four + six)
    assert rows.verify_passes(model) == [(4 * layer, 14), (2 * layer, 17), (6 * layer, 20), (head, 4 + 6 + 1)]


def test_a_prompt_alone_passes_no_head(model):
    assert len(Rows((), prompt=7).verify_passes(model)) == 1
    assert [p.rows for p in Rows((), prompt=7, judged=1).verify_passes(model)] == [7, 1]


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


def test_evidence_fades():
    evidence = Evidence()
    for _ in range(50):
        evidence.add(drafted=4, accepted=4)
    assert evidence.rate(0.5, 1) > 0.9
    for _ in range(100):
        evidence.add(drafted=4, accepted=0)
    assert evidence.rate(0.5, 1) < 0.1


def simulate(model, machine, batch, acceptance, steps, most=4, exit_layer=4):
    """Seconds and tokens of ``steps`` steps, and how much was drafted; acceptance may be a function of the step.

    What is learnt is what is measured, outliers and all; what counts are the seconds without noise, since a run that
    happens to see no outlier says nothing about the choice of drafts.
    """
    lengths, rng = DraftLengths(model), random.Random(7)
    wishes = [Wish(exit_layer, most, Evidence()) for _ in range(batch)]
    total = tokens = drafted = 0.0
    for step in range(steps):
        rate = acceptance(step) if callable(acceptance) else acceptance
        counts = lengths.choose(wishes)
        accepted = [next((i for i in range(c) if rng.random() >= rate), c) for c in counts]
        rows = Rows(tuple((exit_layer, count) for count in counts))
        drafting, verifying = rows.draft_passes(model), rows.verify_passes(model)
        draft_seconds = machine.seconds(drafting) if drafting else 0.0
        lengths.learn(wishes, counts, accepted, (0, 0), draft_seconds, machine.seconds(verifying))
        total += machine.exact(drafting) + machine.exact(verifying)
        tokens += batch + sum(accepted)
        drafted += sum(counts)
    return total, tokens, drafted


@pytest.mark.parametrize("batch", [1, 4, 8, 16])
@pytest.mark.parametrize("acceptance", [0.0, 0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("exit_layer", [2, 4, 8])
def test_never_more_than_five_percent_slower_than_plain(model, batch, acceptance, exit_layer):
    """From the first step on, whatever the acceptance and the exit; 64 steps and 400, several sequences of events."""
    for steps, seed in ((64, 0), (64, 1), (64, 2), (400, 3)):
        run = partial(simulate, model, batch=batch, acceptance=acceptance, steps=steps, exit_layer=exit_layer)
        seconds, tokens, _ = run(Machine(seed=seed))
        plain, plain_tokens, drafted = run(Machine(seed=seed), most=0)
        assert drafted == 0
        assert seconds / tokens < 1.05 * plain / plain_tokens


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
