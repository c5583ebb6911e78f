"""The commands of ``layerskip`` that look into a model: sweep, lens, quality."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from layerskip_kernels.cli.options import (
    add_command,
    add_json_options,
    add_model_options,
    add_prompt_options,
    add_threads_option,
    counted,
    load,
    named_prompts,
    output_path,
    positive,
    positives,
    prompts_of,
    read_text,
    report,
)
from layerskip_kernels.evaluation import exit_layers

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the commands to the subparsers of `cli`."""
    _add_sweep(commands)
    _add_lens(commands)
    _add_quality(commands)


# ---- sweep ----


def _add_sweep(commands: Any) -> None:
    sweep = add_command(commands, "sweep", _sweep, "measure exit layers and numbers of drafts; --save keeps the best")
    sweep.add_argument("--exit-layer", type=positives, metavar="E[,E...]", help=exit_layers.HELP)
    sweep.add_argument(
        "--num-speculations", type=positives, default=[2, 4, 6, 8], metavar="K[,K...]", help="default: 2,4,6,8"
    )
    _add_prompt_count(sweep, 5)
    sweep.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="default: 64")
    sweep.add_argument("--rounds", type=positive, default=3, metavar="N", help="timings of each setting (default: 3)")
    sweep.add_argument("--csv", type=output_path, metavar="FILE", help="write the results there as a table")
    add_json_options(sweep)
    sweep.add_argument(
        "--plot", type=output_path, metavar="FILE", help="draw a heat map: .png, .svg or .pdf (needs matplotlib)"
    )
    sweep.add_argument(
        "--save", action="store_true", help="make the best setting the model's default, if it can be trusted"
    )
    _add_common(sweep)


def _sweep(args: argparse.Namespace) -> int:
    from layerskip_kernels.evaluation.equality import BitsDiffer
    from layerskip_kernels.evaluation.exit_sweep import as_text, best, check_worth_saving, defaults_of, sweep, write_csv
    from layerskip_kernels.evaluation.plots import require_matplotlib
    from layerskip_kernels.evaluation.sweep_plot import draw_sweep
    from layerskip_kernels.model.defaults import write_defaults

    require_matplotlib(args.plot)
    examples = named_prompts(args, args.num_prompts)
    model = load(args)
    adapted = [adapter.exit_layer for adapter in model.exit_adapters]
    layers = args.exit_layer or adapted or exit_layers.exit_layers_of(model.config.num_layers)
    try:
        found = sweep(
            model, examples.prompts, layers, args.num_speculations, args.max_new_tokens, args.rounds, examples.origin
        )
    except BitsDiffer as error:
        print(f"layerskip: {error}", file=sys.stderr)
        return 1
    report(args, found, as_text(found))
    if args.csv:
        write_csv(found, Path(args.csv))
    if args.plot:
        draw_sweep(found, Path(args.plot))
    if not args.save:
        print("nothing was saved; --save makes the best setting this model's default", file=sys.stderr)
        return 0
    check_worth_saving(found)
    path = write_defaults(_kept_with(args, best(found)["exit_layer"]), defaults_of(model, best(found)))
    whose = "this model's default" if len(adapted) < 2 else "the default of its exit adapter, used alone"
    print(f"the best setting is now {whose}: {path}", file=sys.stderr)
    return 0


def _kept_with(args: argparse.Namespace, exit_layer: int) -> str | Path | None:
    """Whose defaults are written: those of the exit's adapter, where there are adapters, else the model's."""
    from layerskip_kernels.model.exit_adapter import exit_of
    from layerskip_kernels.model.sources import locate_exit_adapter

    adapters = [locate_exit_adapter(named) for named in args.exit_adapter or []]
    for adapter in adapters:
        if len(adapters) == 1 or exit_of(adapter) == exit_layer:
            return adapter if adapter.is_dir() else adapter.parent
    return args.model


# ---- lens ----


def _add_lens(commands: Any) -> None:
    lens = add_command(commands, "lens", _lens, "show what each layer would say for each generated token")
    _add_prompt_count(lens, 1)
    lens.add_argument("--max-new-tokens", type=positive, default=32, metavar="N", help="default: 32")
    lens.add_argument(
        "--html",
        type=output_path,
        metavar="FILE",
        help="the first prompt as a page (default: lens.html, if nothing else)",
    )
    lens.add_argument(
        "--plot", type=output_path, metavar="FILE", help="the first prompt as a picture: .png, .svg or .pdf"
    )
    lens.add_argument(
        "--histogram", type=output_path, metavar="FILE", help="how many layers the tokens of all prompts need, drawn"
    )
    add_json_options(lens)
    _add_common(lens)


