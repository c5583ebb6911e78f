"""``layerskip eval``: the lm-evaluation-harness, any exit as the model that is judged."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from layerskip_kernels.cli.options import add_command, add_model_options, add_threads_option, load, positive
from layerskip_kernels.model.files import naming

__all__ = ["add_eval_command"]

MISSING = "layerskip eval needs the lm-evaluation-harness; run: pip install lm-eval"


def add_eval_command(commands: Any) -> None:
    parser = add_command(commands, "eval", _eval, "run tasks of the lm-evaluation-harness")
    add_model_options(parser)
    add_threads_option(parser)
    parser.add_argument("--tasks", required=True, metavar="NAME,...", help="as the harness names them")
    parser.add_argument("--exit-layer", type=positive, metavar="E", help="judge the first E layers (default: all)")
    parser.add_argument("--limit", type=positive, metavar="N", help="documents of each task (default: all)")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each document")
    parser.add_argument("--include-path", metavar="DIR", help="a folder with task files of your own")
    parser.add_argument("--output", metavar="FILE", help="write the harness' results as JSON")


def _eval(args: argparse.Namespace) -> int:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{MISSING} ({error.name} is missing)") from error
    from layerskip_kernels.integrations.lm_eval import LayerSkipLM

    results = simple_evaluate(
        model=LayerSkipLM(load(args), args.exit_layer),
        tasks=args.tasks.split(","),
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        task_manager=TaskManager(include_path=args.include_path),
        log_samples=False,
        bootstrap_iters=0,
    )
    print(make_table(results))
    if args.output:
        with naming(args.output):
            Path(args.output).write_text(json.dumps(results["results"], indent=1, default=str) + "\n", encoding="utf-8")
    return 0
