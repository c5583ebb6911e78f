"""The ``layerskip`` command: generate, verify, demo, bench, roofline, draft-vocab, doctor.

The others are in cli_evaluation.py (sweep, lens, quality) and cli_training.py (train).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from layerskip_kernels.cli_options import (
    DTYPES,
    Parser,
    add_command,
    add_exit_option,
    add_generation_options,
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    add_step_options,
    fractions,
    generation_config,
    human_eval,
    load,
    positive,
    positives,
    prompts_of,
    read_text,
)
from layerskip_kernels.config import Acceptance, GenerationConfig, Strategy

if TYPE_CHECKING:
    from layerskip_kernels.generate import Generation
    from layerskip_kernels.model import Model

__all__ = ["main"]

PROMPTS_AT_ONCE = 8  # that go to a file: a pass over the weights serves them all
INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 2 for what can't be done, 130 when interrupted."""
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    except BrokenPipeError:
        # Whoever read the output has left, `head` for instance; nor can Python flush stdout on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"layerskip: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("layerskip: interrupted", file=sys.stderr)
        return INTERRUPTED


# ---- the commands ----


def _generate(args: argparse.Namespace) -> int:
    """Each prompt in turn, or for a file several at once; ends with what there is when interrupted."""
    config = generation_config(args)
    if args.show_drafts and (args.output or config.num_samples > 1):
        raise ValueError("--show-drafts colours one text as it streams: leave out --output and --num-samples")
    prompts = prompts_of(args, default_count=1)
    model = load(args)
    outputs: list[dict[str, Any]] = []
    with _results(args.output) as write_result, _Interrupt() as interrupt:
        for group in _groups(prompts, PROMPTS_AT_ONCE if args.output else 1, shown=bool(args.output)):
            generations = _generate_shown(model, group, config, args, len(prompts) > 1, interrupt)
            names = [name for name, _ in group for _ in range(config.num_samples)]
            for name, generation in zip(names, generations, strict=True):
                outputs.append({"prompt": name, **_described(generation)})
                write_result(outputs[-1])
            if interrupt.asked:
                break
    if args.json:
        print(json.dumps({**_identity(model), "strategy": args.strategy, "outputs": outputs}))
    if interrupt.asked:
        print(f"layerskip: interrupted; {len(outputs)} text{'s' * (len(outputs) != 1)} so far", file=sys.stderr)
    return INTERRUPTED if interrupt.asked else 0


def _generate_shown(
    model: Model,
    group: list[tuple[str, str]],
    config: GenerationConfig,
    args: argparse.Namespace,
    is_one_of_many: bool,
    interrupt: _Interrupt,
) -> list[Generation]:
    """Generate from named prompts. Unless it goes to a file, there is one; its text streams to stdout, and several
    samples follow when done."""
    from layerskip_kernels import generate
    from layerskip_kernels.screen import Screen

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
        assert model.tokenizer is not None  # or generate refuses the prompt
        screen = Screen(model.tokenizer, _write, config.stop, config.min_new_tokens, args.show_drafts)
        generations = generate(model, [prompt], config, on_tokens=screen.on_tokens, on_draft=screen.on_draft, **hooks)
        screen.finish()
        print(flush=True)
    for generation in generations:
        print(_statistics(generation), file=sys.stderr)
    return generations


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
    """What writes a result as a line of JSON to a file, at once, so that a run cut short leaves what it has."""
    if path is None:
        yield lambda _: None
        return
    with open(path, "w", encoding="utf-8") as file:

        def write(result: dict[str, Any]) -> None:
            file.write(json.dumps(result) + "\n")
            file.flush()

        yield write


