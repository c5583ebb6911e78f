"""What a step costs, measured as the engine runs.

A step is a list of passes: a number of weights that stream through the cores, for a number of rows. Where a step is
expected and not measured, rows are expectations too, and need not be whole numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerskip_kernels.model.model import Model

__all__ = ["Costs", "Pass", "StepCosts", "StepRows"]


class Pass(NamedTuple):
    """``weights`` elements, through which ``rows`` rows go together."""

    weights: int
    rows: float


@dataclass(frozen=True)
class StepRows:
    """The rows of one step: how many tokens each decoding sequence drafts, with which exit layer, beside a prompt.

    ``drafts``: (exit layer, number of drafts) for each decoding sequence, a number of 0 for plain decoding;
    ``prompt``: rows of prompts, of which ``judged`` more are the last of theirs.
    """

    drafts: tuple[tuple[int, float], ...]
    prompt: int = 0
    judged: int = 0

    def draft_passes(self, model: Model) -> list[Pass]:
        """Draft i of all sequences of an exit layer that draft more than i tokens: its layers, adapters', a head."""
        passes = []
        for exit_layer in {e for e, count in self.drafts if count}:
            counts = [count for e, count in self.drafts if e == exit_layer]
            for i in range(math.ceil(max(counts))):
                rows = sum(count > i for count in counts)
                passes.append(Pass(model.draft_products[exit_layer], rows))
        return passes

    def verify_passes(self, model: Model) -> list[Pass]:
        """Rows that have not been drafted take all layers, the others join them at their exit layer; then the head."""
        c = model.config
        passes, first = [], 0
        rows: float = len(self.drafts) + self.prompt
        for exit_layer in sorted({e for e, count in self.drafts if count}):
            passes.append(Pass((exit_layer - first) * model.layer_products, rows))
            rows += sum(count for e, count in self.drafts if e == exit_layer)
            first = exit_layer
        passes.append(Pass((c.num_layers - first) * model.layer_products, rows))
        for at, products in model.adapter_products.items():  # for rows that have not been drafted past it
            drafted = sum(count for e, count in self.drafts if e < at)
            passes.append(Pass(products, len(self.drafts) + drafted + self.prompt))
        judged = len(self.drafts) + sum(count for _, count in self.drafts) + self.judged
        return passes + [Pass(c.vocab_size * c.hidden_size, judged)] * (judged > 0)


