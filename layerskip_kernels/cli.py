"""The ``layerskip`` command: generate, verify, demo, bench, draft-vocab, doctor; cli_training.py: train."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from layerskip_kernels.config import GenerationConfig, Strategy
from layerskip_kernels.errors import CacheFull

if TYPE_CHECKING:
    from layerskip_kernels.generate import Generation
    from layerskip_kernels.model import Model

__all__ = ["main"]

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
BACKENDS = ("cpu", "reference")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 2 for what the user got wrong, 130 when interrupted."""
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    except BrokenPipeError:
        # Whoever read the output has left, `head` for instance; nor can Python flush stdout on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, CacheFull, OSError) as error:
        print(f"layerskip: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("layerskip: interrupted", file=sys.stderr)
        return 130


# ---- the commands ----


def _generate(args: argparse.Namespace) -> int:
    from layerskip_kernels import generate
    from layerskip_kernels.tokenizer import TextStream

    config = _generation_config(args, strategy=args.strategy, exit_layer=args.exit_layer)
    [(_, prompt)] = _prompts(args, default_count=1)
    model = _load(args)
    stream = TextStream(model.tokenizer) if model.tokenizer else None

    def show(_: int, tokens: list[int]) -> None:
        print(stream.push(tokens) if stream else "", end="", flush=True)

    [generation] = generate(model, [prompt], config, on_tokens=show)
    print(stream.finish() if stream else "", flush=True)
    print(_statistics(generation), file=sys.stderr)
    if args.json:
        print(json.dumps(_described(model, args.strategy, generation)))
    return 0


def _statistics(generation: Generation) -> str:
    parts = [
        f"{generation.prompt_length} tokens of prompt in {generation.prefill_seconds:.2f} s",
        f"{len(generation.token_ids)} tokens generated ({generation.finish_reason})",
    ]
    if generation.tokens_per_second is not None:
        parts.append(f"{generation.tokens_per_second:.1f} tokens/s")
    if generation.drafted:
        parts.append(f"{generation.accepted} of {generation.drafted} drafts accepted")
        parts.append(f"{generation.tokens_per_cycle:.2f} tokens per verification")
    return "; ".join(parts)


def _described(model: Model, strategy: str, generation: Generation) -> dict[str, Any]:
    assert model.tokenizer is not None  # the prompt was a text
    output = {
        "token_ids": generation.token_ids,
        "text": model.tokenizer.decode(generation.token_ids),
        "finish_reason": generation.finish_reason,
        "tokens_per_second": generation.tokens_per_second,
        "acceptance_rate": generation.acceptance_rate,
        "tokens_per_cycle": generation.tokens_per_cycle,
    }
    return {**_identity(model), "strategy": strategy, "outputs": [output]}


def _identity(model: Model) -> dict[str, str]:
    dtype = str(model.dtype).removeprefix("torch.")
    return {"model": model.name, "backend": model.backend, "dtype": dtype}


def _verify(args: argparse.Namespace) -> int:
    from layerskip_kernels.verify import summary, verify

    config = _generation_config(args)
    prompts = _prompts(args, default_count=args.num_prompts)
    model = _load(args)
    exit_layers = args.exit_layer or [config.resolve_exit_layer(model.config.num_layers)]
    reports = verify(model, prompts, config, exit_layers)
    print(f"{model.name}: plain against self-speculative decoding, {config.num_speculations} drafts at a time")
    for report in reports:
        print(report)
    print(json.dumps({**summary(reports), "num_speculations": config.num_speculations, **_identity(model)}))
    return 0 if all(report.all_equal for report in reports) else 1


def _demo(args: argparse.Namespace) -> int:
    from layerskip_kernels.demo import demo

    config = _generation_config(args, exit_layer=args.exit_layer)
    prompts = _human_eval(args.num_prompts)
    return 0 if demo(_load(args), prompts, config) else 1


def _bench(args: argparse.Namespace) -> int:
    from layerskip_kernels.bench import BitsDiffer, as_text, bench

    config = GenerationConfig(exit_layer=args.exit_layer, num_speculations=args.num_speculations)
    model = _load(args)
    exit_layer = config.resolve_exit_layer(model.config.num_layers)
    try:
        report = bench(model, exit_layer, config.num_speculations)
    except BitsDiffer as error:
        print(f"layerskip: {error}", file=sys.stderr)
        return 1
    print(as_text(report))
    if args.json is None:
        print(json.dumps(report))
    else:
        Path(args.json).write_text(json.dumps(report) + "\n", encoding="utf-8")
    return 0


def _draft_vocab(args: argparse.Namespace) -> int:
    from layerskip_kernels.datasets import human_eval_prompts
    from layerskip_kernels.draft_vocab import most_frequent_tokens, write_draft_vocab
    from layerskip_kernels.loading import read_checkpoint

    tokenizer = read_checkpoint(args.model).tokenizer
    if tokenizer is None:
        raise ValueError("this model came without a tokenizer, so there is nothing to count tokens with")
    texts = [_read_prompt(path) for path in args.corpus] or [text for _, text in human_eval_prompts()]
    write_draft_vocab(Path(args.output), most_frequent_tokens(tokenizer, texts, args.size))
    print(f"{args.size} token ids written to {args.output}; use them with --draft-vocab {args.output}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from layerskip_kernels.doctor import as_text, diagnose

    report = diagnose()
    print(json.dumps(report) if args.json else as_text(report))
    return 0


# ---- what the commands share ----


def _generation_config(args: argparse.Namespace, **options: Any) -> GenerationConfig:
    return GenerationConfig(num_speculations=args.num_speculations, max_new_tokens=args.max_new_tokens, **options)


def _load(args: argparse.Namespace) -> Model:
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
    return model.with_draft_vocab(read_draft_vocab(Path(args.draft_vocab))) if args.draft_vocab else model


def _prompts(args: argparse.Namespace, default_count: int) -> list[tuple[str, str]]:
    """The prompt given, or the first HumanEval problems, as (name, text)."""
    if args.prompt is not None:
        return [("the given prompt", args.prompt)]
    if args.prompt_file is not None:
        return [(args.prompt_file, _read_prompt(args.prompt_file))]
    return _human_eval(default_count)


def _read_prompt(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt file {path} is not UTF-8 text: {error}") from error


def _human_eval(count: int) -> list[tuple[str, str]]:
    from layerskip_kernels.datasets import human_eval_prompts

    problems = human_eval_prompts()
    if count > len(problems):
        raise ValueError(f"--num-prompts must be in 1..{len(problems)}, got {count}")
    return problems[:count]


# ---- the options ----


class _Parser(argparse.ArgumentParser):
    """Reports bad options as every other mistake is reported: in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="layerskip", description="Early-exit self-speculative decoding, the same bits as plain.")
    commands = parser.add_subparsers(metavar="command", required=True)

    generate = _command(commands, "generate", _generate, "continue a prompt; the text streams to stdout")
    generate.add_argument("--strategy", choices=get_args(Strategy), default=GenerationConfig().strategy)
    generate.add_argument("--exit-layer", type=int, metavar="E", help="layers that draft (default: a third)")
    generate.add_argument("--json", action="store_true", help="add one JSON object as the last line of stdout")
    _add_prompt_options(generate, "the first HumanEval problem")
    _add_model_options(generate)

    verify = _command(commands, "verify", _verify, "compare tokens, logits and KV bytes with plain decoding")
    verify.add_argument("--num-prompts", type=_positive, default=20, metavar="N", help="of HumanEval (default: 20)")
    verify.add_argument(
        "--exit-layer", type=_exit_layers, metavar="E[,E...]", help="one or several (default: a third of the layers)"
    )
    _add_prompt_options(verify, "HumanEval problems")
    _add_model_options(verify)

    demo = _command(commands, "demo", _demo, "both ways of decoding side by side, on HumanEval prompts")
    demo.add_argument("--num-prompts", type=_positive, default=5, metavar="N", help="of HumanEval (default: 5)")
    demo.add_argument("--exit-layer", type=int, metavar="E", help="layers that draft (default: a third)")

    bench = _command(commands, "bench", _bench, "time drafting and verification against plain decoding")
    bench.add_argument("--exit-layer", type=int, metavar="E", help="layers that draft (default: a third)")
    bench.add_argument("--json", metavar="PATH", help="where the JSON goes (default: the last line of stdout)")
    _add_model_options(bench)
    _add_step_options(bench)

    vocab = _command(commands, "draft-vocab", _draft_vocab, "count the most frequent tokens of some texts")
    vocab.add_argument("corpus", nargs="*", metavar="FILE", help="text files (default: the HumanEval problems)")
    vocab.add_argument("--size", type=_positive, default=8192, metavar="N", help="how many tokens (default: 8192)")
    vocab.add_argument("--output", required=True, metavar="FILE", help="where the list goes, as JSON")
    vocab.add_argument("--model", metavar="M", help="whose tokenizer counts (default: SmolLM2-135M-Instruct)")

    for command in (generate, verify, demo):
        _add_generation_options(command)

    from layerskip_kernels import cli_training

    cli_training.add_commands(commands)

    doctor = _command(commands, "doctor", _doctor, "what a bug report needs: versions, machine, backends")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _add_prompt_options(parser: argparse.ArgumentParser, default: str) -> None:
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help=f"default: {default}")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a text file that is one prompt; -: stdin")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="M", help="a directory, a .gguf file, a name or a hub id (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--dtype", choices=[*DTYPES, *DTYPES.values()], help="default: the checkpoint's own")
    parser.add_argument("--backend", choices=BACKENDS, default="cpu", help="default: cpu")
    parser.add_argument(
        "--weights", choices=["int8"], help="quantise the linear layers (default: as in the checkpoint)"
    )
    parser.add_argument("--draft-vocab", metavar="FILE", help="token ids that drafts may be (see draft-vocab)")


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    _add_step_options(parser)
    default = GenerationConfig().max_new_tokens
    parser.add_argument("--max-new-tokens", type=int, default=default, metavar="N", help=f"default: {default}")


def _add_step_options(parser: argparse.ArgumentParser) -> None:
    default = GenerationConfig().num_speculations
    parser.add_argument(
        "--num-speculations", type=int, default=default, metavar="K",
        help=f"tokens drafted before each verification (default: {default})",
    )  # fmt: skip
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: the physical cores usable here")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _exit_layers(text: str) -> list[int]:
    return [_positive(part.strip()) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
