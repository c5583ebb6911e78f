"""``layerskip sweep``: exit layers and numbers of drafts on given prompts, timed beside plain decoding in one run."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from layerskip_kernels.config import AUTO, GenerationConfig
from layerskip_kernels.engine.generation import Generation, generate
from layerskip_kernels.engine.request import encode
from layerskip_kernels.evaluation.equality import BitsDiffer
from layerskip_kernels.evaluation.facts import load_of, machine_facts
from layerskip_kernels.evaluation.timing import Candidate, Timing, interleave
from layerskip_kernels.evaluation.trust import OtherWork, doubt_of, plural
from layerskip_kernels.model.defaults import DraftDefaults
from layerskip_kernels.model.model import Model

__all__ = [
    "COLUMNS", "PLAIN", "Measured", "as_text", "best", "check_worth_saving", "defaults_of", "measure",
    "settings_of", "sweep", "write_csv",
]  # fmt: skip

PLAIN = "plain"
CHOSEN = "chosen on the way"
COLUMNS = (
    "exit_layer", "num_speculations", "acceptance_rate", "tokens_per_cycle", "tokens_per_second", "speedup",
    "speedup_low", "speedup_high", "doubt",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One setting on every prompt: what it generated, and its decoding seconds round by round.

    ``rounds``: for each prompt the seconds of each round; ``plain``: the same of plain decoding.
    """

    config: GenerationConfig
    generations: list[Generation]
    rounds: list[tuple[float, ...]]
    plain: list[tuple[float, ...]]

    @property
    def seconds(self) -> list[float]:
        """For each prompt the median of the rounds."""
        return [median(rounds) for rounds in self.rounds]

    @property
    def speedups(self) -> list[float]:
        """Plain decoding's seconds over this setting's, prompt by prompt."""
        return [median(plain) / own for plain, own in zip(self.plain, self.seconds, strict=True)]

    @property
    def speedups_by_round(self) -> list[float]:
        """For each round the median of the prompts."""
        ratios = [
            [plain / own for plain, own in zip(*pair, strict=True)]
            for pair in zip(self.plain, self.rounds, strict=True)
        ]
        return [median(of_round) for of_round in zip(*ratios, strict=True)]

    @property
    def speedup_low(self) -> float:
        return min(self.speedups_by_round)

    @property
    def speedup_high(self) -> float:
        return max(self.speedups_by_round)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens, over all prompts; None where nothing was drafted."""
        drafted = sum(generation.drafted for generation in self.generations)
        return sum(generation.accepted for generation in self.generations) / drafted if drafted else None

    @property
    def tokens_per_cycle(self) -> float:
        """Tokens gained per verification, over all prompts; 1 in plain decoding."""
        return sum(map(_decoded, self.generations)) / sum(generation.cycles for generation in self.generations)

    @property
    def highest_speedup(self) -> float:
        """What `speedup` cannot exceed: a cycle takes at least one pass of the whole model, as a plain token does."""
        return max(self.tokens_per_cycle, median(_decoded(g) / g.cycles for g in self.generations))

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, the prompt and the token that follows it left out: the median of the prompts."""
        pairs = zip(self.generations, self.seconds, strict=True)
        return median(_decoded(generation) / seconds for generation, seconds in pairs)

    @property
    def speedup(self) -> float:
        """Over plain decoding: the median of the prompts."""
        return median(self.speedups)


def settings_of(
    plain: GenerationConfig, exit_layers: Sequence[int], num_speculations: Sequence[int]
) -> dict[str, GenerationConfig]:
    """Plain decoding under the name PLAIN, then each exit layer with each number of drafts, by name."""
    drafting = {
        f"exit {e}, {d} drafts": replace(plain, strategy="self_speculative", exit_layer=e, num_speculations=d)
        for e, d in product(exit_layers, num_speculations)
    }
    return {PLAIN: plain.plain(), **drafting}


