"""``layerskip demo``: both strategies side by side on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from tqdm import tqdm

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.engine.generation import Generation, generate
from layerskip_kernels.evaluation.equality import Comparison, compare
from layerskip_kernels.evaluation.trust import OtherWork, doubt_of
from layerskip_kernels.model.model import Model

__all__ = ["demo"]

SLOWER = """\
The first layers of this model seldom predict what the whole model predicts, so few drafts are accepted and
speculation costs time. What this shows is equality: drafting changes the speed, never a token, a logit or a byte of the
KV cache."""
COLUMNS = "{:<14} {:>11} {:>15} {:>11} {:>9}   {:<6} {:<6} {:<6}"
TITLES = ("prompt", "plain tok/s", "self-spec tok/s", "acceptance", "speed-up", "tokens", "logits", "KV")


@dataclass(frozen=True)
class Row:
    """One prompt, decoded both ways."""

    name: str
    plain: Generation
    speculative: Generation
    comparison: Comparison

    @property
    def speed_up(self) -> float | None:
        """Self-speculative over plain tokens per second; None where the first token was the last."""
        plain, speculative = self.plain.tokens_per_second, self.speculative.tokens_per_second
        return speculative / plain if plain and speculative else None

    @property
    def doubt(self) -> str | None:
        """Why the speed-up cannot be true, as where another process held the cores meanwhile; None where it can."""
        if self.speed_up is None:
            return None
        generation = self.speculative
        return doubt_of(self.speed_up, len(generation.token_ids) / max(1, generation.cycles))

    def __str__(self) -> str:
        c = self.comparison
        return COLUMNS.format(
            self.name,
            *_numbers(self.plain.tokens_per_second, self.speculative.tokens_per_second),
            *_rates(self.speculative.acceptance_rate, self.speed_up),
            *("equal" if equal else "DIFFER" for equal in (c.tokens_equal, c.logits_equal, c.kv_equal)),
        ).rstrip()


def demo(model: Model, prompts: Sequence[tuple[str, str]], config: GenerationConfig) -> bool:
    """Decode prompts (name, text) both ways and print a row for each; True where all of them were equal."""
    exit_layer, num_drafts = model.draft_settings(config)
    config = replace(config, return_logits=True, return_kv=True)
    print(
        f"{model.name}: {model.config.num_layers} layers, drafting {num_drafts} tokens at a time "
        f"with the first {exit_layer}\n\n{COLUMNS.format(*TITLES).rstrip()}"
    )
    _both_ways(model, prompts[0], replace(config, max_new_tokens=2))  # the first run also warms the machine up
    rows, others = [], OtherWork()
    for prompt in (progress := tqdm(prompts, desc="demo", unit="prompt")):
        rows.append(_both_ways(model, prompt, config))
        with progress.external_write_mode():
            print(rows[-1], flush=True)
    trusted = [row for row in rows if row.doubt is None]
    print(_median_row(trusted or rows))
    for row in rows:
        if row.doubt is not None:
            print(f"{row.name} is left out of the median: {row.doubt}")
    if (load := doubt_of(0.0, other_cpus=others.cpus())) is not None:
        print(f"these speeds are not to be trusted: {load}")
    if (speed_up := _middle(trusted, lambda row: row.speed_up)) is not None and speed_up < 1:
        print(f"\n{SLOWER}")
    print(f"\nOutput for {rows[0].name}:\n\n{prompts[0][1]}{_text(model, rows[0].speculative)}\n")
    return all(row.comparison.all_equal for row in rows)


def _both_ways(model: Model, prompt: tuple[str, str], config: GenerationConfig) -> Row:
    name, text = prompt
    [plain] = generate(model, [text], config.plain())
    [speculative] = generate(model, [text], replace(config, strategy="self_speculative"))
    return Row(name, plain, speculative, compare(plain, speculative))


def _median_row(rows: list[Row]) -> str:
    return COLUMNS.format(
        "median",
        *_numbers(
            _middle(rows, lambda row: row.plain.tokens_per_second),
            _middle(rows, lambda row: row.speculative.tokens_per_second),
        ),
        *_rates(_middle(rows, lambda row: row.speculative.acceptance_rate), _middle(rows, lambda row: row.speed_up)),
        *[""] * 3,
    ).rstrip()


def _middle(rows: list[Row], value: Callable[[Row], float | None]) -> float | None:
    values = [number for row in rows if (number := value(row)) is not None]
    return median(values) if values else None


def _numbers(*values: float | None) -> list[str]:
    return ["-" if value is None else f"{value:.1f}" for value in values]


def _rates(acceptance: float | None, speed_up: float | None) -> list[str]:
    return [
        "-" if acceptance is None else f"{acceptance:.1%}",
        "-" if speed_up is None else f"{speed_up:.2f}x",
    ]


def _text(model: Model, generation: Generation) -> str:
    assert model.tokenizer is not None  # the prompts were texts
    return model.tokenizer.decode(generation.token_ids)
