"""How far some sequences should draft together, by the probability that drafts are accepted and by what they cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from layerskip_kernels.engine.acceptance import Floats
from layerskip_kernels.engine.costs import StepCosts, StepRows
from layerskip_kernels.engine.expectation import SELDOM, expected_drafts, least_products
from layerskip_kernels.model.model import Model

__all__ = ["DraftPlan", "DraftPrices", "Estimates", "StepShape"]

ROUNDS = 2  # what a token is worth depends on the plan, and the plan on what a token is worth: settles at once


@dataclass(frozen=True)
class Estimates:
    """What is known of N sequences' drafts: of each bucket of confidence, acceptance and frequency, [N, K] each."""

    rates: Floats
    shares: Floats

    @property
    def mean(self) -> Floats:
        """The acceptance of a draft whatever its confidence, [N]."""
        return (self.rates * self.shares).sum(axis=1)


@dataclass(frozen=True)
class StepShape:
    """What a step is besides its drafts: sequences that decode, rows of prompts, those of them that are judged."""

    decoding: int
    prompt: int = 0
    judged: int = 0


@dataclass(frozen=True)
class DraftPlan:
    """A step that drafts. ``score``: the seconds that a token takes in it, as is to be expected."""

    exits: tuple[int, ...]
    score: float
    made: Floats  # [N, D]: the probability that a draft is made
    least: Floats  # [N, D]: the product of acceptances from which on it is
    estimates: Estimates


class DraftPrices:
    """What drafts cost by the seconds measured so far."""

    def __init__(self, model: Model, costs: StepCosts) -> None:
        c = model.config
        self._model, self._costs = model, costs
        self._num_layers, self._layer = c.num_layers, model.layer_products
        self._drafting = np.array(model.draft_products)  # of a draft, by exit layer
        self._head = c.vocab_size * c.hidden_size

    def plan(self, exits: tuple[int, ...], most: Floats, estimates: Estimates, shape: StepShape) -> DraftPlan | None:
        """The best that is found for sequences with these exit layers; None where nothing beats plain decoding."""
        layers, depth, first = np.array(exits), int(most.max()), shape.decoding + shape.prompt
        plain, alone = self.seconds(exits, np.zeros(len(exits)), shape), self.plain_seconds(shape.decoding)
        best, value, mean = None, alone / shape.decoding, estimates.mean
        best_score = value
        made = np.where(np.arange(depth) < most[:, None], mean[:, None] ** np.arange(depth), 0.0)
        for _ in range(ROUNDS):
            company = np.maximum(self._company(layers, made), 1.0)
            rows = first + made.sum() - made.sum(axis=1)[:, None] + np.arange(depth)
            least = least_products(self.of_a_draft(layers[:, None], company, rows), value, mean)
            made, gained = expected_drafts(estimates.rates, estimates.shares, least, most)
            if made.max() < SELDOM:
                break
            seconds = alone + self._draft_seconds(layers, made) + self.seconds(exits, made.sum(axis=1), shape) - plain
            score = float(seconds / (shape.decoding + gained.sum()))
            if score < best_score:
                best, best_score = DraftPlan(exits, score, made, least, estimates), score
            value = min(score, alone / shape.decoding)
        return best

    def scores(
        self, exits: Floats, most: Floats, estimates: Estimates, shape: StepShape, drafting: int
    ) -> tuple[Floats, Floats]:
        """For each of N ways to draft, as one of ``drafting`` sequences: its expected seconds and tokens, [N] each."""
        depth = int(most.max())
        share = self.plain_seconds(shape.decoding) / shape.decoding
        company = np.full((len(exits), depth), float(max(1, drafting)))
        rows = np.broadcast_to(shape.decoding + shape.prompt + np.arange(depth), company.shape).astype(float)
        cost = self.of_a_draft(exits[:, None], company, rows)
        seconds, tokens, value = np.full(len(exits), share), np.ones(len(exits)), np.full(len(exits), share)
        for _ in range(ROUNDS):
            least = least_products(cost / value[:, None], 1.0, estimates.mean)
            made, gained = expected_drafts(estimates.rates, estimates.shares, least, most)
            found, gains = share + (made * cost).sum(axis=1), 1 + gained.sum(axis=1)
            better = found / gains < seconds / tokens
            seconds, tokens = np.where(better, found, seconds), np.where(better, gains, tokens)
            value = seconds / tokens
        return seconds, tokens

    def of_a_draft(self, layers: Floats, company: Floats, rows: Floats) -> Floats:
        """Seconds for one draft more: its share of a pass that it goes through in company, and a row to verify."""
        deep = (self._num_layers - layers) * self._layer + self._head
        per_weight = self._costs.verifying.per_weight
        drafting = self._drafting[layers] * self._costs.drafting.per_weight(company) / company
        return drafting + deep * (per_weight(rows + 1) - per_weight(rows))

    def plain_seconds(self, sequences: int) -> float:
        """One step of plain decoding, without prompts."""
        return self._costs.seconds(StepRows(((1, 0),) * sequences), self._model)

    def seconds(self, exits: tuple[int, ...], counts: Floats, shape: StepShape) -> float:
        """A verification of this many drafts (expectations, maybe), those of the others being none."""
        others = shape.decoding - len(exits)
        drafts = (*zip(exits, counts.tolist(), strict=True), *((1, 0),) * others)
        rows = StepRows(drafts, shape.prompt, shape.judged)
        return self._costs.verifying.seconds(rows.verify_passes(self._model))

    def _draft_seconds(self, layers: Floats, made: Floats) -> float:
        """Of all drafts, each a pass with those sequences that make it."""
        total = 0.0
        for layer in np.unique(layers):
            rows = made[layers == layer].sum(axis=0)
            passes = np.minimum(rows, 1.0) * self._costs.drafting.per_weight(np.maximum(rows, 1.0))
            total += float(passes.sum()) * float(self._drafting[layer])
        return total

    @staticmethod
    def _company(layers: Floats, made: Floats) -> Floats:
        """How many sequences make a draft together, [N, D]."""
        return (layers[:, None] == layers[None, :]) @ made
