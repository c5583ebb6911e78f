"""``layerskip generate``: the text streams to stdout, or many texts go to a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from layerskip_kernels.cli.interrupts import INTERRUPTED, NotedInterrupt
from layerskip_kernels.cli.options import (
    add_command,
    add_exit_option,
    add_generation_options,
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    counted,
    generation_config,
    identity,
    load,
    output_path,
    prompts_of,
)
from layerskip_kernels.config import Acceptance, GenerationConfig, Strategy
from layerskip_kernels.model.files import naming

if TYPE_CHECKING:
    from layerskip_kernels.engine.request import Generation
    from layerskip_kernels.model.model import Model

__all__ = ["add_commands"]

PROMPTS_AT_ONCE = 8  # that go to a file: one pass over the weights serves them all
FEW_DRAFTS, FEW_ACCEPTED = 20, 0.25  # from this many drafts on, with fewer than this share accepted, a hint is shown
HINT = (
    "layerskip: few drafts were accepted, so drafting costs time here; try --strategy autoregressive, or let "
    "`layerskip sweep` find this model's best setting"
)


def add_commands(commands: Any) -> None:
    """Add ``generate`` to the subparsers of the command line."""
    parser = add_command(commands, "generate", _generate, "continue a prompt; the text streams to stdout")
    add_prompt_options(parser, "the first of the model's example prompts")
    parser.add_argument("--strategy", choices=get_args(Strategy), default=GenerationConfig().strategy)
    add_exit_option(parser)
    add_generation_options(parser)
    add_model_options(parser)
    add_sampling_options(parser)
    parser.add_argument(
        "--acceptance",
        choices=get_args(Acceptance),
        default="exact",
        help="exact: the text of plain sampling; rejection: its distribution (default: exact)",
    )
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)")
    parser.add_argument(
        "--logprobs", type=int, metavar="N",
        help="with --json or --output: log-probabilities, also of the N likeliest tokens",
    )  # fmt: skip
    parser.add_argument("--show-drafts", action="store_true", help="accepted tokens green, corrected ones red")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    parser.add_argument(
        "--output", type=output_path, metavar="FILE", help="write a line of JSON for each text there, not to stdout"
    )


def _generate(args: argparse.Namespace) -> int:
    """Each prompt in turn, or several at once into a file; ends with what there is when interrupted."""
    config = generation_config(args)
    if args.show_drafts and (args.output or config.num_samples > 1):
        raise ValueError("--show-drafts colours one text as it streams: leave out --output and --num-samples")
    prompts = prompts_of(args, default_count=1)
    model = load(args)
    outputs: list[dict[str, Any]] = []
    generations: list[Generation] = []
    with _results(args.output) as write_result, NotedInterrupt() as interrupt:
        for group in _groups(prompts, PROMPTS_AT_ONCE if args.output else 1, shown=bool(args.output)):
            found = _generate_shown(model, group, config, args, len(prompts) > 1, interrupt)
            generations += found
            names = [name for name, _ in group for _ in range(config.num_samples)]
            for name, generation in zip(names, found, strict=True):
                outputs.append({"prompt": name, **_described(generation)})
                write_result(outputs[-1])
            if interrupt.asked:
                break
    if _drafts_in_vain(generations):
        print(HINT, file=sys.stderr)
    if args.json:
        print(json.dumps({**identity(model), "strategy": args.strategy, "outputs": outputs}))
    if interrupt.asked:
        print(f"layerskip: interrupted; {counted(len(outputs), 'text')} so far", file=sys.stderr)
    return INTERRUPTED if interrupt.asked else 0


def _generate_shown(
    model: Model,
    group: list[tuple[str, str]],
    config: GenerationConfig,
    args: argparse.Namespace,
    is_one_of_many: bool,
    interrupt: NotedInterrupt,
) -> list[Generation]:
    """Generate from named prompts. Unless it goes to a file, there is one; its text streams to stdout, and several
    samples follow when done."""
    from layerskip_kernels import generate

    hooks: dict[str, Any] = {"cancelled": lambda: interrupt.asked}
    if args.output:
        return generate(model, [prompt for _, prompt in group], config, **hooks)
    [(name, prompt)] = group
    if is_one_of_many:
        print(f"==> {name} <==", flush=True)
    if config.num_samples > 1:
        generations = generate(model, [prompt], config, **hooks)
        for generation in generations:
            print(f"==> sample {generation.sample} <==\n{generation.text}", flush=True)
    else:
        generations = _stream(model, prompt, config, args.show_drafts, hooks)
    for generation in generations:
        print(_statistics(generation), file=sys.stderr)
    return generations


def _stream(
    model: Model, prompt: str, config: GenerationConfig, show_drafts: bool, hooks: dict[str, Any]
) -> list[Generation]:
    from layerskip_kernels import generate
    from layerskip_kernels.cli.screen import Screen

    if model.tokenizer is None:
        raise ValueError(f"{model.name} came without a tokenizer, which a prompt of text needs")
    screen = Screen(model.tokenizer, _write, config.stop_strings, config.min_new_tokens, show_drafts)
    with _prompt_bar() as on_prompt:
        generations = generate(
            model, [prompt], config, on_tokens=screen.on_tokens, on_draft=screen.on_draft, on_prompt=on_prompt, **hooks
        )
    screen.finish()
    print(flush=True)
    return generations


@contextmanager
def _prompt_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar for a prompt that takes several steps, in a terminal, gone before the text begins."""
    from tqdm import tqdm

    bar = tqdm(desc="prompt", unit="token", leave=False, disable=not sys.stderr.isatty(), delay=1.0)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    with bar:
        yield show


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _groups(prompts: list[tuple[str, str]], size: int, shown: bool) -> Iterator[list[tuple[str, str]]]:
    """The prompts, ``size`` at a time; with a progress bar where ``shown``."""
    from tqdm import tqdm

    with tqdm(total=len(prompts), desc="generate", unit="prompt", disable=not shown) as progress:
        for start in range(0, len(prompts), size):
            group = prompts[start : start + size]
            yield group
            progress.update(len(group))


