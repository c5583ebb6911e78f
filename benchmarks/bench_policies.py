"""Policies of drafting by replay: fixed settings, thresholds, DEL, a check half way and ours, against an oracle.

A trace holds, for each position of a text that plain decoding wrote, the token that every exit says there and its
confidence (``layerskip lens`` shows the same). Whether a draft is accepted follows from the trace exactly; what an exit
would have been confident of after a wrong draft does not, so the confidence of the text itself stands for it. Seconds
follow from the weights that each pass reads and from ``ROWS``, what passes of several rows cost (bench_steps.py), so a
replay takes no time worth measuring and is the same on every machine and under any load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from layerskip_kernels import GenerationConfig, Model, generate, load_model
from layerskip_kernels.decoding.exits import each_exit
from layerskip_kernels.engine.acceptance import EDGES, DraftHistory
from layerskip_kernels.engine.costs import Pass, StepRows
from layerskip_kernels.engine.draft_lengths import DraftLengths
from layerskip_kernels.engine.drafts import DraftRequest, Drafts
from layerskip_kernels.evaluation.prompts import example_prompts
from timing import arguments, finish

SOURCES = ("layerskip-tiny-code", "smollm2-135m-parse", "SmolLM2-135M-Instruct")
MOST = 16  # drafts before a verification
FIXED = (1, 2, 3, 4, 6, 8, 10, 12, 16)
TRANSFORMERS_THRESHOLD = 0.4  # assistant_confidence_threshold
ROWS = {1: 1.0, 2: 1.08, 3: 1.10, 4: 1.145, 6: 1.25, 8: 1.46, 12: 1.86, 16: 2.49, 48: 6.44}


@dataclass(frozen=True)
class Trace:
    """tokens [n] that the model says; said [n, L - 1] and confidence [n, L - 1] of each exit 1..L - 1 there."""

    tokens: np.ndarray
    said: np.ndarray
    confidence: np.ndarray

    def accepted(self, at: int, exit_layer: int, most: int) -> int:
        """How many drafts from position ``at`` on are right, of at most so many."""
        end = min(at + most, len(self.tokens))
        return int((self.said[at:end, exit_layer - 1] == self.tokens[at:end]).cumprod().sum())


def record(model: Model, prompts: Sequence[list[int]], new_tokens: int) -> list[Trace]:
    """The traces of what plain decoding makes of prompts."""
    config, ids = GenerationConfig("autoregressive", max_new_tokens=new_tokens), model.draft_ids
    traces = []
    for prompt in tqdm(prompts, desc=f"recording {model.name}", unit="prompt"):
        [text] = generate(model, [prompt], config)
        said: dict[int, list[Any]] = {}
        for rows in each_exit(model, [*prompt, *text.token_ids][:-1], len(prompt) - 1):
            logits = rows.logits if ids is None else rows.logits[:, ids]
            best, greatest = logits.argmax(1), logits.softmax(1).amax(1)
            said.setdefault(rows.layer, []).append((best if ids is None else ids[best], greatest))
        columns = [said[layer] for layer in range(1, model.config.num_layers)]
        tokens, confidences = (
            np.stack([np.concatenate([np.asarray(run[i]) for run in runs]) for runs in columns], 1) for i in (0, 1)
        )
        traces.append(Trace(np.asarray(text.token_ids), tokens, confidences))
    return traces


# ---- what a cycle costs ----


class Price:
    """Seconds of a cycle, in those of a plain step."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.plain = self._of(StepRows(((1, 0),)).verify_passes(model))

    def __call__(self, exit_layer: int, count: int) -> float:
        rows = StepRows(((exit_layer, count),))
        return self._of(rows.draft_passes(self.model) + rows.verify_passes(self.model)) / self.plain

    def half_way(self, exit_layer: int, middle: int, counts: Sequence[int], verified: int) -> float:
        """Of runs of drafts, after each of which all its rows rise from the exit to a middle layer; then the rest."""
        c, layer = self.model.config, self.model.layer_products
        seconds = sum(self(exit_layer, count) - self(exit_layer, 0) - self._rise(exit_layer, count) for count in counts)
        for count in counts:
            seconds += self._of([Pass((middle - exit_layer) * layer, count + 1)]) / self.plain
        head = [Pass(c.vocab_size * c.hidden_size, verified + 1)]
        last = [Pass(exit_layer * layer, 1), Pass((c.num_layers - middle) * layer, verified + 1), *head]
        checks = [Pass(self.model.draft_products[middle] - middle * layer, count + 1) for count in counts]
        return seconds + self._of(last + checks) / self.plain

    def _rise(self, exit_layer: int, count: int) -> float:
        """What verification of drafts costs beyond a plain step."""
        rows = StepRows(((exit_layer, count),)).verify_passes(self.model)
        return self._of(rows) / self.plain - 1

    @staticmethod
    def _of(passes: Sequence[Pass]) -> float:
        knots, costs = list(ROWS), list(ROWS.values())
        return float(sum(p.weights * np.interp(p.rows, knots, costs) for p in passes))


