"""The commands that compare both ways of decoding: ``layerskip verify`` and ``layerskip demo``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from layerskip_kernels.cli.options import (
    add_command,
    add_exit_option,
    add_generation_options,
    add_json_options,
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    generation_config,
    identity,
    load,
    positive,
    positives,
    prompts_of,
    report,
)

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add ``verify`` and ``demo`` to the subparsers of the command line."""
    verify = add_command(commands, "verify", _verify, "compare tokens, logits and KV bytes with plain decoding")
    add_prompt_options(verify, "the model's example prompts")
    verify.add_argument(
        "--num-prompts", type=positive, default=20, metavar="N", help="example prompts, at most (default: 20)"
    )
    verify.add_argument(
        "--exit-layer", type=positives, metavar="E[,E...]", help="one or several (default: the model's)"
    )
    verify.add_argument(
        "--batch", type=positive, metavar="N", help="compare mixed batches of N prompts with each of them alone"
    )
    add_generation_options(verify)
    add_model_options(verify)
    add_sampling_options(verify)
    add_json_options(verify, always=True)

    demo = add_command(
        commands,
        "demo",
        _demo,
        "both ways of decoding side by side: the default model with its exit adapter and the shipped checkpoints, or "
        "--model",
    )
    demo.add_argument(
        "--num-prompts", type=positive, default=5, metavar="N", help="for each model, at most (default: 5)"
    )
    add_exit_option(demo)
    add_generation_options(demo)
    add_model_options(demo)


def _verify(args: argparse.Namespace) -> int:
    from layerskip_kernels.evaluation.equality import summary, verify

    config = generation_config(args, exit_layer=None)
    if config.seed is None:
        config = replace(config, seed=0)  # both ways of decoding need the same
    prompts = prompts_of(args, default_count=args.num_prompts)
    model = load(args)
    exit_layer, num_drafts = model.draft_settings(config)
    reports = verify(model, prompts, config, args.exit_layer or [exit_layer], args.batch)
    sampled = f", temperature {config.temperature:g} with seed {config.seed}" if config.temperature else ""
    batched = f" in mixed batches of {args.batch}" if args.batch else ""
    title = f"{model.name}: plain against self-speculative decoding{batched}, {num_drafts} drafts at a time{sampled}"
    settings = {"num_speculations": num_drafts, "temperature": config.temperature, "seed": config.seed}
    found = {**summary(reports), **settings, "batch": args.batch, **identity(model)}
    report(args, found, "\n".join([title, *map(str, reports)]))
    return 0 if all(report.all_equal for report in reports) else 1


def _demo(args: argparse.Namespace) -> int:
    from layerskip_kernels.cli.demo import demo
    from layerskip_kernels.evaluation.prompts import example_prompts
    from layerskip_kernels.model.sources import shipped_checkpoints, shipped_exit_adapters

    config, equal = generation_config(args), True
    shown = [(args.model, args.exit_adapter)]
    if not any(shown[0]):  # the adapters are the default model's
        shown = [
            *((None, [name]) for name in shipped_exit_adapters()),
            *((name, None) for name in shipped_checkpoints()),
        ]
    for args.model, args.exit_adapter in shown:
        prompts = example_prompts(args.model, args.num_prompts).prompts
        equal &= demo(load(args), prompts, config)
    return 0 if equal else 1
