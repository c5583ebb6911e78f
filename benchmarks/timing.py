"""The timer of all benchmarks, which lives in layerskip_kernels/evaluation/timing.py, and where their results go.

``python benchmarks/timing.py`` measures what the machine can do: read bandwidth and fp32 peak.
"""

import argparse
import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from layerskip_kernels.evaluation.equality import BitsDiffer
from layerskip_kernels.evaluation.facts import machine_facts
from layerskip_kernels.evaluation.limits import Limits, limit_candidates
from layerskip_kernels.evaluation.step_bytes import ceiling
from layerskip_kernels.evaluation.timing import Candidate, Timing, interleave, num_copies, rotating
from layerskip_kernels.machine import usable_cores

__all__ = [
    "BitsDiffer", "Candidate", "Limits", "Timing", "arguments", "ceiling", "described", "finish", "interleave",
    "limit_candidates", "limits_of", "num_copies", "rotating",
]  # fmt: skip

RESULTS = Path(__file__).parent / "results"


def arguments(description: str, **options: Any) -> argparse.Namespace:
    """The options that every benchmark has, and whole numbers of its own with their defaults; sets the threads."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<name>.json as well")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: the physical cores")
    for name, default in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default: {default}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def described(timing: Timing) -> dict[str, float]:
    """A timing in numbers."""
    return {"median_s": timing.median, "iqr_s": timing.iqr, "rounds": len(timing.seconds)}


def finish(name: str, measured: dict[str, Any], save: bool, command: str | None = None) -> None:
    """Print the results with machine and command as the last line of stdout, and save them if asked to.

    Those of an instruction set that LAYERSKIP_ISA named have it in the name of their file: steps_avx2.json.
    """
    isa = os.environ.get("LAYERSKIP_ISA")
    name = f"{name}_{isa}" if isa else name
    chosen = [f"LAYERSKIP_ISA={isa}"] if isa else []
    command = command or " ".join([*chosen, "python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")
    result = {"machine": machine_facts(), "date": date, "command": command, **measured}
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


def limits_of(timings: dict[str, Timing]) -> dict[str, float]:
    """The limits among some timings, for a result."""
    return vars(Limits.of(timings))


def main() -> None:
    args = arguments(__doc__ or "", rounds=20)
    timings = interleave(limit_candidates(), args.rounds)
    finish("limits", limits_of(timings), args.save)


if __name__ == "__main__":
    main()