# ---- policies: each yields cycles (tokens gained, cost) of a trace ----

Cycle = tuple[int, float]
Policy = Callable[[Trace], Iterator[Cycle]]


def fixed(price: Price, exit_layer: int, count: int, trace: Trace) -> Iterator[Cycle]:
    at = 1
    while at < len(trace.tokens):
        drafts = min(count, len(trace.tokens) - at - 1)
        gained = trace.accepted(at, exit_layer, drafts) + 1
        yield gained, price(exit_layer, drafts)
        at += gained


def threshold(price: Price, exit_layer: int, least: float, trace: Trace) -> Iterator[Cycle]:
    """Draft until a draft's confidence is below a threshold, as Transformers does."""
    at = 1
    while at < len(trace.tokens):
        most, drafts = min(MOST, len(trace.tokens) - at - 1), 0
        while drafts < most:
            drafts += 1
            if trace.confidence[at + drafts - 1, exit_layer - 1] < least:
                break
        gained = trace.accepted(at, exit_layer, drafts) + 1
        yield gained, price(exit_layer, drafts)
        at += gained


class Del:
    """DEL (arXiv 2504.05598): before each cycle the exit and the length that give the most tokens per layer passed.

    Acceptance of each exit comes from shadow answers at every verified position, the recent ones weighing most; a draft
    stops where its confidence is below what that exit's right drafts had on average, less its wrong ones'.
    As published it knows layers, not seconds.
    """

    FADING = 0.95

    def __init__(self, price: Price, exits: Sequence[int]) -> None:
        self.price, self.exits = price, exits
        self.right = dict.fromkeys(exits, 0.5)
        self.sure = {e: {True: 0.8, False: 0.4} for e in exits}

    def __call__(self, trace: Trace) -> Iterator[Cycle]:
        at, layers = 1, self.price.model.config.num_layers
        while at < len(trace.tokens):
            most = min(MOST, len(trace.tokens) - at - 1)
            ways = [(self._tokens(e, d) / (e * d + layers), e, d) for e in self.exits for d in range(most + 1)]
            _, exit_layer, count = max(ways)
            least, drafts = sum(self.sure[exit_layer].values()) / 2, 0
            while drafts < count:
                drafts += 1
                if trace.confidence[at + drafts - 1, exit_layer - 1] < least:
                    break
            gained = trace.accepted(at, exit_layer, drafts) + 1
            yield gained, self.price(exit_layer, drafts)
            for position in range(at, at + gained):
                self._note(trace, position)
            at += gained

    def _tokens(self, exit_layer: int, count: int) -> float:
        rate = min(self.right[exit_layer], 0.995)
        return (1 - rate ** (count + 1)) / (1 - rate)

    def _note(self, trace: Trace, position: int) -> None:
        for e in self.exits:
            right = bool(trace.said[position, e - 1] == trace.tokens[position])
            self.right[e] += (right - self.right[e]) * (1 - self.FADING)
            sure = self.sure[e]
            sure[right] += (float(trace.confidence[position, e - 1]) - sure[right]) * (1 - self.FADING)


def half_way(price: Price, exit_layer: int, middle: int, least: float, trace: Trace) -> Iterator[Cycle]:
    """Draft; where the joint confidence falls, raise all rows to a middle layer, cut what it would not have said.

    Drafting goes on after the middle layer's own token. All that is left is verified at MOST drafts, or where the
    middle layer disagreed. Rows that were raised are not computed again.
    """
    at = 1
    while at < len(trace.tokens):
        most, counts, kept, agreed = min(MOST, len(trace.tokens) - at - 1), [], 0, True
        while kept < most and agreed and len(counts) < 4:
            run, joint = 0, 1.0
            while kept + run < most and joint >= least:
                joint *= float(trace.confidence[at + kept + run, exit_layer - 1])
                run += 1
            said = slice(at + kept, at + kept + run)
            same = trace.said[said, exit_layer - 1] == trace.said[said, middle - 1]
            counts.append(run)
            kept += int(same.cumprod().sum())
            if not same.all():  # the middle layer's token takes the place of the first it would not have said
                kept += 1
        gained = min(trace.accepted(at, middle, kept), most) + 1 if kept else 1
        yield gained, price.half_way(exit_layer, middle, counts, kept) if counts else 1.0
        at += gained