class _Interrupt:
    """While it is entered, the first Ctrl-C only sets ``asked``; the second one interrupts as ever."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Interrupt:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


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


def _identity(model: Model) -> dict[str, str]:
    dtype = str(model.dtype).removeprefix("torch.")
    return {"model": model.name, "backend": model.backend, "dtype": dtype}


def _verify(args: argparse.Namespace) -> int:
    from layerskip_kernels.verify import summary, verify

    config = generation_config(args, exit_layer=None)
    if config.seed is None:
        config = replace(config, seed=0)  # both ways of decoding need the same
    prompts = prompts_of(args, default_count=args.num_prompts)
    model = load(args)
    exit_layer, num_drafts = model.draft_settings(config)
    exit_layers = args.exit_layer or [exit_layer]
    reports = verify(model, prompts, config, exit_layers, args.batch)
    sampled = f", temperature {config.temperature:g} with seed {config.seed}" if config.temperature else ""
    company = f" in mixed batches of {args.batch}" if args.batch else ""
    print(f"{model.name}: plain against self-speculative decoding{company}, {num_drafts} drafts at a time{sampled}")
    for report in reports:
        print(report)
    settings = {"num_speculations": num_drafts, "temperature": config.temperature, "seed": config.seed}
    print(json.dumps({**summary(reports), **settings, "batch": args.batch, **_identity(model)}))
    return 0 if all(report.all_equal for report in reports) else 1


def _demo(args: argparse.Namespace) -> int:
    from layerskip_kernels.demo import demo, shipped_prompts
    from layerskip_kernels.loading import shipped_checkpoints

    config, equal = generation_config(args), True
    human_eval(args.num_prompts)  # says what is wrong with the number
    for name in [args.model] if args.model else shipped_checkpoints():
        args.model = name
        equal &= demo(load(args), shipped_prompts(name, args.num_prompts), config)
    return 0 if equal else 1


def _bench(args: argparse.Namespace) -> int:
    from layerskip_kernels.bench import BitsDiffer, as_text, bench

    config = GenerationConfig(exit_layer=args.exit_layer, num_speculations=args.num_speculations)
    model = load(args)
    try:
        report = bench(model, *model.draft_settings(config))
    except BitsDiffer as error:
        print(f"layerskip: {error}", file=sys.stderr)
        return 1
    print(as_text(report))
    if args.json is None:
        print(json.dumps(report))
    else:
        Path(args.json).write_text(json.dumps(report) + "\n", encoding="utf-8")
    return 0


def _roofline(args: argparse.Namespace) -> int:
    import torch

    from layerskip_kernels.roofline import as_text, plot, roofline

    dtype = getattr(torch, DTYPES.get(args.dtype, args.dtype))
    report = roofline(
        args.shape, args.gpu, args.exit_layer, args.num_speculations, args.acceptance, args.context, dtype
    )
    if args.plot is not None:
        plot(report, Path(args.plot))
    print(json.dumps(report) if args.json else as_text(report))
    return 0


def _draft_vocab(args: argparse.Namespace) -> int:
    from layerskip_kernels.datasets import human_eval_prompts
    from layerskip_kernels.draft_vocab import most_frequent_tokens, texts_written, write_draft_vocab
    from layerskip_kernels.loading import read_checkpoint

    checkpoint = read_checkpoint(args.model)
    if checkpoint.tokenizer is None:
        raise ValueError("this model came without a tokenizer, so there is nothing to count tokens with")
    texts = [text for path in args.corpus for text in texts_written(path, read_text(path))]
    texts = texts or [text for _, text in human_eval_prompts()]
    ids = most_frequent_tokens(checkpoint.tokenizer, texts, args.size, checkpoint.config.eos_token_ids)
    write_draft_vocab(Path(args.output), ids)
    print(f"{args.size} token ids written to {args.output}; use them with --draft-vocab {args.output}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from layerskip_kernels.doctor import as_text, diagnose

    report = diagnose()
    print(json.dumps(report) if args.json else as_text(report))
    return 0


# ---- the parser ----


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="layerskip", description="Early-exit self-speculative decoding, the same bits as plain.")
    commands = parser.add_subparsers(metavar="command", required=True)

    generate = add_command(commands, "generate", _generate, "continue a prompt; the text streams to stdout")
    generate.add_argument("--strategy", choices=get_args(Strategy), default=GenerationConfig().strategy)
    add_exit_option(generate)
    generate.add_argument("--json", action="store_true", help="add one JSON object as the last line of stdout")
    generate.add_argument("--output", metavar="FILE", help="write a line of JSON for each text there, not to stdout")
    generate.add_argument("--show-drafts", action="store_true", help="accepted tokens green, corrected ones red")
    add_prompt_options(generate, "the first HumanEval problem")
    add_model_options(generate)
    add_sampling_options(generate)
    generate.add_argument(
        "--acceptance",
        choices=get_args(Acceptance),
        default="exact",
        help="exact: the text of plain sampling; rejection: its distribution (default: exact)",
    )
    generate.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)")
    generate.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="with --json or --output: log-probabilities, also of the N likeliest tokens",
    )

    verify = add_command(commands, "verify", _verify, "compare tokens, logits and KV bytes with plain decoding")
    verify.add_argument("--num-prompts", type=positive, default=20, metavar="N", help="of HumanEval (default: 20)")
    verify.add_argument(
        "--exit-layer", type=positives, metavar="E[,E...]", help="one or several (default: the model's)"
    )
    verify.add_argument(
        "--batch", type=positive, metavar="N", help="compare mixed batches of N prompts with each of them alone"
    )
    add_prompt_options(verify, "HumanEval problems")
    add_model_options(verify)
    add_sampling_options(verify)

    demo = add_command(
        commands, "demo", _demo, "both ways of decoding side by side: the shipped checkpoints, or --model"
    )
    demo.add_argument("--num-prompts", type=positive, default=5, metavar="N", help="for each (default: 5)")
    add_model_options(demo)
    add_exit_option(demo)

    bench = add_command(commands, "bench", _bench, "time drafting and verification against plain decoding")
    add_exit_option(bench)
    bench.add_argument("--json", metavar="PATH", help="where the JSON goes (default: the last line of stdout)")
    add_model_options(bench)
    add_step_options(bench)

    roofline = add_command(commands, "roofline", _roofline, "what a GPU's data sheet allows: floors, not measurements")
    roofline.add_argument(
        "--shape", required=True, metavar="S", help="a model's: llama3.2-1b, llama2-7b, llama3-8b, ..."
    )
    roofline.add_argument("--gpu", required=True, metavar="G", help="a100, h100, h200, b200, ...")
    roofline.add_argument(
        "--exit-layer", type=positives, metavar="E[,E...]", help="default: 1/8, 1/4, 1/3 and 1/2 of the layers"
    )
    roofline.add_argument(
        "--num-speculations", type=positives, default=[2, 4, 6, 8, 12], metavar="K[,K...]", help="default: 2,4,6,8,12"
    )
    roofline.add_argument(
        "--acceptance", type=fractions, default=[0.4, 0.6, 0.8], metavar="A[,A...]",
        help="accepted over drafted tokens (default: 0.4,0.6,0.8)",
    )  # fmt: skip
    roofline.add_argument("--context", type=int, default=512, metavar="N", help="tokens before (default: 512)")
    roofline.add_argument("--dtype", choices=[*DTYPES, *DTYPES.values()], default="bf16", help="default: bf16")
    roofline.add_argument("--json", action="store_true", help="print one JSON object instead")
    roofline.add_argument("--plot", metavar="FILE", help="draw it as well, to a .png, .svg or .pdf (needs matplotlib)")

    vocab = add_command(commands, "draft-vocab", _draft_vocab, "count the most frequent tokens of some texts")
    vocab.add_argument("corpus", nargs="*", metavar="FILE", help="texts; of .jsonl, completions (default: HumanEval)")
    vocab.add_argument("--size", type=positive, default=8192, metavar="N", help="how many tokens (default: 8192)")
    vocab.add_argument("--output", required=True, metavar="FILE", help="where the list goes, as JSON")
    vocab.add_argument("--model", metavar="M", help="whose tokenizer counts (default: SmolLM2-135M-Instruct)")

    for command in (generate, verify, demo):
        add_generation_options(command)

    from layerskip_kernels import cli_evaluation, cli_training

    cli_evaluation.add_commands(commands)
    cli_training.add_commands(commands)

    doctor = add_command(commands, "doctor", _doctor, "what a bug report needs: versions, machine, backends")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


if __name__ == "__main__":
    sys.exit(main())
