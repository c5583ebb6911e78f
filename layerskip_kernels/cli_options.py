"""What the commands of ``layerskip`` share: their options, and the model, prompts and config that these ask for."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from layerskip_kernels.config import NUM_SPECULATIONS, GenerationConfig

if TYPE_CHECKING:
    from layerskip_kernels.model import Model

__all__ = [
    "BACKENDS", "DTYPES", "Parser", "add_command", "add_exit_option", "add_generation_options", "add_model_options",
    "add_prompt_options", "add_sampling_options", "add_step_options", "add_threads_option", "fractions",
    "generation_config", "human_eval", "load", "positive", "positives", "prompts_of", "read_text",
]  # fmt: skip

BACKENDS = ("cpu", "reference", "triton")  # ops.BACKENDS, without loading torch
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Parser(argparse.ArgumentParser):
    """Reports bad options as every other mistake is reported: in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


# ---- what the options ask for ----


def generation_config(args: argparse.Namespace, **others: Any) -> GenerationConfig:
    """What the options of the same names say, but for ``others``."""
    given = {field.name: getattr(args, field.name) for field in fields(GenerationConfig) if hasattr(args, field.name)}
    for name in ("stop", "stop_token_ids"):
        if name in given:
            given[name] = tuple(given[name])
    return GenerationConfig(**{**given, **others})


def load(args: argparse.Namespace) -> Model:
    """The model that the options ask for, and the threads it runs on."""
    import torch

    from layerskip_kernels import load_model
    from layerskip_kernels.draft_vocab import read_draft_vocab
    from layerskip_kernels.machine import usable_cores

    torch.set_num_threads(args.threads or usable_cores())
    if not hasattr(args, "model"):
        return load_model()
    dtype = getattr(torch, DTYPES.get(args.dtype, args.dtype)) if args.dtype else None
    model = load_model(args.model, dtype, args.backend, args.weights)
    if args.draft_vocab is None:
        return model
    return model.with_draft_vocab(None if args.draft_vocab == "any" else read_draft_vocab(Path(args.draft_vocab)))


def prompts_of(args: argparse.Namespace, default_count: int) -> list[tuple[str, str]]:
    """The prompt or prompts given, or the first HumanEval problems, as (name, text)."""
    from layerskip_kernels.datasets import read_jsonl_prompts

    if args.prompt is not None:
        return [("the given prompt", args.prompt)]
    if args.prompt_file is not None:
        text = read_text(args.prompt_file)
        return read_jsonl_prompts(text) if args.prompt_file.endswith(".jsonl") else [(args.prompt_file, text)]
    return human_eval(default_count)


def read_text(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt file {path} is not UTF-8 text: {error}") from error


def human_eval(count: int) -> list[tuple[str, str]]:
    from layerskip_kernels.datasets import human_eval_prompts

    problems = human_eval_prompts()
    if count > len(problems):
        raise ValueError(f"--num-prompts must be in 1..{len(problems)}, got {count}")
    return problems[:count]


# ---- the options ----


def add_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def add_prompt_options(parser: argparse.ArgumentParser, default: str) -> None:
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help=f"default: {default}")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="a text that is one prompt, or .jsonl with many; -: stdin"
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="M", help="a directory, a .gguf file, a name or a hub id (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--dtype", choices=[*DTYPES, *DTYPES.values()], help="default: the checkpoint's own")
    parser.add_argument("--backend", choices=BACKENDS, default="cpu", help="default: cpu")
    parser.add_argument(
        "--weights", choices=["int8"], help="quantise the linear layers (default: as in the checkpoint)"
    )
    parser.add_argument("--draft-vocab", metavar="FILE", help="token ids that drafts may be (see draft-vocab), or any")


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    add_step_options(parser)
    default = GenerationConfig().max_new_tokens
    parser.add_argument("--max-new-tokens", type=int, default=default, metavar="N", help=f"default: {default}")


def add_exit_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--exit-layer", type=int, metavar="E", help="layers that draft (default: the model's, or a third)"
    )


def add_step_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-speculations", type=int, metavar="K",
        help=f"tokens drafted before each verification (default: the model's, or {NUM_SPECULATIONS})",
    )  # fmt: skip
    add_threads_option(parser)


def add_threads_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive, metavar="N", help="default: the physical cores usable here")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """What GenerationConfig says of the same names."""
    default = GenerationConfig()
    for name, kind, text in (
        ("temperature", float, "0: greedy"),
        ("top_k", int, "keep so many tokens; 0: all"),
        ("top_p", float, "keep the fewest that hold this much probability"),
        ("min_p", float, "keep those with this part of the likeliest's probability"),
        ("repetition_penalty", float, "divides logits of tokens seen; 1: none"),
        ("presence_penalty", float, "taken from logits of tokens generated"),
        ("frequency_penalty", float, "the same, for each time"),
        ("min_new_tokens", int, "no end of text before"),
    ):
        value = getattr(default, name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=value, metavar="X", help=f"{text} (default: {value:g})")
    parser.add_argument("--seed", type=int, metavar="N", help="of the noise (default: 0 for verify, else a new one)")
    parser.add_argument("--logit-bias", type=_bias, action=_Bias, default={}, metavar="ID=X", help="may be repeated")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be repeated")
    parser.add_argument(
        "--stop-token-id", dest="stop_token_ids", type=int, action="append", default=[], metavar="ID",
        help="ends the text and belongs to it; may be repeated",
    )  # fmt: skip


class _Bias(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), **value})


def _bias(text: str) -> dict[int, float]:
    token_id, _, number = text.partition("=")
    try:
        return {int(token_id): float(number)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a token id and a number, such as 17=-2.5, got {text!r}") from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def positives(text: str) -> list[int]:
    return [positive(part.strip()) for part in text.split(",")]


def fractions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers in 0..1, with commas between, got {text!r}") from None