def _lens(args: argparse.Namespace) -> int:
    from layerskip_kernels.evaluation.facts import caption, machine_facts
    from layerskip_kernels.evaluation.lens import look_at_all, summary
    from layerskip_kernels.evaluation.lens_page import lens_page
    from layerskip_kernels.evaluation.lens_plot import draw_layers_needed, draw_lens
    from layerskip_kernels.evaluation.plots import require_matplotlib

    require_matplotlib(args.plot, args.histogram)
    prompts = prompts_of(args, args.num_prompts)
    model = load(args)
    lenses = look_at_all(model, prompts, args.max_new_tokens)
    found, facts = summary(model, lenses), machine_facts()
    text = (
        f"{model.name}: the {found['tokens']} tokens generated need {found['mean_layer']:.2f} of "
        f"{found['num_layers']} layers on average ({counted(found['prompts'], 'prompt')})"
    )
    for adapter in found.get("adapters", []):
        text += (
            f"; its exit adapter after layer {adapter['exit_layer']} says {adapter['agreement']:.1%} of them, the "
            f"layer alone {found['agreement'][adapter['exit_layer'] - 1]:.1%}"
        )
    report(args, {**found, "machine": facts}, text)
    html = args.html or (None if args.plot or args.histogram or args.json or args.output else "lens.html")
    if html:
        Path(html).write_text(lens_page(model, lenses[0]), encoding="utf-8")
        print(f"{lenses[0].name}, layer by layer: {html}", file=sys.stderr)
    if args.plot:
        draw_lens(model, lenses[0], Path(args.plot), caption(facts))
    if args.histogram:
        draw_layers_needed(found, Path(args.histogram), caption(facts))
    return 0


# ---- quality ----


def _add_quality(commands: Any) -> None:
    quality = add_command(
        commands, "quality", _quality, "perplexity of every exit; with --pass-at-1, HumanEval's tests as well"
    )
    quality.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help="judged instead of HumanEval's solutions; may be repeated",
    )
    quality.add_argument(
        "--num-prompts", type=positive, default=20, metavar="N", help="HumanEval problems (default: 20, of 164)"
    )
    quality.add_argument(
        "--pass-at-1", action="store_true",
        help="generate solutions and run the tests of HumanEval on them, in a sandbox (for models that can program)",
    )  # fmt: skip
    quality.add_argument(
        "--max-new-tokens", type=positive, default=384, metavar="N", help="of a solution (default: 384)"
    )
    quality.add_argument(
        "--json", nargs="?", const=True, default=False, metavar="FILE",
        help="print one JSON object instead; with a FILE: as --output",
    )  # fmt: skip
    quality.add_argument("--output", type=output_path, metavar="FILE", help="write the JSON object there as well")
    quality.set_defaults(json_always=False)
    quality.add_argument(
        "--plot", type=output_path, metavar="FILE", help="draw perplexity and agreement by exit: .png, .svg or .pdf"
    )
    add_model_options(quality)
    add_threads_option(quality)


def _quality(args: argparse.Namespace) -> int:
    from layerskip_kernels.evaluation.facts import caption, machine_facts
    from layerskip_kernels.evaluation.plots import require_matplotlib
    from layerskip_kernels.evaluation.quality import as_text, pass_at_1, perplexities, texts_of
    from layerskip_kernels.evaluation.quality_plot import draw_perplexities
    from layerskip_kernels.evaluation.sandbox import require_sandbox

    if isinstance(args.json, str):
        args.json, args.output = False, output_path(args.json)
    require_matplotlib(args.plot)
    if args.pass_at_1:
        require_sandbox()
    model = load(args)
    texts = texts_of(model, [read_text(path) for path in args.text or []], args.num_prompts)
    found: dict[str, Any] = {"model": model.name, "machine": machine_facts(), "perplexity": perplexities(model, texts)}
    if args.pass_at_1:
        found["pass_at_1"] = pass_at_1(model, args.num_prompts, args.max_new_tokens)
    report(args, found, as_text(found))
    if args.plot:
        draw_perplexities(found, Path(args.plot), caption(found["machine"]))
    return 0


# ---- what they share ----


def _add_prompt_count(parser: argparse.ArgumentParser, count: int) -> None:
    parser.add_argument(
        "--num-prompts", type=positive, default=count, metavar="N", help=f"example prompts, at most (default: {count})"
    )
    add_prompt_options(parser, "the model's example prompts")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_threads_option(parser)