def measure(
    model: Model, prompts: Sequence[list[int]], settings: Mapping[str, GenerationConfig], rounds: int, warmup: int = 1
) -> dict[str, Measured]:
    """Generate from every prompt with every setting, compare the tokens with plain decoding's, then time them all.

    Settings are timed in turn, prompt by prompt. ``settings`` holds PLAIN. Prompts that are over after one token have
    no decoding to time and are left out. Raises BitsDiffer for a setting with other tokens, ValueError where no prompt
    is left. Progress goes to stderr.
    """
    generations: dict[str, list[Generation]] = {name: [] for name in settings}
    timings: list[dict[str, Timing]] = []
    with tqdm(total=len(prompts) * len(settings) * (1 + warmup + rounds), desc="sweep", unit="generation") as progress:
        for prompt in prompts:
            expected = _compared(model, prompt, settings, progress)
            if _decoded(expected[PLAIN]) == 0:
                progress.update(len(settings) * (warmup + rounds))
                continue
            for name, generation in expected.items():
                generations[name].append(generation)
            candidates = {
                name: _candidate(model, prompt, config, expected[name], progress) for name, config in settings.items()
            }
            timings.append(interleave(candidates, rounds, warmup=warmup))
    if not timings:
        raise ValueError("every prompt is over after one token, so there is no decoding to time; give other prompts")
    seconds = {name: [timing[name].seconds for timing in timings] for name in settings}
    return {
        name: Measured(config, generations[name], seconds[name], seconds[PLAIN]) for name, config in settings.items()
    }


def _compared(
    model: Model, prompt: list[int], settings: Mapping[str, GenerationConfig], progress: tqdm[Any]
) -> dict[str, Generation]:
    """What each setting generates, when it is what plain decoding does."""
    found: dict[str, Generation] = {}
    for name, config in settings.items():
        [found[name]] = generate(model, [prompt], config)
        progress.update()
    for name, generation in found.items():
        if generation.token_ids != found[PLAIN].token_ids:
            raise BitsDiffer(f"{name} gave other tokens than plain decoding; run `layerskip verify`")
    return found


def _candidate(
    model: Model, prompt: list[int], config: GenerationConfig, expected: Generation, progress: tqdm[Any]
) -> Candidate:
    """A generation to time, without the prompt, which all settings process in the same way."""

    def seconds(generation: Generation) -> float:
        if generation.token_ids != expected.token_ids:
            raise BitsDiffer("a generation was not repeated token for token; run `layerskip verify`")
        return generation.draft_seconds + generation.verify_seconds

    def run() -> Generation:
        return generate(model, [prompt], config)[0]

    return Candidate(run, restore=partial(progress.update, 1), seconds=seconds)


def _decoded(generation: Generation) -> int:
    """Tokens after the one that the prompt's own pass gives."""
    return len(generation.token_ids) - 1


# ---- the command ----


def sweep(
    model: Model,
    prompts: Sequence[tuple[str, str]],
    exit_layers: Sequence[int],
    num_speculations: Sequence[int],
    max_new_tokens: int = 64,
    rounds: int = 3,
    source: str = "given prompts",
) -> dict[str, Any]:
    """Measure greedy decoding on prompts (name, text) from ``source``; see `measure`.

    Gives ``model``, ``machine`` (with the ``settings``, plain decoding's tokens per second among them, and the CPUs
    that other processes used meanwhile) and ``results``: a dict of COLUMNS for each exit layer and number of drafts,
    and last one of "auto", where both are chosen on the way.
    ``speedup_low`` and ``speedup_high`` are the slowest and the fastest round; ``doubt`` says why a row is not to be
    trusted (`trust.doubt_of`), or is None.
    """
    for exit_layer in exit_layers:
        GenerationConfig(exit_layer=exit_layer).resolve_exit_layer(model.config.num_layers)
    plain = GenerationConfig("autoregressive", max_new_tokens=max_new_tokens)
    auto = replace(plain, strategy="self_speculative", exit_layer=AUTO, num_speculations=AUTO)
    settings = {**settings_of(plain, exit_layers, num_speculations), CHOSEN: auto}
    facts, others = machine_facts(), OtherWork()
    measured = measure(model, [encode(model, text) for _, text in prompts], settings, rounds)
    facts["other_cpus"] = others.cpus()
    used = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "draft_vocab": _draft_vocab_sizes(model, exit_layers),
        "num_layers": model.config.num_layers,
        "prompts": len(measured[PLAIN].generations),
        "prompts_from": source,
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "tokens_equal": True,
        "plain_tokens_per_second": measured[PLAIN].tokens_per_second,
    }
    results = [_result(setting, rounds, facts["other_cpus"]) for name, setting in measured.items() if name != PLAIN]
    return {"model": model.name, "machine": {**facts, "settings": used}, "results": results}


