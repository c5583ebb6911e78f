"""Everything that only a GPU can show: `make gpu-check`, or python benchmarks/gpu_check.py [--out FOLDER].

Stages of at most eight minutes, the most valuable first, each of which leaves FOLDER/NAME.json, whatever becomes of it:

first_tokens  the build; a decode and a speculative generation, equal to the CPU's tokens, with drafts accepted
bits          every kernel against the reference and the CPU, a process each; the cases that ops refuse
timings       steps and prompts as bytes per second over a copy's, and by kernel; generation beside Transformers
arithmetic    what the kernels assume of the hardware's sums; 20,000 replays of a captured step
sanitizers    compute-sanitizer over the cache's ops and a cycle
tuning        launch configurations, timed; the fastest go into a file that the package reads

Nothing is timed where tokens or bits differed. ``--rehearse`` runs every stage at tiny sizes without a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "gpu_stages"))
from stage import SECONDS, say  # noqa: E402

STAGES = ("first_tokens", "bits", "timings", "arithmetic", "sanitizers", "tuning")
ONLY_IF_EQUAL = ("timings", "tuning")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu", help="default: benchmarks/results/gpu")
    parser.add_argument("--stage", action="append", choices=STAGES, help="default: all, in this order")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of a stage, at most; default: {SECONDS}")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, interpreted on the CPU")
    args = parser.parse_args()
    if not args.rehearse and (missing := missing_gpu()):
        print(missing, file=sys.stderr)
        return 2
    ended: dict[str, Any] = {}
    for name in args.stage or STAGES:
        different = [of for of in ("first_tokens", "bits") if differs(found(args.out, of))]
        if name in ONLY_IF_EQUAL and different:
            ended[name] = {"status": None, "why": f"{different[0]} found other bits"}
            say(f"{name}: not run, {ended[name]['why']}")
            continue
        ended[name] = run_stage(name, args.out, args.seconds, args.rehearse)
        (args.out / "summary.json").write_text(json.dumps(ended, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(ended))
    return int(any(stage["status"] != 0 for stage in ended.values()))


def missing_gpu() -> str | None:
    """Asked for in another process: one that forks none of its own into a CUDA context."""
    asked = [sys.executable, "-c", "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"]
    if subprocess.run(asked, capture_output=True).returncode == 0:
        return None
    return "gpu_check needs a GPU that torch can use; `layerskip doctor` says what it finds"


def run_stage(name: str, out: Path, seconds: float, rehearse: bool) -> dict[str, Any]:
    """A stage in a process of its own, stopped when its time is up; what it found so far is in its file."""
    say(f"---- {name} ----")
    start = time.monotonic()
    command = [sys.executable, str(HERE / "gpu_stages" / f"{name}.py"), "--out", str(out), "--seconds", str(seconds)]
    try:
        status: int | None = subprocess.run([*command, *(["--rehearse"] * rehearse)], timeout=seconds + 15).returncode
    except subprocess.TimeoutExpired:
        status = None
    outcome = found(out, name).get("outcome", "nothing was written")
    say(f"---- {name}: {outcome} ----")
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "outcome": outcome}


def found(out: Path, name: str) -> dict[str, Any]:
    """What a stage wrote into the folder, in this run or an earlier one."""
    file = out / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def differs(result: dict[str, Any]) -> bool:
    """Whether a stage found other tokens or bits. A case that crashed instead of being refused is another matter."""
    if "bits_differ" in result:
        return bool(result["bits_differ"])
    return result.get("outcome", "passed") != "passed"


if __name__ == "__main__":
    sys.exit(main())
