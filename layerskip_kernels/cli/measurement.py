"""The commands ``bench``, ``roofline`` and ``draft-vocab``: times, bounds from data sheets, token counts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from layerskip_kernels.cli.interrupts import raise_on_interrupt
from layerskip_kernels.cli.options import (
    BLOCK_WEIGHTS,
    DTYPES,
    TEXT_BYTES,
    add_command,
    add_exit_option,
    add_json_options,
    add_model_options,
    add_step_options,
    fractions,
    load,
    output_path,
    positive,
    positives,
    read_text,
    report,
)
from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.evaluation import exit_layers

__all__ = ["add_commands"]

FILE_TYPES = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_m", "q5_k_m", "q6_k")  # gguf_write's, which imports torch


def add_commands(commands: Any) -> None:
    """Add the commands to the subparsers of the command line."""
    bench = add_command(commands, "bench", _bench, "time drafting and verification against plain decoding")
    add_exit_option(bench)
    add_step_options(bench)
    add_model_options(bench)
    add_json_options(bench, always=True)
    _add_roofline(commands)
    _add_quantise(commands)
    vocab = add_command(commands, "draft-vocab", _draft_vocab, "count the most frequent tokens of some texts")
    vocab.add_argument(
        "corpus", nargs="*", metavar="FILE",
        help="texts; of .jsonl files the completions (default: the example prompts of the model)",
    )  # fmt: skip
    vocab.add_argument("--size", type=positive, default=8192, metavar="N", help="how many tokens (default: 8192)")
    vocab.add_argument("--output", type=output_path, required=True, metavar="FILE", help="where the list goes, as JSON")
    vocab.add_argument("-m", "--model", metavar="M", help="whose tokenizer counts (default: SmolLM2-135M-Instruct)")


def _add_roofline(commands: Any) -> None:
    roofline = add_command(
        commands, "roofline", _roofline, "lower bounds computed from a GPU's data sheet, not measurements"
    )
    roofline.add_argument(
        "--shape", required=True, metavar="S", help="a model's: llama3.2-1b, llama2-7b, llama3-8b, ..."
    )
    roofline.add_argument("--gpu", required=True, metavar="G", help="a100, h100, h200, b200, ...")
    roofline.add_argument("--exit-layer", type=positives, metavar="E[,E...]", help=exit_layers.HELP)
    roofline.add_argument(
        "--num-speculations", type=positives, default=[2, 4, 6, 8, 12], metavar="K[,K...]", help="default: 2,4,6,8,12"
    )
    roofline.add_argument(
        "--acceptance", type=fractions, default=[0.4, 0.6, 0.8], metavar="A[,A...]",
        help="accepted over drafted tokens (default: 0.4,0.6,0.8)",
    )  # fmt: skip
    roofline.add_argument("--context", type=int, default=512, metavar="N", help="tokens before (default: 512)")
    roofline.add_argument("--dtype", choices=[*DTYPES, *DTYPES.values()], default="bf16", help="default: bf16")
    roofline.add_argument("--weights", metavar="TYPE", help="quantised: int8, int15, q4_0, ..., q4_k, q6_k")
    roofline.add_argument(
        "--prompt", type=positives, default=[512, 2048], metavar="N[,N...]", help="tokens (default: 512,2048)"
    )
    roofline.add_argument(
        "--plot", type=output_path, metavar="FILE", help="draw it as well: .png, .svg or .pdf (needs matplotlib)"
    )
    add_json_options(roofline)


def _add_quantise(commands: Any) -> None:
    quantise = add_command(
        commands, "quantise", _quantise, "write a model as a quantised .gguf file, or an exit adapter in another type"
    )
    quantise.add_argument(
        "model", metavar="MODEL", help="a directory, a .gguf file, a name or a hub id; or an exit adapter's"
    )
    quantise.add_argument("file", metavar="OUT.gguf", help="where it goes; an exit adapter goes into a folder")
    quantise.add_argument(
        "--type", choices=(*FILE_TYPES, "q4_k", "q5_k"), metavar="TYPE",
        help=f"of a model, the mixture that llama.cpp makes by this name: {', '.join(FILE_TYPES)} (default: q4_k_m); "
        f"of an exit adapter: {', '.join(BLOCK_WEIGHTS)} (default: q8_0)",
    )  # fmt: skip


def _quantise(args: argparse.Namespace) -> int:
    from layerskip_kernels.model.exit_adapter import ADAPTER_FILE
    from layerskip_kernels.model.gguf_write import write_gguf
    from layerskip_kernels.model.loading import read_checkpoint
    from layerskip_kernels.model.sources import locate_exit_adapter

    adapter = locate_exit_adapter(args.model)
    if adapter.name == ADAPTER_FILE or (adapter / ADAPTER_FILE).exists():
        return _quantise_adapter(adapter, Path(args.file), args.type or "q8_0")
    path, kind = Path(args.file), args.type or "q4_k_m"
    if path.suffix.lower() != ".gguf":
        raise ValueError(f"the file must end in .gguf, got {path}")
    if kind not in FILE_TYPES:
        raise ValueError(f"--type must be one of {', '.join(FILE_TYPES)} for a model, got {kind}")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {str(path.parent)!r} does not exist; make it first")
    write_gguf(read_checkpoint(args.model, on_demand=True), path, kind)
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")
    return 0


def _quantise_adapter(adapter: Path, folder: Path, weights: str) -> int:
    """The adapter in another type, and the defaults that lie beside it."""
    from layerskip_kernels.model.defaults import copy_defaults
    from layerskip_kernels.model.exit_adapter import quantise_exit_adapter

    path = quantise_exit_adapter(adapter, folder, weights)
    copy_defaults(adapter if adapter.is_dir() else adapter.parent, folder)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from layerskip_kernels.evaluation.equality import BitsDiffer
    from layerskip_kernels.evaluation.step_bench import as_text, bench

    config = GenerationConfig(exit_layer=args.exit_layer, num_speculations=args.num_speculations)
    model = load(args)
    try:
        found = bench(model, *model.draft_settings(config))
    except BitsDiffer as error:
        print(f"layerskip: {error}", file=sys.stderr)
        return 1
    report(args, found, as_text(found))
    return 0


def _roofline(args: argparse.Namespace) -> int:
    import torch

    from layerskip_kernels.evaluation.roofline import as_text, plot, roofline

    dtype = getattr(torch, DTYPES.get(args.dtype, args.dtype))
    found = roofline(
        args.shape, args.gpu, args.exit_layer, args.num_speculations, args.acceptance, args.context, dtype,
        args.weights, args.prompt,
    )  # fmt: skip
    if args.plot is not None:
        plot(found, Path(args.plot))
    report(args, found, as_text(found))
    return 0


def _draft_vocab(args: argparse.Namespace) -> int:
    from layerskip_kernels.evaluation.prompts import example_prompts
    from layerskip_kernels.model.draft_vocab import most_frequent_tokens, texts_written, write_draft_vocab
    from layerskip_kernels.model.loading import read_checkpoint

    raise_on_interrupt()
    checkpoint = read_checkpoint(args.model)
    if checkpoint.tokenizer is None:
        raise ValueError("this model came without a tokenizer, so there is nothing to count tokens with")
    texts = [text for path in args.corpus for text in texts_written(path, read_text(path, TEXT_BYTES))]
    texts = texts or [text for _, text in example_prompts(args.model).prompts]
    ids = most_frequent_tokens(checkpoint.tokenizer, texts, args.size, checkpoint.config.eos_token_ids)
    write_draft_vocab(Path(args.output), ids)
    print(f"{args.size} token ids written to {args.output}; use them with --draft-vocab {args.output}")
    return 0