class Ours:
    """The engine's own DraftLengths, told what the replay's cycles cost. One engine for all texts."""

    def __init__(self, price: Price, exits: tuple[int, ...]) -> None:
        self.price, self.exits, self.lengths = price, exits, DraftLengths(price.model)

    def __call__(self, trace: Trace) -> Iterator[Cycle]:
        request = DraftRequest(self.exits, MOST, MOST, DraftHistory())
        at = 1
        while at < len(trace.tokens):
            request.max_drafts = min(MOST, len(trace.tokens) - at - 1)
            [chosen] = self.lengths.choose([request])
            said = list(drafted(chosen, trace.confidence[at:, chosen.exit_layer - 1].tolist()))
            accepted = trace.accepted(at, chosen.exit_layer, len(said))
            rows = ((chosen.exit_layer, len(said)),)
            seconds = self.price(*rows[0])
            verify = Price._of(StepRows(rows).verify_passes(self.price.model)) / self.price.plain
            self.lengths.learn([request], rows, [accepted], (0, 0), seconds - verify, verify, [said])
            yield accepted + 1, seconds
            at += accepted + 1


def drafted(chosen: Drafts, confidences: Sequence[float]) -> Iterator[float]:
    """The confidences of the drafts that draft_pass makes of a choice."""
    expected = 1.0
    for i in range(chosen.count):
        yield confidences[i]
        if chosen.acceptance is not None and chosen.least is not None:
            expected *= chosen.acceptance[np.searchsorted(EDGES, confidences[i], side="right")]
            if expected < chosen.least[i]:
                return


def oracle(price: Price, exits: Sequence[int], value: float, trace: Trace) -> Iterator[Cycle]:
    """Knows which drafts will be accepted: of all exits and lengths the best, a token being worth ``value`` seconds."""
    at = 1
    while at < len(trace.tokens):
        most = min(MOST, len(trace.tokens) - at - 1)
        ways = [(value - 1.0, 1, 1.0)]
        for e in exits:
            for count in range(1, trace.accepted(at, e, most) + 1):
                cost = price(e, count)
                ways.append(((count + 1) * value - cost, count + 1, cost))
        _, gained, cost = max(ways)
        yield gained, cost
        at += gained


def speed(policy: Policy, traces: Sequence[Trace]) -> float:
    """Tokens per second, in those of plain decoding."""
    cycles = [cycle for trace in traces for cycle in policy(trace)]
    return sum(gained for gained, _ in cycles) / sum(cost for _, cost in cycles)


# ---- the comparison ----


def compare(model: Model, traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Every policy's speed over plain decoding, and its share of the oracle's."""
    price, own = Price(model), model.defaults
    auto = model.draft_exits(GenerationConfig(exit_layer="auto", num_speculations="auto"))
    exits = sorted(set(auto))
    grid = {(e, d): speed(partial(fixed, price, e, d), traces) for e in exits for d in FIXED}
    (exit_layer, count), best = max(grid.items(), key=lambda item: item[1])
    middles = [m for m in (2 * exit_layer, (exit_layer + model.config.num_layers) // 2) if m < model.config.num_layers]
    halves = {
        (m, p): speed(partial(half_way, price, exit_layer, m, p), traces) for m in middles for p in (0.3, 0.5, 0.7)
    }
    most = 1.0
    for _ in range(4):
        most = speed(partial(oracle, price, exits, 1 / most), traces)
    found = {
        "plain": 1.0,
        f"fixed, the best: exit {exit_layer}, {count} drafts": best,
        f"threshold {TRANSFORMERS_THRESHOLD}, exit {exit_layer} (Transformers)": speed(
            partial(threshold, price, exit_layer, TRANSFORMERS_THRESHOLD), traces
        ),
        "DEL": speed(Del(price, exits), traces),
        "check half way, the best: layer {}, joint confidence {}".format(*max(halves, key=halves.__getitem__)): max(
            halves.values()
        ),
        f'ours, exit {exit_layer}, "auto" drafts': speed(Ours(price, (exit_layer,)), traces),
        'ours, "auto" exit and drafts': speed(Ours(price, auto), traces),
        "oracle": most,
    }
    if own is not None:
        found["fixed, the model's own"] = speed(partial(fixed, price, own.exit_layer, own.num_speculations), traces)
    return [{"policy": name, "over_plain": value, "share_of_oracle": value / most} for name, value in found.items()]


def main() -> None:
    args = arguments(__doc__ or "", prompts=24, new_tokens=96)
    results = {}
    for source in SOURCES:
        model = load_model(source)
        prompts = [model.tokenizer.encode(text) for _, text in example_prompts(source, args.prompts).prompts]
        traces = record(model, prompts, args.new_tokens)
        results[source] = {"tokens": sum(len(t.tokens) for t in traces), "policies": compare(model, traces)}
    finish("policies", {"prompts": args.prompts, "new_tokens": args.new_tokens, "models": results}, args.save)


if __name__ == "__main__":
    main()
