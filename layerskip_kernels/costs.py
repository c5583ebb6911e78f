"""What a step costs, measured as the engine runs, and how far it pays to draft.

A step is a list of passes: a number of weights that stream through the cores, for a number of rows. Nothing here
can change a token: it only decides how many are drafted.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from typing import NamedTuple

from layerskip_kernels.model import Model

__all__ = ["Costs", "DraftLengths", "Evidence", "Pass", "Rows", "Wish"]


class Pass(NamedTuple):
    """``weights`` elements, through which ``rows`` rows go together."""

    weights: int
    rows: int


@dataclass(frozen=True)
class Rows:
    """The rows of one step: how many tokens each decoding sequence drafts, with which exit layer, beside a prompt.

    ``drafts``: (exit layer, number of drafts) for each decoding sequence, a number of 0 for plain decoding;
    ``prompt``: rows of prompts, of which ``judged`` more are the last of theirs.
    """

    drafts: tuple[tuple[int, int], ...]
    prompt: int = 0
    judged: int = 0

    def draft_passes(self, model: Model) -> list[Pass]:
        """Draft i of all sequences of an exit layer that draft more than i tokens: those layers, then a head."""
        c = model.config
        head = (c.vocab_size if model.draft_ids is None else len(model.draft_ids)) * c.hidden_size
        passes = []
        for exit_layer in {e for e, count in self.drafts if count}:
            counts = [count for e, count in self.drafts if e == exit_layer]
            for i in range(max(counts)):
                rows = sum(count > i for count in counts)
                passes += [Pass(exit_layer * _layer_weights(model), rows), Pass(head, rows)]
        return passes

    def verify_passes(self, model: Model) -> list[Pass]:
        """Rows that have not been drafted take all layers, the others join them at their exit layer; then the head."""
        c = model.config
        passes, rows, first = [], len(self.drafts) + self.prompt, 0
        for exit_layer in sorted({e for e, count in self.drafts if count}):
            passes.append(Pass((exit_layer - first) * _layer_weights(model), rows))
            rows += sum(count for e, count in self.drafts if e == exit_layer)
            first = exit_layer
        passes.append(Pass((c.num_layers - first) * _layer_weights(model), rows))
        judged = len(self.drafts) + sum(count for _, count in self.drafts) + self.judged
        return passes + [Pass(c.vocab_size * c.hidden_size, judged)] * (judged > 0)


def _layer_weights(model: Model) -> int:
    c = model.config
    attention = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim
    return c.hidden_size * (attention + 3 * c.intermediate_size)


class Costs:
    """Seconds of passes, from those that were measured.

    One curve is learnt, the seconds a weight takes with r rows: piecewise linear between KNOTS, never falling. A
    measurement is a sum over passes; its surprise scales the knots that took part, by their share of the sum, and
    the less the more a knot has seen. Knots that have seen nothing follow the others.
    """

    KNOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)
    FREE_ROWS = 6  # before anything was measured: so many rows cost no more than one, then time grows with them
    SLOWEST_LEARNING = 0.1
    LARGEST_SURPRISE = 2.0  # times slower or faster than expected: other processes may have held the cores
    KNOWN = 2.0  # measurements after which a knot is protected from larger surprises

    def __init__(self) -> None:
        self._curve = [self._first_guess(knot) for knot in range(len(self.KNOTS))]
        self._seen = [0.0] * len(self.KNOTS)

    def seconds(self, passes: ListLike[Pass]) -> float:
        """The expected time. Means nothing before the first observation, except in comparison."""
        return sum(self._parts(passes).values())

    def observe(self, passes: ListLike[Pass], seconds: float) -> None:
        """Learn from a measurement."""
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
        self._guess_the_rest()

    def _straighten(self, knot: int) -> None:
        """More rows than a knot's never cost less."""
        value = self._curve[knot]
        below, above = self._curve[:knot], self._curve[knot + 1 :]
        self._curve = [*(min(v, value) for v in below), value, *(max(v, value) for v in above)]

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

    def _parts(self, passes: ListLike[Pass]) -> dict[int, float]:
        """The expected time of passes, as a sum over knots."""
        parts: dict[int, float] = {}
        for weights, rows in passes:
            for knot, share in self._between(rows):
                parts[knot] = parts.get(knot, 0.0) + weights * share * self._curve[knot]
        return parts

    def _between(self, rows: int) -> list[tuple[int, float]]:
        """The knots on both sides of a number of rows, and how near each is; the last one stands for all beyond."""
        low = bisect_right(self.KNOTS, rows) - 1
        if low == len(self.KNOTS) - 1:
            return [(low, rows / self.KNOTS[low])]
        share = (rows - self.KNOTS[low]) / (self.KNOTS[low + 1] - self.KNOTS[low])
        return [(low, 1 - share), (low + 1, share)] if share else [(low, 1.0)]