def _draft_vocab_sizes(model: Model, exit_layers: Sequence[int]) -> int | dict[int, int | None] | None:
    """How many words drafts are chosen from (None: all); by exit layer, where these differ."""
    heads = {exit_layer: model.exit_at(exit_layer).head for exit_layer in exit_layers}
    sizes = {exit_layer: None if head is None else len(head.ids) for exit_layer, head in heads.items()}
    return sizes if len(set(sizes.values())) > 1 else sizes[exit_layers[0]]


def _result(setting: Measured, rounds: int, other_cpus: float | None) -> dict[str, Any]:
    of_config = {name: getattr(setting.config, name) for name in COLUMNS[:2]}
    spread = setting.speedup_low, setting.speedup_high
    doubt = doubt_of(setting.speedup, setting.highest_speedup, spread, rounds, other_cpus)
    return {**of_config, **{name: getattr(setting, name) for name in COLUMNS[2:-1]}, "doubt": doubt}


def best(report: dict[str, Any]) -> dict[str, Any]:
    """The fastest of a report's settings, among those without doubt where there are any; among equals the first.

    "auto" is beside them: it is not a setting that could be a model's default.
    """
    fixed = [result for result in report["results"] if result["exit_layer"] != AUTO]
    trusted = [result for result in fixed if result["doubt"] is None]
    return max(trusted or fixed, key=lambda result: result["speedup"])


def check_worth_saving(report: dict[str, Any]) -> None:
    """Raise ValueError, saying what to do, where the best setting is not a result or not faster than plain decoding."""
    chosen = best(report)
    if chosen["doubt"] is not None:
        raise ValueError(
            f"no setting was saved, because none can be trusted ({chosen['doubt']}): measure again on a quiet machine, "
            f"with --rounds {max(5, 2 * report['machine']['settings']['rounds'])}"
        )
    if chosen["speedup"] <= 1:
        raise ValueError("no setting was saved, because none is faster than plain decoding")


def defaults_of(model: Model, result: dict[str, Any]) -> DraftDefaults:
    """One result as the model's defaults, with the draft vocabulary that it was measured with."""
    head = model.exit_at(result["exit_layer"]).head
    vocab = None if head is None else tuple(head.ids.tolist())
    return DraftDefaults(result["exit_layer"], result["num_speculations"], vocab)


def write_csv(report: dict[str, Any], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(report["results"])


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    settings, chosen = report["machine"]["settings"], best(report)
    lines = [
        f"{report['model']}, {settings['num_layers']} layers, on {plural(settings['prompts'], 'prompt')} "
        f"({settings['prompts_from']}), at most {settings['max_new_tokens']} tokens each, equal to plain decoding's",
        f"plain decoding: {settings['plain_tokens_per_second']:.1f} tokens/s; {load_of(report['machine'])}",
        f"{'exit':>6}{'drafts':>8}{'acceptance':>12}{'tokens/cycle':>14}{'tokens/s':>10}{'speed-up':>10}  of rounds",
    ]
    lines += [_line(row) + ("  <- best" if row is chosen else "") for row in report["results"]]
    doubts = {row["doubt"]: None for row in report["results"] if row["doubt"] is not None}
    if doubts:
        lines.append("?: no result: " + "; ".join(doubts))
    lines.append(f"best: --exit-layer {chosen['exit_layer']} --num-speculations {chosen['num_speculations']}")
    if chosen["speedup"] <= 1:
        lines.append(
            "No setting is faster than plain decoding (--strategy autoregressive): the first layers of this model "
            "seldom predict what the whole model does. Training for early exit changes that: see `layerskip train`."
        )
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    rate = "-" if row["acceptance_rate"] is None else f"{row['acceptance_rate']:.1%}"
    return (
        f"{row['exit_layer']:>6}{row['num_speculations']:>8}{rate:>12}{row['tokens_per_cycle']:>14.2f}"
        f"{row['tokens_per_second']:>10.1f}{row['speedup']:>9.2f}x  {row['speedup_low']:.2f}-{row['speedup_high']:.2f}"
        + ("" if row["doubt"] is None else "  ?")
    )
