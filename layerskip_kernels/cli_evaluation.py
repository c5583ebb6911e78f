"""The commands of ``layerskip`` that look into a model: sweep, lens, quality."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from layerskip_kernels.cli_options import (
    add_command,
    add_model_options,
    add_prompt_options,
    add_threads_option,
    load,
    positive,
    positives,
    prompts_of,
    read_text,
)

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the commands to the subparsers of `cli`."""
    _add_sweep(commands)
    _add_lens(commands)
    _add_quality(commands)


# ---- sweep ----


def _add_sweep(commands: Any) -> None:
    sweep = add_command(commands, "sweep", _sweep, "measure exit layers and numbers of drafts, and keep the best")
    sweep.add_argument(
        "--exit-layer", type=positives, metavar="E[,E...]", help="default: 1/8, 1/4, 1/3 and 1/2 of the layers"
    )
    sweep.add_argument(
        "--num-speculations", type=positives, default=[2, 4, 6, 8], metavar="K[,K...]", help="default: 2,4,6,8"
    )
    _add_prompt_count(sweep, 5)
    sweep.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="default: 64")
    sweep.add_argument("--rounds", type=positive, default=3, metavar="N", help="timings of each setting (default: 3)")
    sweep.add_argument("--csv", metavar="PATH", help="write the results there")
    sweep.add_argument("--json", metavar="PATH", help="write the results and the machine's facts there")
    sweep.add_argument("--plot", metavar="FILE", help="draw a heat map: .png, .svg or .pdf (needs matplotlib)")
    sweep.add_argument("--no-save", action="store_true", help="do not make the best setting the model's default")
    _add_common(sweep)


def _sweep(args: argparse.Namespace) -> int:
    from layerskip_kernels.bench import BitsDiffer
    from layerskip_kernels.defaults import write_defaults
    from layerskip_kernels.plots import require_matplotlib
    from layerskip_kernels.sweep import as_text, best, defaults_of, exit_layers_of, sweep, write_csv
    from layerskip_kernels.sweep_plot import draw_sweep

    require_matplotlib(args.plot)
    prompts = prompts_of(args, args.num_prompts)
    model = load(args)
    exit_layers = args.exit_layer or exit_layers_of(model.config.num_layers)
    try:
        report = sweep(model, prompts, exit_layers, args.num_speculations, args.max_new_tokens, args.rounds)
    except BitsDiffer as error:
        print(f"layerskip: {error}", file=sys.stderr)
        return 1
    print(as_text(report))
    if args.csv:
        write_csv(report, Path(args.csv))
    if args.json:
        _write_json(report, args.json)
    if args.plot:
        draw_sweep(report, Path(args.plot))
    if not args.no_save:
        path = write_defaults(args.model, defaults_of(model, best(report)))
        print(f"the best setting is now this model's default: {path}")
    return 0


# ---- lens ----


def _add_lens(commands: Any) -> None:
    lens = add_command(commands, "lens", _lens, "show what each layer would say for each generated token")
    _add_prompt_count(lens, 1)
    lens.add_argument("--max-new-tokens", type=positive, default=32, metavar="N", help="default: 32")
    lens.add_argument("--html", metavar="FILE", help="the first prompt as a page (default: lens.html, if nothing else)")
    lens.add_argument("--plot", metavar="FILE", help="the first prompt as a picture: .png, .svg or .pdf")
    lens.add_argument("--histogram", metavar="FILE", help="how many layers the tokens of all prompts need, drawn")
    lens.add_argument("--json", metavar="PATH", help="write the figures over all prompts there")
    _add_common(lens)


def _lens(args: argparse.Namespace) -> int:
    from layerskip_kernels.lens import look_at_all, summary
    from layerskip_kernels.lens_page import lens_page
    from layerskip_kernels.lens_plot import draw_layers_needed, draw_lens
    from layerskip_kernels.plots import require_matplotlib

    require_matplotlib(args.plot, args.histogram)
    prompts = prompts_of(args, args.num_prompts)
    model = load(args)
    lenses = look_at_all(model, prompts, args.max_new_tokens)
    found = summary(model, lenses)
    print(
        f"{model.name}: the {found['tokens']} tokens generated need {found['mean_layer']:.2f} of "
        f"{found['num_layers']} layers on average (prompts: {found['prompts']})"
    )
    html = args.html or (None if args.plot or args.histogram or args.json else "lens.html")
    if html:
        Path(html).write_text(lens_page(model, lenses[0]), encoding="utf-8")
        print(f"{lenses[0].name}, layer by layer: {html}")
    if args.plot:
        draw_lens(model, lenses[0], Path(args.plot))
    if args.histogram:
        draw_layers_needed(found, Path(args.histogram))
    if args.json:
        _write_json(found, args.json)
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
    quality.add_argument("--json", metavar="PATH", help="write the figures there")
    quality.add_argument("--plot", metavar="FILE", help="draw perplexity and agreement by exit: .png, .svg or .pdf")
    add_model_options(quality)
    add_threads_option(quality)


def _quality(args: argparse.Namespace) -> int:
    from layerskip_kernels.plots import require_matplotlib
    from layerskip_kernels.quality import as_text, pass_at_1, perplexities, texts_of
    from layerskip_kernels.quality_plot import draw_perplexities
    from layerskip_kernels.sandbox import require_sandbox

    require_matplotlib(args.plot)
    if args.pass_at_1:
        require_sandbox()
    model = load(args)
    texts = texts_of(model, [read_text(path) for path in args.text or []], args.num_prompts)
    report: dict[str, Any] = {"model": model.name, "perplexity": perplexities(model, texts)}
    if args.pass_at_1:
        report["pass_at_1"] = pass_at_1(model, args.num_prompts, args.max_new_tokens)
    print(as_text(report))
    if args.json:
        _write_json(report, args.json)
    if args.plot:
        draw_perplexities(report, Path(args.plot))
    return 0


# ---- what they share ----


def _add_prompt_count(parser: argparse.ArgumentParser, count: int) -> None:
    parser.add_argument(
        "--num-prompts", type=positive, default=count, metavar="N", help=f"of HumanEval (default: {count})"
    )
    add_prompt_options(parser, "the first HumanEval problem" if count == 1 else "HumanEval problems")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_threads_option(parser)


def _write_json(report: dict[str, Any], path: str) -> None:
    Path(path).write_text(json.dumps(report) + "\n", encoding="utf-8")