@dataclass
class Evidence:
    """How often drafts were right, the recent ones counting most."""

    accepted: float = 0.0
    judged: float = 0.0

    FADING = 0.97  # of what was known, with each draft judged

    def add(self, drafted: int, accepted: int) -> None:
        """A verification accepted some of its drafts; those after the first wrong one say nothing."""
        judged = min(accepted + 1, drafted)
        kept = self.FADING**judged
        self.accepted, self.judged = self.accepted * kept + accepted, self.judged * kept + judged

    def rate(self, prior: float, weight: float) -> float:
        """The share of drafts to expect right, when ``prior`` counts as much as ``weight`` drafts judged."""
        return (self.accepted + prior * weight) / (self.judged + weight)


@dataclass
class Wish:
    """What a decoding sequence may draft: its exit layer, at most how many tokens, and how its drafts have fared."""

    exit_layer: int
    most: int
    evidence: Evidence


@dataclass
class DraftLengths:
    """Chooses how many tokens each sequence drafts: as many as give the most tokens per second, down to none.

    Drafts are added in the order of their probability to be accepted, and the best prefix of that order is taken.
    What is not yet known has to be tried, and trying costs time, so there is an account: it earns EARNING of the
    time that plain decoding takes and whatever drafting saves, it pays what drafts cost beyond plain decoding, and
    no step may risk more than it holds. So however wrong the estimates are about acceptance, drafting never costs
    more than that share, and the first part of a plain step.
    """

    model: Model
    costs: Costs = field(default_factory=Costs)
    by_layer: dict[int, Evidence] = field(default_factory=dict)
    credit: float | None = None  # seconds; None: nothing was measured yet

    EARNING = 0.01
    FIRST_CREDIT, LARGEST_CREDIT = 0.6, 6.0  # plain steps
    FIRST_GUESS, GUESS_WEIGHT = 0.5, 1.0  # acceptance before any evidence
    LAYER_WEIGHT = 4.0  # what other sequences of the same exit layer say about a new one, in drafts judged
    LEAST_PROBABILITY = 0.05  # of a draft to be accepted: below, it is not worth the thought
    MOST_TRIED = 10  # prefixes that are looked at
    MARGIN = 0.03  # by which drafting has to look better: the best of several estimates is too good to be true

    def choose(self, wishes: ListLike[Wish], prompt: int = 0, judged: int = 0) -> list[int]:
        """The number of drafts of each sequence; ``prompt`` and ``judged`` as in Rows."""
        if self.credit is None or not any(wish.most for wish in wishes):
            return [0] * len(wishes)
        counts, best = [0] * len(wishes), [0] * len(wishes)
        alone, plain = self._plain_seconds(len(wishes)), self._seconds(wishes, counts, prompt, judged)
        best_score, tokens = (1 - self.MARGIN) * alone / len(wishes), float(len(wishes))
        order = self._by_probability(wishes)
        stride = -(-len(order) // self.MOST_TRIED)
        for n, (probability, b) in enumerate(order, 1):
            counts[b] += 1
            tokens += probability
            if n % stride and n < len(order):
                continue
            extra = self._seconds(wishes, counts, prompt, judged) - plain
            if extra > self.credit:
                break
            if (alone + extra) / tokens < best_score:
                best, best_score = counts.copy(), (alone + extra) / tokens
        return best if any(best) else self._trial(wishes, plain, prompt, judged)

    def prompt_seconds(self, rows: int) -> float | None:
        """How long so many rows of a prompt take; None before anything was measured."""
        return None if self.credit is None else self.costs.seconds(Rows((), rows).verify_passes(self.model))

    def learn(
        self,
        wishes: ListLike[Wish],
        counts: ListLike[int],
        accepted: ListLike[int],
        prompt: tuple[int, int],
        draft_seconds: float,
        verify_seconds: float,
    ) -> None:
        """Take note of a step: what each drafted and how much was accepted, ``prompt`` as in choose, and the times."""
        rows = self._rows(wishes, counts, *prompt)
        if any(counts):
            self.costs.observe(rows.draft_passes(self.model), draft_seconds)
        self.costs.observe(rows.verify_passes(self.model), verify_seconds)
        if wishes:
            self._settle(wishes, counts, accepted, prompt, draft_seconds + verify_seconds)

    def _settle(
        self,
        wishes: ListLike[Wish],
        counts: ListLike[int],
        accepted: ListLike[int],
        prompt: tuple[int, int],
        seconds: float,
    ) -> None:
        """What the drafts of a step cost beyond plain decoding, and what they saved."""
        for wish, count, right in zip(wishes, counts, accepted, strict=True):
            if count:
                wish.evidence.add(count, right)
                self.by_layer.setdefault(wish.exit_layer, Evidence()).add(count, right)
        alone = self._plain_seconds(len(wishes))
        credit = self.FIRST_CREDIT * alone if self.credit is None else self.credit
        if any(counts):
            expected = self._seconds(wishes, counts, *prompt)
            seconds = min(seconds, self.costs.LARGEST_SURPRISE * expected)  # not what other processes took
            extra = seconds - self._seconds(wishes, [0] * len(wishes), *prompt)
            credit += sum(accepted) * alone / len(wishes) - extra
        largest = self.LARGEST_CREDIT * alone
        self.credit = max(-largest, min(credit + self.EARNING * alone, largest))

    def _by_probability(self, wishes: ListLike[Wish]) -> list[tuple[float, int]]:
        """Every draft that may be worth it, as (probability to be accepted, sequence), likeliest first."""
        order = []
        for b, wish in enumerate(wishes):
            rate = probability = min(self._rate(wish), 0.99)
            for _ in range(wish.most):
                if probability < self.LEAST_PROBABILITY:
                    break
                order.append((probability, b))
                probability *= rate
        return sorted(order, key=lambda draft: -draft[0])

    def _rate(self, wish: Wish) -> float:
        layer = self.by_layer.get(wish.exit_layer, Evidence())
        return wish.evidence.rate(layer.rate(self.FIRST_GUESS, self.GUESS_WEIGHT), self.LAYER_WEIGHT)

    def _trial(self, wishes: ListLike[Wish], plain: float, prompt: int, judged: int) -> list[int]:
        """One draft of the sequence least is known about, if the account can pay for it."""
        assert self.credit is not None
        _, b = min((wish.evidence.judged, b) for b, wish in enumerate(wishes) if wish.most)
        counts = [int(i == b) for i in range(len(wishes))]
        affordable = self._seconds(wishes, counts, prompt, judged) - plain <= self.credit
        return counts if affordable else [0] * len(wishes)

    def _plain_seconds(self, sequences: int) -> float:
        return self.costs.seconds(Rows(((1, 0),) * sequences).verify_passes(self.model))

    def _seconds(self, wishes: ListLike[Wish], counts: ListLike[int], prompt: int = 0, judged: int = 0) -> float:
        rows = self._rows(wishes, counts, prompt, judged)
        return self.costs.seconds(rows.draft_passes(self.model) + rows.verify_passes(self.model))

    def _rows(self, wishes: ListLike[Wish], counts: ListLike[int], prompt: int, judged: int) -> Rows:
        return Rows(tuple((w.exit_layer, count) for w, count in zip(wishes, counts, strict=True)), prompt, judged)
