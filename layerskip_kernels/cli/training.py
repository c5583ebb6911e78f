"""The commands of ``layerskip`` that train."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

from layerskip_kernels.cli.interrupts import raise_on_interrupt
from layerskip_kernels.cli.options import (
    BLOCK_WEIGHTS,
    add_command,
    add_exit_option,
    add_generation_options,
    add_json_options,
    add_model_options,
    add_threads_option,
    generation_config,
    load,
    positive,
    positives,
    report,
)
from layerskip_kernels.config import GenerationConfig, Strategy

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the commands to the subparsers of `cli`."""
    train = add_command(commands, "train", _train, "train a model for early exit, or go on with a training")
    train.add_argument("config", metavar="CONFIG.yaml", help="what to train on what (see docs/training.md)")
    train.add_argument("--export", metavar="DIR", help="train nothing: write the newest checkpoint's model to DIR")
    add_threads_option(train)
    adapt = add_command(
        commands, "adapt", _adapt, "train an exit adapter, with which a model drafts for itself unchanged"
    )
    adapt.add_argument("folder", metavar="FOLDER", help="where the adapter goes; a training that it holds goes on")
    add_model_options(adapt, adapted=False)
    adapt.add_argument("--prompts", metavar="FILE.jsonl", help="what the model continues, beside prompts of its own")
    adapt.add_argument(
        "--text", action="append", default=[], metavar="FILE", help="texts to train on as well: .jsonl, or one text"
    )
    adapt.add_argument(
        "--max-new-tokens", type=positive, default=160, metavar="N", help="of each text that the model writes (160)"
    )
    adapt.add_argument("--tokens", type=positive, default=300_000, metavar="N", help="that the model writes (300000)")
    adapt.add_argument(
        "--exits",
        type=positives,
        metavar="E,...",
        help="exits to choose from (default: a 15th, an 8th, a 4th of the layers)",
    )
    adapt.add_argument(
        "--adapter-layers",
        type=adapter_kinds,
        default=[1],
        metavar="A,...",
        help="of which it may have: 1, 2 or mlp, one without attention (1)",
    )
    adapt.add_argument("--passes", type=positive, default=4, metavar="N", help="over the texts, at most (4)")
    adapt.add_argument("--pilot-steps", type=positive, default=60, metavar="N", help="of each candidate's trial (60)")
    adapt.add_argument(
        "--adapter-weights",
        choices=BLOCK_WEIGHTS,
        metavar="TYPE",
        help=f"what the adapter is written as: {', '.join(BLOCK_WEIGHTS)} (default: the model's dtype)",
    )
    adapt.add_argument(
        "--start-from", metavar="PATH", help="an adapter of this model to go on from, or a shipped one's name"
    )
    adapt.add_argument("--seed", type=int, default=0, metavar="S", help="of the prompts that the model draws (0)")
    add_threads_option(adapt)
    parse = add_command(commands, "parse-data", _parse_data, "write the data of the semantic-parsing task")
    parse.add_argument("folder", metavar="FOLDER", help="where train.jsonl, validation.jsonl and test.jsonl go")
    for split, size in (("train", 64_000), ("validation", 1_000), ("test", 2_000)):
        parse.add_argument(f"--{split}", type=positive, default=size, metavar="N", help=f"utterances ({size})")
    parse.add_argument("--seed", type=int, default=0, metavar="S", help="of the drawings (0)")

    score = add_command(commands, "parse-eval", _parse_eval, "count a model's exact parses, and its accepted drafts")
    score.add_argument("data", metavar="TEST.jsonl", help="what parse-data wrote")
    score.add_argument("--limit", type=positive, metavar="N", help="only the first N utterances")
    score.add_argument("--strategy", choices=get_args(Strategy), default=GenerationConfig().strategy)
    add_exit_option(score)
    add_model_options(score)
    add_generation_options(score)
    add_json_options(score)


def adapter_kinds(text: str) -> list[int | Literal["mlp"]]:
    kinds: dict[str, int | Literal["mlp"]] = {"1": 1, "2": 2, "mlp": "mlp"}
    parts = [part.strip() for part in text.split(",")]
    if unknown := [part for part in parts if part not in kinds]:
        raise argparse.ArgumentTypeError(f"must be 1, 2 or mlp, with commas between, got {unknown[0]!r:.60}")
    return [kinds[part] for part in parts]


def _parse_data(args: argparse.Namespace) -> int:
    from layerskip_kernels.recipes.parse_task import SPLITS, write_parse_data

    write_parse_data(Path(args.folder), {split: getattr(args, split) for split in SPLITS}, args.seed)
    print(f"written to {args.folder}")
    return 0


def _parse_eval(args: argparse.Namespace) -> int:
    from layerskip_kernels.recipes.parse_eval import evaluate_parses, read_examples

    examples = read_examples(Path(args.data), args.limit)
    scores = evaluate_parses(load(args), examples, generation_config(args))
    report(args, asdict(scores), str(scores))
    return 0


def _adapt(args: argparse.Namespace) -> int:
    import torch

    from layerskip_kernels.cli.options import read_text
    from layerskip_kernels.evaluation.prompts import read_jsonl_prompts
    from layerskip_kernels.machine import keep_freed_memory
    from layerskip_kernels.model.draft_vocab import texts_written
    from layerskip_kernels.model.sources import locate_exit_adapter
    from layerskip_kernels.training.adapt import adapt
    from layerskip_kernels.training.adapter_training import AdaptSettings

    keep_freed_memory()
    model = load(args)
    prompts = [] if args.prompts is None else read_jsonl_prompts(read_text(args.prompts), args.prompts)
    given = [text for path in args.text for text in texts_written(path, read_text(path))]
    settings = AdaptSettings(
        num_tokens=args.tokens,
        max_new_tokens=args.max_new_tokens,
        exits=tuple(args.exits or ()),
        adapter_layers=tuple(args.adapter_layers),
        passes=args.passes,
        pilot_steps=args.pilot_steps,
        seed=args.seed,
    )
    torch.manual_seed(settings.seed)
    start_from = None if args.start_from is None else locate_exit_adapter(args.start_from)
    found = adapt(
        model, args.model, Path(args.folder), settings, [text for _, text in prompts], given, start_from,
        args.adapter_weights,
    )  # fmt: skip
    print(
        f"exit {found['exit_layer']}, {found['acceptance']:.1%} of held-out drafts right; try: layerskip sweep "
        f"{'' if args.model is None else f'--model {args.model} '}--exit-adapter {args.folder}"
    )
    return 0


def _train(args: argparse.Namespace) -> int:
    packages = {"yaml": "pyyaml", **{name: name for name in ("transformers", "accelerate", "datasets", "peft")}}
    missing = [package for name, package in packages.items() if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"training needs more packages; run: pip install {' '.join(missing)}")
    import torch

    from layerskip_kernels.machine import keep_freed_memory, usable_cores
    from layerskip_kernels.training.config import read_config
    from layerskip_kernels.training.run import export_checkpoint, train

    raise_on_interrupt()
    keep_freed_memory()
    torch.set_num_threads(args.threads or usable_cores())
    config = read_config(Path(args.config))
    if args.export:
        checkpoint = export_checkpoint(config, Path(args.export))
        print(f"{checkpoint} written to {args.export}")
        return 0
    folder = train(config)
    if folder is None:
        print(f"saved; go on with: layerskip train {args.config}")
        return 143
    print(f"trained; try: layerskip generate --model {folder} --prompt ...")
    return 0
