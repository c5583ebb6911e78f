"""What the commands of ``layerskip`` share: their options, and the model, prompts and config that these ask for."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NoReturn

from layerskip_kernels.cli.interrupts import raise_on_interrupt
from layerskip_kernels.config import AUTO, BACKENDS, NUM_SPECULATIONS, GenerationConfig
from layerskip_kernels.model.files import naming

if TYPE_CHECKING:
    from layerskip_kernels.evaluation.prompts import Examples
    from layerskip_kernels.model.model import Model

__all__ = [
    "BACKENDS", "BLOCK_WEIGHTS", "DTYPES", "TEXT_BYTES", "Parser", "add_command", "add_exit_option",
    "add_generation_options", "add_json_options", "add_model_options", "add_prompt_options", "add_sampling_options",
    "add_step_options", "add_threads_option", "counted", "fractions", "generation_config", "identity", "load",
    "named_prompts", "output_path", "positive", "positives", "prompts_of", "read_text", "report",
]  # fmt: skip

# quantise.WEIGHT_TYPES, which take torch to import.
BLOCK_WEIGHTS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k")
WEIGHTS = ("16bit", "int8", "int15", *BLOCK_WEIGHTS)
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
PROMPT_BYTES, TEXT_BYTES = 64 << 20, 1 << 30  # of a file of prompts, and of one of texts, at most
MAX_THREADS = max(64, 4 * (os.cpu_count() or 1))


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
    """The model that the options ask for; torch gets the threads that they ask for."""
    import torch

    from layerskip_kernels import load_model
    from layerskip_kernels.machine import usable_cores
    from layerskip_kernels.model.draft_vocab import read_draft_vocab

    raise_on_interrupt()
    torch.set_num_threads(args.threads or usable_cores())
    if not hasattr(args, "model"):
        return load_model()
    dtype = getattr(torch, DTYPES.get(args.dtype, args.dtype)) if args.dtype else None
    model = load_model(args.model, dtype, args.backend, args.weights, args.exit_adapter, args.device)
    if args.draft_vocab is None:
        return model
    return model.with_draft_vocab(None if args.draft_vocab == "any" else read_draft_vocab(Path(args.draft_vocab)))


def identity(model: Model) -> dict[str, str]:
    """What a JSON report says of the model it is about."""
    return {"model": model.name, "backend": model.backend, "dtype": str(model.dtype).removeprefix("torch.")}


def prompts_of(args: argparse.Namespace, default_count: int) -> list[tuple[str, str]]:
    """The prompts given, or the first of the model's example prompts, as (name, text)."""
    return named_prompts(args, default_count).prompts


def named_prompts(args: argparse.Namespace, default_count: int) -> Examples:
    """The same, with where they come from."""
    from layerskip_kernels.evaluation.prompts import Examples, example_prompts, read_jsonl_prompts

    given = [*args.prompts, *args.prompt]
    if given and args.prompt_file is not None:
        raise ValueError("--prompt-file is not allowed with a prompt; give one or the other")
    if given:
        return Examples("given prompts", [(f"prompt {number}", text) for number, text in enumerate(given, 1)])
    if args.prompt_file is None:
        return example_prompts(getattr(args, "model", None), default_count)
    text, name = read_text(args.prompt_file, PROMPT_BYTES), "stdin" if args.prompt_file == "-" else args.prompt_file
    if not text:
        raise ValueError(f"{name} is empty; it must hold a prompt")
    if args.prompt_file.endswith(".jsonl"):
        return Examples(name, read_jsonl_prompts(text, name))
    # An editor, or `echo`, ends a file with a line break that is no part of the prompt.
    return Examples(name, [(name, text.removesuffix("\n"))])


def read_text(path: str, max_bytes: int = TEXT_BYTES) -> str:
    """The text of a file, or of stdin for "-", without a byte order mark.

    Raises ValueError naming the file when it has more than ``max_bytes`` or is not UTF-8, and OSError naming it when
    it cannot be read. A device or a pipe is read no further than that either.
    """
    name = "stdin" if path == "-" else path
    with _opened(path) as file:
        mode = os.fstat(file.fileno())
        too_long = stat.S_ISREG(mode.st_mode) and mode.st_size > max_bytes
        contents = b"" if too_long else file.read(max_bytes + 1)
    if too_long or len(contents) > max_bytes:
        raise ValueError(f"{name} has more than {max_bytes >> 20} MiB, which is too long for this use")
    try:
        return contents.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start} is not valid") from error