@contextmanager
def _results(path: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes a result to a file as a line of JSON, at once, so that a run cut short keeps the rest."""
    if path is None:
        yield lambda _: None
        return
    with naming(path), open(path, "w", encoding="utf-8") as file:

        def write(result: dict[str, Any]) -> None:
            file.write(json.dumps(result) + "\n")
            file.flush()

        yield write


def _drafts_in_vain(generations: list[Generation]) -> bool:
    drafted = sum(generation.drafted for generation in generations)
    accepted = sum(generation.accepted for generation in generations)
    return drafted >= FEW_DRAFTS and accepted < FEW_ACCEPTED * drafted


def _statistics(generation: Generation) -> str:
    parts = [
        f"{counted(generation.prompt_length, 'prompt token')} in {generation.prefill_seconds:.2f} s",
        f"{counted(len(generation.token_ids), 'token')} generated ({generation.finish_reason})",
    ]
    if generation.tokens_per_second is not None:
        parts.append(f"{generation.tokens_per_second:.1f} tokens/s")
    if generation.drafted:
        parts.append(f"{generation.accepted} of {counted(generation.drafted, 'draft')} accepted")
        parts.append(f"{generation.tokens_per_cycle:.2f} tokens per verification")
    return "; ".join(parts)


def _described(generation: Generation) -> dict[str, Any]:
    output: dict[str, Any] = {
        "sample": generation.sample,
        "seed": generation.seed,
        "token_ids": generation.token_ids,
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "tokens_per_second": generation.tokens_per_second,
        "acceptance_rate": generation.acceptance_rate,
        "tokens_per_cycle": generation.tokens_per_cycle,
    }
    if generation.logprobs is not None:
        output["logprobs"] = [asdict(logprob) for logprob in generation.logprobs]
    return output