class Costs:
    """Seconds of passes, from those that were measured.

    One curve is learnt, the seconds a weight takes with r rows: piecewise linear between KNOTS, never falling. A
    measurement is a sum over passes; its surprise scales the knots that took part, by their share of the sum, and
    the less the more a knot has seen. Knots that have seen nothing follow the others. What seems dearer than they
    let guess becomes cheaper slowly until it is measured again: one bad measurement does not rule it out for ever.
    """

    KNOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)
    FREE_ROWS = 6  # before any measurement: up to this many rows cost as much as one, then time grows with them
    SLOWEST_LEARNING = 0.1  # weight of the newest measurement of a knot that has seen many
    LARGEST_SURPRISE = 2.0  # a measurement further off than this factor counts as this: other processes took the cores
    KNOWN = 2.0  # measurements after which a knot is protected from such outliers
    FORGETTING = 0.04  # how far such knots go back to the guess, every few measurements
    OFTEN, SELDOM = 16, 4  # knots that have seen nothing follow after each of the first measurements, then every few

    def __init__(self) -> None:
        self._curve = [self._first_guess(knot) for knot in range(len(self.KNOTS))]
        self._seen = [0.0] * len(self.KNOTS)
        self.measurements = 0

    def seconds(self, passes: Sequence[Pass]) -> float:
        """The expected time. Means nothing before the first observation, except in comparison."""
        return sum(self._parts(passes).values())

    def per_weight(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """The expected seconds that a weight takes with this many rows, at least one."""
        beyond = np.maximum(rows / self.KNOTS[-1], 1.0)
        return np.interp(rows, self.KNOTS, self._curve) * beyond

    def observe(self, passes: Sequence[Pass], seconds: float) -> None:
        """Learn from a measurement."""
        parts = self._parts(passes)
        if not self.measurements:  # until now the curve had a shape and no scale
            scale = seconds / sum(parts.values())
            self._curve = [scale * value for value in self._curve]
            parts = self._parts(passes)
        largest, surprise = max(parts.values()), seconds / sum(parts.values())
        for knot, part in parts.items():
            share, ratio = part / largest, surprise
            if self._seen[knot] >= self.KNOWN:
                ratio = max(1 / self.LARGEST_SURPRISE, min(self.LARGEST_SURPRISE, ratio))
            self._seen[knot] += share
            # 2 / (n + 1) forgets the first measurements, of pages never touched before, faster than their mean would.
            step = max(self.SLOWEST_LEARNING, 2 / (self._seen[knot] + 1))
            self._curve[knot] *= ratio ** min(1.0, share * step)
        for knot in parts:
            self._straighten(knot)
        self.measurements += 1
        if self.measurements <= self.OFTEN or self.measurements % self.SELDOM == 0:
            self._forget(parts)
            self._guess_the_rest()

    def _straighten(self, knot: int) -> None:
        """More rows than a knot's never cost less."""
        value = self._curve[knot]
        below, above = self._curve[:knot], self._curve[knot + 1 :]
        self._curve = [*(min(v, value) for v in below), value, *(max(v, value) for v in above)]

    def _forget(self, measured: Iterable[int]) -> None:
        """Knots that were not measured now fall a little to what the nearest measured one lets guess."""
        lowest, highest = min(measured), max(measured)
        for k in range(len(self.KNOTS)):
            if k < lowest or k > highest:
                near = lowest if k < lowest else highest
                guess = self._curve[near] * self._first_guess(k) / self._first_guess(near)
                self._curve[k] *= min(1.0, guess / self._curve[k]) ** self.FORGETTING
        below, above = self._curve[:lowest], self._curve[lowest:]
        self._curve = list(accumulate([*(min(v, self._curve[lowest]) for v in below), *above], max))

    def _guess_the_rest(self) -> None:
        """Knots that have seen nothing follow the nearest that has."""
        seen = [k for k, times in enumerate(self._seen) if times]
        for k in set(range(len(self.KNOTS))).difference(seen):
            nearest = min(seen, key=lambda s: abs(s - k))
            guess = self._curve[nearest] * self._first_guess(k) / self._first_guess(nearest)
            least = max((self._curve[s] for s in seen if s < k), default=0.0)
            most = min((self._curve[s] for s in seen if s > k), default=math.inf)
            self._curve[k] = min(max(guess, least), most)

    def _first_guess(self, knot: int) -> float:
        return max(1.0, self.KNOTS[knot] / self.FREE_ROWS)

    def _parts(self, passes: Sequence[Pass]) -> dict[int, float]:
        """The expected time of passes, as a sum over knots."""
        parts: dict[int, float] = {}
        for weights, rows in passes:
            for knot, share in self._between(rows):
                parts[knot] = parts.get(knot, 0.0) + weights * share * self._curve[knot]
        return parts

    def _between(self, rows: float) -> list[tuple[int, float]]:
        """The knots on both sides of a number of rows, and how near each is; the last one stands for all beyond."""
        low = bisect_right(self.KNOTS, rows) - 1
        if low == len(self.KNOTS) - 1:
            return [(low, rows / self.KNOTS[low])]
        share = (rows - self.KNOTS[low]) / (self.KNOTS[low + 1] - self.KNOTS[low])
        return [(low, 1 - share), (low + 1, share)] if share else [(low, 1.0)]


class StepCosts:
    """Seconds of whole steps. Drafting and verification have a curve each: what surrounds their passes differs."""

    def __init__(self) -> None:
        self.verifying, self._drafting = Costs(), Costs()

    @property
    def drafting(self) -> Costs:
        """Those of verification until there were drafts."""
        return self._drafting if self._drafting.measurements else self.verifying

    @property
    def known(self) -> bool:
        """Whether enough was measured for the first decision of a new engine."""
        return self.verifying.measurements >= Costs.OFTEN

    def seconds(self, rows: StepRows, model: Model) -> float:
        """The expected time of a step."""
        return self.drafting.seconds(rows.draft_passes(model)) + self.verifying.seconds(rows.verify_passes(model))

    def observe(self, rows: StepRows, model: Model, draft_seconds: float, verify_seconds: float) -> None:
        """Learn from a step."""
        if any(count for _, count in rows.drafts):
            self._drafting.observe(rows.draft_passes(model), draft_seconds)
        self.verifying.observe(rows.verify_passes(model), verify_seconds)
