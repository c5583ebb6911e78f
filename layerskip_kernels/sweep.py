"""``layerskip sweep``: exit layers and numbers of drafts on given prompts, timed beside plain decoding in one run."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from layerskip_kernels.bench import BitsDiffer, Candidate, Timing, interleave, machine_facts
from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.defaults import DraftDefaults
from layerskip_kernels.generate import Generation, generate
from layerskip_kernels.model import Model
from layerskip_kernels.request import encode

__all__ = [
    "COLUMNS", "PLAIN", "Measured", "as_text", "best", "defaults_of", "exit_layers_of", "measure",
    "settings_of", "sweep", "write_csv",
]  # fmt: skip

PLAIN = "plain"
COLUMNS = ("exit_layer", "num_speculations", "acceptance_rate", "tokens_per_cycle", "tokens_per_second", "speedup")


@dataclass(frozen=True)
class Measured:
    """One setting on every prompt: what it generated, and its decoding seconds, each the median of the rounds.

    ``speedups``: plain decoding's seconds over them, prompt by prompt.
    """

    config: GenerationConfig
    generations: list[Generation]
    seconds: list[float]
    speedups: list[float]

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
    def tokens_per_second(self) -> float:
        """Decoding speed, the prompt and the token that follows it left out: the median of the prompts."""
        pairs = zip(self.generations, self.seconds, strict=True)
        return median(_decoded(generation) / seconds for generation, seconds in pairs)

    @property
    def speedup(self) -> float:
        """Over plain decoding: the median of the prompts."""
        return median(self.speedups)


def exit_layers_of(num_layers: int) -> list[int]:
    """The exit layers that are tried where none were named: an eighth, a quarter, a third and a half of the layers."""
    return sorted({max(1, round(num_layers * part)) for part in (1 / 8, 1 / 4, 1 / 3, 1 / 2)} & {*range(1, num_layers)})


def settings_of(
    plain: GenerationConfig, exit_layers: ListLike[int], num_speculations: ListLike[int]
) -> dict[str, GenerationConfig]:
    """Plain decoding under the name PLAIN, then each exit layer with each number of drafts, by name."""
    drafting = {
        f"exit {e}, {d} drafts": replace(plain, strategy="self_speculative", exit_layer=e, num_speculations=d)
        for e, d in product(exit_layers, num_speculations)
    }
    return {PLAIN: replace(plain, strategy="autoregressive"), **drafting}


def measure(
    model: Model, prompts: ListLike[list[int]], settings: Mapping[str, GenerationConfig], rounds: int, warmup: int = 1
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
    seconds = {name: [timing[name].median for timing in timings] for name in settings}
    return {
        name: Measured(
            config,
            generations[name],
            seconds[name],
            [plain / own for plain, own in zip(seconds[PLAIN], seconds[name], strict=True)],
        )
        for name, config in settings.items()
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
    prompts: ListLike[tuple[str, str]],
    exit_layers: ListLike[int],
    num_speculations: ListLike[int],
    max_new_tokens: int = 64,
    rounds: int = 3,
) -> dict[str, Any]:
    """Measure greedy decoding on prompts (name, text); see `measure`.

    Gives ``model``, ``machine`` (with the ``settings``, plain decoding's tokens per second among them) and
    ``results``: a dict of COLUMNS for each exit layer and number of drafts.
    """
    for exit_layer in exit_layers:
        GenerationConfig(exit_layer=exit_layer).resolve_exit_layer(model.config.num_layers)
    plain = GenerationConfig("autoregressive", max_new_tokens=max_new_tokens)
    settings = settings_of(plain, exit_layers, num_speculations)
    measured = measure(model, [encode(model, text) for _, text in prompts], settings, rounds)
    used = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "draft_vocab": None if model.draft_ids is None else len(model.draft_ids),
        "num_layers": model.config.num_layers,
        "prompts": len(measured[PLAIN].generations),
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "tokens_equal": True,
        "plain_tokens_per_second": measured[PLAIN].tokens_per_second,
    }
    results = [_result(setting) for name, setting in measured.items() if name != PLAIN]
    return {"model": model.name, "machine": {**machine_facts(), "settings": used}, "results": results}


def _result(setting: Measured) -> dict[str, Any]:
    of_config = {name: getattr(setting.config, name) for name in COLUMNS[:2]}
    return {**of_config, **{name: getattr(setting, name) for name in COLUMNS[2:]}}


def best(report: dict[str, Any]) -> dict[str, Any]:
    """The fastest of a report's results; among equals the first."""
    return max(report["results"], key=lambda result: result["speedup"])


def defaults_of(model: Model, result: dict[str, Any]) -> DraftDefaults:
    """One result as the model's defaults, with the draft vocabulary that it was measured with."""
    vocab = None if model.draft_ids is None else tuple(model.draft_ids.tolist())
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
        f"{report['model']}, {settings['num_layers']} layers, on {settings['prompts']} prompts, at most "
        f"{settings['max_new_tokens']} tokens each, all equal to plain decoding's",
        f"plain decoding: {settings['plain_tokens_per_second']:.1f} tokens/s",
        f"{'exit':>6}{'drafts':>8}{'acceptance':>12}{'tokens/cycle':>14}{'tokens/s':>10}{'speed-up':>10}",
    ]
    for row in report["results"]:
        rate = "-" if row["acceptance_rate"] is None else f"{row['acceptance_rate']:.1%}"
        lines.append(
            f"{row['exit_layer']:>6}{row['num_speculations']:>8}{rate:>12}{row['tokens_per_cycle']:>14.2f}"
            f"{row['tokens_per_second']:>10.1f}{row['speedup']:>9.2f}x" + ("  <- best" if row is chosen else "")
        )
    lines.append(f"best: --exit-layer {chosen['exit_layer']} --num-speculations {chosen['num_speculations']}")
    if chosen["speedup"] <= 1:
        lines.append(
            "No setting is faster than plain decoding (--strategy autoregressive): this model's first layers seldom "
            "say what the whole model says. Training for early exit changes that: see `layerskip train`."
        )
    return "\n".join(lines)
