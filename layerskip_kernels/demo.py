"""``layerskip demo``: both strategies side by side on the same prompts, those that a shipped checkpoint is for."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace
from statistics import median

from tqdm import tqdm

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.datasets import human_eval_prompts
from layerskip_kernels.generate import Generation, generate
from layerskip_kernels.model import Model
from layerskip_kernels.training.parse_task import draw_examples
from layerskip_kernels.verify import Comparison, compare

__all__ = ["demo", "shipped_prompts"]

PARSER = "smollm2-135m-parse"
SLOWER = """\
The first layers of this model seldom say what the whole model says, so few drafts are accepted and speculation costs
time. What this shows is equality: drafting changes the speed, never a token, a logit or a byte of the KV cache."""
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

    def __str__(self) -> str:
        c = self.comparison
        return COLUMNS.format(
            self.name,
            *_numbers(self.plain.tokens_per_second, self.speculative.tokens_per_second),
            *_rates(self.speculative.acceptance_rate, self.speed_up),
            *("equal" if equal else "DIFFER" for equal in (c.tokens_equal, c.logits_equal, c.kv_equal)),
        ).rstrip()


def shipped_prompts(name: str | None, count: int) -> list[tuple[str, str]]:
    """What a model is shown with, as (name, text): utterances of the test split for the one that parses them, else
    HumanEval problems."""
    if name != PARSER:
        return human_eval_prompts(count)
    examples = draw_examples("test", count)
    return [(f"utterance {number}", example.prompt) for number, example in enumerate(examples, 1)]


def demo(model: Model, prompts: ListLike[tuple[str, str]], config: GenerationConfig) -> bool:
    """Decode prompts (name, text) both ways and print a row for each; True where all of them were equal."""
    exit_layer, num_drafts = model.draft_settings(config)
    config = replace(config, return_logits=True, return_kv=True)
    print(
        f"{model.name}: {model.config.num_layers} layers, drafting {num_drafts} tokens at a time "
        f"with the first {exit_layer}\n\n{COLUMNS.format(*TITLES).rstrip()}"
    )
    _both_ways(model, prompts[0], replace(config, max_new_tokens=2))  # the first run also warms the machine up
    rows = []
    for prompt in (progress := tqdm(prompts, desc="demo", unit="prompt")):
        rows.append(_both_ways(model, prompt, config))
        with progress.external_write_mode():
            print(rows[-1], flush=True)
    print(_median_row(rows))
    if (speed_up := _middle(rows, lambda row: row.speed_up)) is not None and speed_up < 1:
        print(f"\n{SLOWER}")
    print(f"\nWhat became of {rows[0].name}:\n\n{prompts[0][1]}{_text(model, rows[0].speculative)}\n")
    return all(row.comparison.all_equal for row in rows)


def _both_ways(model: Model, prompt: tuple[str, str], config: GenerationConfig) -> Row:
    name, text = prompt
    [plain] = generate(model, [text], replace(config, strategy="autoregressive"))
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
