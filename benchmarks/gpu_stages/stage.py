"""What the stages of gpu_check share: their folder, their time, and the rehearsal without a GPU.

A stage is a program of its own, so that a crash costs one: ``python benchmarks/gpu_stages/NAME.py --out FOLDER``. What
it found so far is in FOLDER/NAME.json at any moment. ``--rehearse`` runs it at tiny sizes with Triton's interpreter:
that its lines run, not what a GPU says.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 480  # of a stage
REHEARSING = "--rehearse" in sys.argv

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1" if REHEARSING else "0"  # before Triton is imported, which reads it once
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

DEVICE = "cpu" if REHEARSING else "cuda"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class StageError(Exception):
    """What was to be shown is not so."""


class Stage:
    """The results of a stage, written whenever something is added."""

    def __init__(self, name: str, out: Path, seconds: float) -> None:
        self._file, self._end = out / f"{name}.json", time.monotonic() + seconds
        self._found: dict[str, Any] = {"stage": name, "rehearsal": REHEARSING, "outcome": "stopped before its end"}
        out.mkdir(parents=True, exist_ok=True)
        self._write()

    def note(self, **found: Any) -> None:
        self._found.update(found)
        self._write()
        for key, value in found.items():
            text = json.dumps(value)
            say(f"{key}: {text if len(text) < 400 else text[:400] + ' ...'}")

    def left(self) -> float:
        """Seconds until the stage is stopped."""
        return self._end - time.monotonic()

    def _write(self) -> None:
        draft = self._file.with_suffix(".part")
        draft.write_text(json.dumps(self._found, indent=1) + "\n", encoding="utf-8")
        draft.replace(self._file)


def milliseconds(run: Callable[[], Any], calls: int = 10, rounds: int = 7) -> float:
    """Of a call, on the device: the median of rounds, in each of which calls follow one another."""
    import torch

    if REHEARSING:
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return sorted(times)[rounds // 2]


def main(file: str, run: Callable[[Stage], None]) -> None:
    """Run a stage's program. Its exit status is 0 only if it showed what it was to show."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="where NAME.json goes")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    stage = Stage(Path(file).stem, args.out, args.seconds)
    try:
        run(stage)
    except StageError as failed:
        stage.note(outcome=f"failed: {failed}")
        sys.exit(1)
    except BaseException as error:
        stage.note(outcome=f"ended by {type(error).__name__}: {error}"[:2000])
        raise
    stage.note(outcome="passed")
