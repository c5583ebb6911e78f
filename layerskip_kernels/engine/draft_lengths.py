"""How far it pays to draft, and with which exit layer: chosen from measured costs and from how drafts have fared.

Nothing here can change a token: it only decides how many are drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from layerskip_kernels.engine.acceptance import BUCKETS, MIDDLES, UNKNOWN, DraftHistory, Floats, Pool
from layerskip_kernels.engine.costs import StepCosts, StepRows
from layerskip_kernels.engine.draft_plan import DraftPlan, DraftPrices, Estimates, StepShape
from layerskip_kernels.engine.drafts import DraftRequest, Drafts
from layerskip_kernels.engine.expectation import SELDOM
from layerskip_kernels.model.model import Model

__all__ = ["DraftLengths"]


@dataclass
class DraftLengths:
    """Chooses how many tokens each sequence drafts, and with which exit: what gives the most tokens per second.

    A sequence drafts on while the product of its drafts' acceptances, each by its confidence, times what a token is
    worth exceeds what one draft more costs (DraftPlan). A plan is kept for some steps, and made anew when other
    sequences take part.

    What is not yet known has to be tried, and trying costs time, so there is a budget: it earns EARNING of the time
    that plain decoding takes and whatever drafting saves, it pays what drafts cost beyond plain decoding, and no step
    may risk more than it holds. However wrong the estimates of acceptance are, drafting never costs more than that
    share and the budget at the start.
    """

    model: Model
    costs: StepCosts = field(default_factory=StepCosts)
    pool: Pool = field(default_factory=Pool)
    budget: float | None = None  # seconds; None: nothing was measured yet

    EARNING = 0.01  # of the time of plain decoding
    FIRST_BUDGET, LARGEST_BUDGET = 0.6, 6.0  # in plain steps
    CREDIT = 1.5  # in plain steps: what a plan may cost that rests on drafts judged before
    SURPRISE, LARGEST_SURPRISE = 1.25, 2.0  # how far a step's seconds may be from what is expected, later and at first
    TRUSTED_BUDGET = 2.0  # the first, where the model's own measurements say that drafting pays
    GUESS, GUESS_WEIGHT = 0.5, 1.0  # the acceptance expected of a third of the layers, and how many drafts it counts as
    ADAPTED_GUESS = 0.5  # the same of an exit adapter, however shallow its exit
    TRUSTED_WEIGHT = 6.0  # the same for what follows from the model's own measurements
    BUCKET_WEIGHT, SEQUENCE_WEIGHT = 2.0, 4.0  # what a guess counts as in a bucket, and all sequences for a new one
    LONGEST_PLAN = 24  # steps for which a plan is kept, the first one for as many as this where much is known:
    FIRST_PLAN, MUCH = 6, 20.0  # drafts judged
    EXIT_PLANS = 3  # plans for which exits are kept
    LONGEST_PLAIN, LONGEST_REST = 96, 24  # the same for one without drafts, unless some are tried; what is not asked
    TRIAL_STEPS, TRIAL_DRAFTS = 16, 2  # while drafting pays: how often another exit is tried, and with how many drafts
    HOPE = 0.5  # with that many drafts known, an exit is tried if it would pay with this / sqrt(drafts) more acceptance
    TRIED = 8.0  # drafts judged before an exit is chosen
    CHANGE = 0.98  # another exit is chosen if it takes at most this part of the time

    def __post_init__(self) -> None:
        self._prices = DraftPrices(self.model, self.costs)
        self._plan: DraftPlan | None = None
        self._planned: list[DraftHistory] = []  # the sequences that the plan is for
        self._shape = StepShape(0)
        self._steps = self._plans = 0  # since other sequences came
        self._plan_ends = 0
        self._at_risk = 0.0  # seconds, by the plan
        self._hopeful: tuple[int, ...] = ()  # exits that deserve a trial
        self._is_trial = False  # the last choice

    def choose(self, requests: Sequence[DraftRequest], prompt: int = 0, judged: int = 0) -> list[Drafts]:
        """What each sequence drafts; ``prompt`` and ``judged`` as in StepRows."""
        self._is_trial = False
        nothing = [Drafts(self._exit_of(r), 0) for r in requests]
        if self.budget is None or not any(request.max_drafts for request in requests):
            return nothing
        shape = StepShape(len(requests), prompt, judged)
        self._update_plan(requests, shape)
        chosen = nothing if self._plan is None else self._of_plan(requests, self._plan)
        if self.budget < self._at_risk:
            chosen = self._afforded(chosen, shape)
        if not any(d.count for d in chosen):
            return self._trial(requests, nothing, shape, 1)
        if self._hopeful and self._steps % self.TRIAL_STEPS == 0:
            return self._trial(requests, chosen, shape, self.TRIAL_DRAFTS, self._hopeful)
        return chosen

    def repeats(self) -> int:
        """How many more steps may follow the last choice, which drafted, before another one is due."""
        if self._plan is None or self._is_trial or self.budget is None:
            return 0
        left = self._plan_ends - self._steps
        if self._hopeful:
            left = min(left, self.TRIAL_STEPS - 1 - self._steps % self.TRIAL_STEPS)
        return left if self._at_risk <= 0 else min(left, int(max(0.0, self.budget) / self._at_risk))

    def repeated(self, steps: int) -> None:
        """Take note of this many steps like the last one."""
        self._steps += steps

    def rest(self) -> int:
        """For how many more steps a choice of no drafts holds: while the plan is plain decoding."""
        if self.budget is None or self._plan is not None or not self.costs.known:
            return 0
        return min(self._plan_ends - self._steps, self.LONGEST_REST)

    def rested(self, steps: int) -> None:
        """Take note of this many steps like the last one, which nobody asked about."""
        if steps and self.budget is not None:
            self._steps += steps
            self._earn(steps * self._prices.plain_seconds(self._shape.decoding), self._shape)

    def prompt_seconds(self, rows: int) -> float | None:
        """How long this many rows of a prompt take; None before anything was measured."""
        return None if self.budget is None else self._step_seconds(StepRows((), rows))

    def learn(
        self,
        requests: Sequence[DraftRequest],
        drafts: Sequence[tuple[int, int]],
        accepted: Sequence[int],
        prompt: tuple[int, int],
        draft_seconds: float,
        verify_seconds: float,
        confidences: Sequence[Sequence[float] | None] | None = None,
    ) -> None:
        """Take note of a step.

        For each sequence the exit layer and how many tokens it drafted, how many of them were accepted, and how
        confident the exit was of each (None: unknown); ``prompt`` as in choose; and the seconds of both stages.
        """
        rows = StepRows(tuple(drafts), *prompt)
        self.costs.observe(rows, self.model, draft_seconds, verify_seconds)
        for b, (request, (exit_layer, count), right) in enumerate(zip(requests, drafts, accepted, strict=True)):
            if count:
                said = (confidences[b] if confidences else None) or [UNKNOWN] * count
                request.history.of(exit_layer).add(said, right)
                self.pool.of(exit_layer, request.drawn).add(said, right)
                if self._plan is None:
                    self._plan_ends = self._steps
        if self.budget is None and (self.costs.known or self.model.defaults is not None):
            self.budget = self._first_budget() * self._prices.plain_seconds(max(1, len(requests)))
        if requests:
            self._settle(rows, sum(accepted), StepShape(len(requests), *prompt), draft_seconds + verify_seconds)

    # ---- the budget ----

    def _settle(self, rows: StepRows, accepted: int, shape: StepShape, seconds: float) -> None:
        """What the drafts of a step cost beyond plain decoding, and what they saved."""
        alone = self._prices.plain_seconds(shape.decoding)
        budget = self._first_budget() * alone if self.budget is None else self.budget
        if any(count for _, count in rows.drafts):
            expected = self._step_seconds(rows)
            # Not what other processes took, nor what noise seems to give.
            surprise = self.SURPRISE if self.costs.known else self.LARGEST_SURPRISE
            seconds = max(expected / surprise, min(seconds, surprise * expected))
            extra = seconds - self._step_seconds(replace(rows, drafts=((1, 0),) * shape.decoding))
            budget += accepted * alone / shape.decoding - extra
        self.budget = budget
        self._earn(alone, shape)

    def _earn(self, seconds: float, shape: StepShape) -> None:
        """The budget's part of some seconds of plain decoding; it has bounds on both sides."""
        assert self.budget is not None
        largest = self.LARGEST_BUDGET * self._prices.plain_seconds(shape.decoding)
        self.budget = max(-largest, min(self.budget + self.EARNING * seconds, largest))

    def _first_budget(self) -> float:
        return self.FIRST_BUDGET if self.model.defaults is None else self.TRUSTED_BUDGET

    def _afforded(self, drafts: list[Drafts], shape: StepShape) -> list[Drafts]:
        """What of these drafts the budget can pay for, should none be accepted and nothing stop."""
        while (longest := max(d.count for d in drafts)) and not self._affords(drafts, shape):
            drafts = [replace(d, count=min(d.count, longest - 1)) for d in drafts]
        return drafts

    def _plan_risk(self, plan: DraftPlan, shape: StepShape, known: bool) -> float:
        """The budget that a plan needs: for twice the expected drafts, at most CREDIT; none where much is known."""
        counts = np.ceil(np.minimum(2 * plan.made.sum(axis=1), (plan.made > SELDOM).sum(axis=1))).astype(int)
        risk = self._risk([Drafts(e, count) for e, count in zip(plan.exits, counts.tolist(), strict=True)], shape)
        credit = self.CREDIT * self._prices.plain_seconds(shape.decoding)
        return min(risk, credit) - credit * known

    def _affords(self, drafts: Sequence[Drafts], shape: StepShape) -> bool:
        assert self.budget is not None
        return self._risk(drafts, shape) <= self.budget

    def _risk(self, drafts: Sequence[Drafts], shape: StepShape) -> float:
        """What these drafts cost beyond plain decoding if nothing stops them."""
        rows = StepRows(tuple((d.exit_layer, d.count) for d in drafts), shape.prompt, shape.judged)
        return self._step_seconds(rows) - self._step_seconds(replace(rows, drafts=((1, 0),) * shape.decoding))

    def _step_seconds(self, rows: StepRows) -> float:
        return self.costs.seconds(rows, self.model)

    # ---- the plan ----

    def _update_plan(self, requests: Sequence[DraftRequest], shape: StepShape) -> None:
        """A new plan where the sequences are others or the old one was used for long enough."""
        histories = [request.history for request in requests]
        same = shape == self._shape and len(histories) == len(self._planned)
        if not same or any(a is not b for a, b in zip(histories, self._planned, strict=True)):
            self._planned, self._shape = histories, shape
            self._steps = self._plans = self._plan_ends = 0
        if self._steps >= self._plan_ends:
            self._plan = self._new_plan(requests, shape)
            judged = min(self.pool.of(self._exit_of(r), r.drawn).judged for r in requests)
            known = judged > self.MUCH and self.costs.known
            self._at_risk = 0.0 if self._plan is None else self._plan_risk(self._plan, shape, known)
            first = self.FIRST_PLAN if known else 1
            longest = self.LONGEST_PLAIN if self._plan is None else self.LONGEST_PLAN
            self._plan_ends = self._steps + min(first + 2 * self._steps, longest)
            self._plans += 1
        self._steps += 1

    def _new_plan(self, requests: Sequence[DraftRequest], shape: StepShape) -> DraftPlan | None:
        most = np.array([float(request.most if request.max_drafts else 0) for request in requests])
        kept, ways = tuple(self._exit_of(request) for request in requests), []
        if any(len(request.exits) > 1 for request in requests):
            # New sequences begin with what was best for the others.
            due = 0 if self.pool.exit_layer is None else self.EXIT_PLANS - 1
            if self._plans % self.EXIT_PLANS == due:
                ways = self._ways(requests, most, shape, kept)
        ways = ways or [kept]
        plans = [self._prices.plan(exits, most, self._estimates(requests, exits), shape) for exits in ways]
        found = [plan for plan in plans if plan is not None]
        if not found:
            return None
        best = min(found, key=lambda plan: plan.score * (self.CHANGE if plan.exits == kept else 1))
        for request, exit_layer in zip(requests, best.exits, strict=True):
            request.history.exit_layer = exit_layer
            if len(request.exits) > 1:
                self.pool.exit_layer = exit_layer
        return best

    def _exit_of(self, request: DraftRequest) -> int:
        """The exit layer a sequence drafts with until another is chosen."""
        found = request.history.exit_layer or self.pool.exit_layer
        return found if found in request.exits else request.exits[0]

    def _ways(
        self, requests: Sequence[DraftRequest], most: Floats, shape: StepShape, kept: tuple[int, ...]
    ) -> list[tuple[int, ...]]:
        """Exits worth a plan: the present ones, each sequence's own best, and the one that is best for all.

        Of the others only exits come into question that were tried.
        """
        pairs = [(b, e) for b, r in enumerate(requests) for e in r.exits if e == kept[b] or self._tried(e, r.drawn)]
        among, layers = [requests[b] for b, _ in pairs], tuple(e for _, e in pairs)
        estimates, longest = self._estimates(among, layers), np.array([most[b] for b, _ in pairs])
        drafting = int((most > 0).sum())
        seconds, tokens = self._prices.scores(np.array(layers), longest, estimates, shape, drafting)
        score = dict(zip(pairs, (seconds / tokens).tolist(), strict=True))
        own = tuple(min((score[pair], pair[1]) for pair in pairs if pair[0] == b)[1] for b in range(len(requests)))
        drafters = [b for b, request in enumerate(requests) if request.most]
        shared = sorted(set.intersection(*({e for b, e in pairs if b == drafter} for drafter in drafters)))
        ways = [kept, own]
        if shared:
            of = {e: [i for i, (_, other) in enumerate(pairs) if other == e] for e in shared}
            common = min(shared, key=lambda e: seconds[of[e]].sum() / tokens[of[e]].sum())
            ways.append(tuple(common if common in r.exits else e for r, e in zip(requests, kept, strict=True)))
        self._hopeful = self._find_hopeful(requests, shape, drafting, min(score.values()))
        return list(dict.fromkeys(ways))

    def _tried(self, exit_layer: int, drawn: bool) -> bool:
        return self.pool.of(exit_layer, drawn).judged >= self.TRIED

    def _find_hopeful(
        self, requests: Sequence[DraftRequest], shape: StepShape, drafting: int, score: float
    ) -> tuple[int, ...]:
        """The exits that would be the best if their acceptance were as good as it may be for all that is known."""
        exits = tuple(sorted({e for request in requests if len(request.exits) > 1 for e in request.exits}))
        new = DraftRequest(exits, max(r.most for r in requests), 1, DraftHistory(), drawn=requests[0].drawn)
        known = self._estimates([new] * len(exits), exits)
        judged = np.array([self.pool.of(e, new.drawn).judged for e in exits])
        hope = np.minimum(known.rates + self.HOPE / np.sqrt(judged + 1)[:, None], 0.99)
        most = np.full(len(exits), float(new.most))
        seconds, tokens = self._prices.scores(np.array(exits), most, replace(known, rates=hope), shape, drafting)
        return tuple(e for e, found in zip(exits, (seconds / tokens).tolist(), strict=True) if found < score)

    def _estimates(self, requests: Sequence[DraftRequest], exits: tuple[int, ...]) -> Estimates:
        """What is known of the sequences' drafts with these exits: of all sequences', then of their own."""
        of_all = {key: self._of_all(*key) for key in {(e, r.drawn) for r, e in zip(requests, exits, strict=True)}}
        rates, shares = [], []
        for request, exit_layer in zip(requests, exits, strict=True):
            own, (rate, share) = request.history.by_exit.get(exit_layer), of_all[exit_layer, request.drawn]
            rates.append(rate if own is None else own.rates(rate, self.SEQUENCE_WEIGHT))
            shares.append(share if own is None else own.shares(share, self.SEQUENCE_WEIGHT))
        return Estimates(np.minimum(np.array(rates), 0.995), np.array(shares))

    def _of_all(self, exit_layer: int, drawn: bool) -> tuple[Floats, Floats]:
        """The rates and shares of all sequences' drafts with an exit layer, from a guess where there were none."""
        known, measured = self.pool.of(exit_layer, drawn), self.model.defaults
        guess, weight = min(0.9, 3 * self.GUESS * exit_layer / self.model.config.num_layers), self.GUESS_WEIGHT
        if self.model.exit_adapters:
            guess = self.ADAPTED_GUESS
        if measured is not None and measured.num_speculations and measured.exit_layer == exit_layer:
            # So many drafts were best, so about half of the times all of them were accepted.
            guess, weight = 0.5 ** (1 / measured.num_speculations), self.TRUSTED_WEIGHT
        prior = np.clip((known.mean(guess, weight) + MIDDLES) / 2, 0.02, 0.98)
        evenly = np.full(BUCKETS, 1 / BUCKETS)
        return known.rates(prior, self.BUCKET_WEIGHT), known.shares(evenly, self.BUCKET_WEIGHT)

    def _of_plan(self, requests: Sequence[DraftRequest], plan: DraftPlan) -> list[Drafts]:
        """Where nothing stops a sequence it drafts what it would more often than not."""
        drafts = []
        for b, request in enumerate(requests):
            probable = plan.made[b] > (SELDOM if request.stops else 0.5)
            count = min(int(probable.sum()), request.max_drafts)
            # After draft i the product has to pay for draft i + 1.
            rule = (plan.estimates.rates[b], np.append(plan.least[b, 1:], 2.0)) if request.stops else ()
            drafts.append(Drafts(plan.exits[b], count, *rule))
        return drafts

    # ---- trials ----

    def _trial(
        self,
        requests: Sequence[DraftRequest],
        otherwise: list[Drafts],
        shape: StepShape,
        count: int,
        among: Sequence[int] | None = None,
    ) -> list[Drafts]:
        """Some drafts of one sequence with the exit that least is known about, if the budget can pay for them.

        ``among``: the exits that come into question; None: those that may pay, or else all, since what is known may
        be out of date.
        """
        places = [
            (self.pool.of(e, request.drawn).judged, request.history.of(e).judged, b, e)
            for b, request in enumerate(requests)
            if request.max_drafts
            for e in (set(request.exits).intersection(self._hopeful if among is None else among) or request.exits)
            if among is None or e in among
        ]
        if not places:
            return otherwise
        *_, b, exit_layer = min(places)
        trial = otherwise.copy()
        trial[b] = Drafts(exit_layer, min(count, requests[b].max_drafts))
        self._is_trial = self._affords(trial, shape)
        return trial if self._is_trial else otherwise