def _opened(path: str) -> BinaryIO:
    return open(os.dup(sys.stdin.fileno()) if path == "-" else path, "rb")


def report(args: argparse.Namespace, found: dict[str, Any], text: str) -> None:
    """Print a command's result as `add_json_options` describes, and write it to ``--output``."""
    if not args.json:
        print(text)
    line = json.dumps(found)
    if args.json or args.json_always:
        print(line)
    if args.output is not None:
        with naming(args.output):
            Path(args.output).write_text(line + "\n", encoding="utf-8")


def counted(count: int, noun: str) -> str:
    """ "1 prompt", "2 prompts"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# ---- the options ----


def add_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def add_json_options(parser: argparse.ArgumentParser, always: bool = False) -> None:
    """``--json``: the one JSON object on stdout. ``always``: it is the last line of stdout without ``--json`` as well,
    after the text for people."""
    text = "print only the JSON object, which is the last line of stdout" if always else "print one JSON object instead"
    parser.add_argument("--json", action="store_true", help=text)
    parser.add_argument("--output", type=output_path, metavar="FILE", help="write the JSON object there as well")
    parser.set_defaults(json_always=always)


def add_prompt_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help=f"a text to continue (default: {default})")
    parser.add_argument("-p", "--prompt", action="append", default=[], metavar="TEXT", help="the same, as an option")
    parser.add_argument(
        "--prompt-file", metavar="FILE",
        help="a text that is one prompt (without a line break at its end), or .jsonl with many; -: stdin",
    )  # fmt: skip


def add_model_options(parser: argparse.ArgumentParser, adapted: bool = True) -> None:
    """Those that `load` reads; ``adapted``: with those of how a model drafts, too."""
    parser.add_argument(
        "-m", "--model", metavar="M",
        help="a directory, a .gguf file, a name or a hub id (default: SmolLM2-135M-Instruct)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=[*DTYPES, *DTYPES.values()], help="default: the checkpoint's own")
    parser.add_argument("--backend", choices=BACKENDS, default="cpu", help="default: cpu")
    parser.add_argument("--device", help="GPU of the backend triton, such as cuda:1 (default: torch's current one)")
    parser.add_argument(
        "--weights", choices=WEIGHTS, metavar="TYPE",
        help=f"quantise the linear layers, or read a quantised file as numbers (16bit): {', '.join(WEIGHTS)} (default: "
        "as in the checkpoint)",
    )  # fmt: skip
    if not adapted:
        parser.set_defaults(draft_vocab=None, exit_adapter=None)
        return
    parser.add_argument(
        "--draft-vocab", metavar="FILE", help="token ids that drafts are chosen from (see draft-vocab), or any"
    )
    parser.add_argument(
        "--exit-adapter",
        action="append",
        metavar="PATH",
        help="an exit_adapter.safetensors for this model, its folder, or the name of a shipped one: drafts pass it; "
        "may be repeated, for several exits",
    )


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    add_step_options(parser)
    default = GenerationConfig().max_new_tokens
    parser.add_argument("--max-new-tokens", type=int, default=default, metavar="N", help=f"default: {default}")


def add_exit_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--exit-layer", type=whole_or_auto, metavar="E",
        help='layers that draft, or "auto": chosen on the way (default: the model\'s, or a third where K is given)',
    )  # fmt: skip


def add_step_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-speculations", type=whole_or_auto, metavar="K",
        help='tokens drafted before each verification, or "auto": as many as pay (default: the model\'s, or '
        f"{NUM_SPECULATIONS} where E is given, or auto)",
    )  # fmt: skip
    add_threads_option(parser)


def whole_or_auto(text: str) -> int | Literal["auto"]:
    if text == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be a whole number or "auto", got {text!r:.60}') from None


def add_threads_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=threads, metavar="N", help="default: the physical cores usable here")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """What GenerationConfig says of the same names."""
    default = GenerationConfig()
    for name, kind, text in (
        ("temperature", float, "0: greedy"),
        ("top_k", int, "keep this many tokens; 0: all"),
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
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number in 1..999999999, got {text!r:.60}")
    return int(text)


def threads(text: str) -> int:
    if (number := positive(text)) > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_THREADS} on this machine, got {text}")
    return number


def positives(text: str) -> list[int]:
    return [positive(part.strip()) for part in text.split(",")]


def output_path(text: str) -> str:
    """A file to be written: refused before any work where its folder does not exist."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory; name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {str(path.parent)!r} does not exist; make it first")
    return text


def fractions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers in 0..1, with commas between, got {text!r:.60}") from None
