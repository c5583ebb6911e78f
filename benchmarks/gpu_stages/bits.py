"""Stage 2: the kernels' tests on the device, a process for each of them, so that a crash costs one.

Then the cases in which the cache's ops refuse their arguments, a process each; one that crashes is run again for its
backtrace, of Python and, where there is a debugger, of the extension.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from stage import REHEARSING, ROOT, Stage, StageError, main

KERNELS = [
    "tests/ops/test_triton_ops.py", "tests/decoding/test_triton_steps.py", "tests/ops/test_triton_integer_dot.py",
    "tests/ops/test_prompt_dot.py", "tests/decoding/test_triton_prompts.py", "tests/decoding/test_triton_families.py",
    "tests/ops/test_triton_sampling.py", "tests/ops/test_copy_pages.py", "tests/ops/test_gather_kv.py",
]  # fmt: skip
CACHE = ["tests/ops/test_copy_pages.py", "tests/ops/test_gather_kv.py"]
# Of a rehearsal: a test that passes, one that refuses arguments.
REHEARSED_FILES = ["tests/ops/test_gather_kv.py"]
REHEARSED = ("test_gathering_by_indexing_the_same[fp32-cpu]", "test_negative_length")
MOST_SECONDS = 240  # of a process
MOST_TESTS = 12  # in a process
REFUSALS = ("refused", "negative")
WORKERS = 2 if REHEARSING else min(14, os.cpu_count() or 1)


@dataclass(frozen=True)
class Result:
    """What became of the tests of a process. ``signal``: what ended it, if one did; ``stopped``: its time was up."""

    passed: int
    failed: int
    skipped: int
    signal: int
    stopped: bool
    seconds: float
    said: str

    @property
    def fine(self) -> bool:
        """pytest's exit status says 0 of tests that were all skipped, too."""
        return self.passed > 0 and not (self.failed or self.signal or self.stopped)

    def as_json(self) -> dict[str, Any]:
        counts = {"passed": self.passed, "failed": self.failed, "skipped": self.skipped, "seconds": self.seconds}
        return counts if self.fine else {**counts, "signal": self.signal, "stopped": self.stopped, "said": self.said}


PYTEST = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-W", "ignore", "-p", "no:cacheprovider"]


def collected(files: list[str]) -> tuple[list[str], str]:
    """The ids of all tests, and what pytest says if it could not read some file."""
    command = [*PYTEST, "--collect-only", "--continue-on-collection-errors", *files]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    ids = [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]
    if not ids:
        raise StageError(f"no tests could be collected: {(done.stdout + done.stderr)[-2000:]}")
    return ids, done.stdout[-2000:] if done.returncode else ""


def run_tests(ids: Iterable[str], prefix: tuple[str, ...] = (), seconds: float = MOST_SECONDS) -> Result:
    """Some tests in a process of their own."""
    start, stopped = time.monotonic(), False
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*prefix, *PYTEST, f"--junitxml={report}", *ids]
        try:
            done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=seconds, errors="replace")
            # pytest's summary is its end; a crash's backtrace, of Python, begins with the place.
            status, said = done.returncode, done.stdout[-2500:] + done.stderr[:2500]
        except subprocess.TimeoutExpired as timeout:
            status, stopped, said = 0, True, f"stopped after {seconds:.0f} s: {timeout.stdout!r}"[:2500]
        counts = counted(report)
    passed, failed, skipped = counts
    if status > 0 and failed == 0:
        failed = 1  # pytest itself
    return Result(passed, failed, skipped, max(0, -status), stopped, round(time.monotonic() - start, 1), said)


def counted(report: Path) -> tuple[int, int, int]:
    """Tests that passed, failed and were skipped, by pytest's own report; none where it wrote no report."""
    if not report.is_file():
        return 0, 0, 0
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        for name in total:
            total[name] += int(suite.get(name, 0))
    failed = total["failures"] + total["errors"]
    return total["tests"] - failed - total["skipped"], failed, total["skipped"]


def is_refusal(test: str) -> bool:
    return test.startswith(tuple(CACHE)) and any(word in test.split("::")[1] for word in REFUSALS)


def by_function(ids: list[str]) -> dict[str, list[str]]:
    """Tests without their parameters, numbered where they are many -> their ids, as many as a process runs."""
    functions: dict[str, list[str]] = {}
    for test in ids:
        functions.setdefault(test.split("[")[0], []).append(test)
    return {
        name if first == 0 else f"{name} {first}": tests[first : first + MOST_TESTS]
        for name, tests in functions.items()
        for first in range(0, len(tests), MOST_TESTS)
    }


def backtrace(test: str) -> dict[str, str]:
    """Where a test crashes: the test alone, with and without a debugger around it, and with torch's own stacks."""
    found = {"alone": run_tests([test]).said}
    for debugger in ("cuda-gdb", "gdb"):
        if tool := shutil.which(debugger) or shutil.which(debugger, path="/usr/local/cuda/bin"):
            prefix = (tool, "-batch", "-ex", "run", "-ex", "bt 60", "--args")
            found[debugger] = run_tests([test], prefix).said
            break
    return found


def run(stage: Stage) -> None:
    ids, unread = collected(REHEARSED_FILES if REHEARSING else KERNELS)
    if REHEARSING:
        ids = [test for test in ids if any(name in test for name in REHEARSED)]
    refusals = [test for test in ids if is_refusal(test)]
    groups = by_function([test for test in ids if not is_refusal(test)])
    stage.note(tests=len(ids), functions=len(groups), refusals=len(refusals), unread=unread)
    kernels: dict[str, Any] = {}
    refused: dict[str, Any] = {}
    bad: list[str] = []
    different: list[str] = []

    def one(name: str, tests: list[str], into: dict[str, Any]) -> None:
        if stage.left() < 20:
            into[name] = "not reached"
            return
        result = run_tests(tests, seconds=min(MOST_SECONDS, stage.left() - 10))
        into[name] = result.as_json()
        if not result.fine:
            bad.append(name)
        if into is kernels and (result.failed or result.signal):
            different.append(name)

    with ThreadPoolExecutor(WORKERS) as pool:
        for begun in [pool.submit(one, name, tests, kernels) for name, tests in groups.items()]:
            begun.result()
            stage.note(kernels=dict(kernels))
        for begun in [pool.submit(one, test, [test], refused) for test in refusals]:
            begun.result()
        stage.note(refused=refused)
    crashed = [test for test in refused if isinstance(refused[test], dict) and refused[test].get("signal")]
    if crashed and stage.left() > 60:
        stage.note(backtrace={crashed[0]: backtrace(crashed[0])})
    counts = [entry for entry in (*kernels.values(), *refused.values()) if isinstance(entry, dict)]
    stage.note(
        passed=sum(entry["passed"] for entry in counts), failed=sum(entry["failed"] for entry in counts),
        skipped=sum(entry["skipped"] for entry in counts), not_reached=len(groups) + len(refusals) - len(counts),
        bits_differ=different,
    )  # fmt: skip
    if unread:
        raise StageError("some files' tests could not be read")
    if bad:
        raise StageError(f"{len(bad)} of {len(groups) + len(refusals)} processes, {bad[0]} among them")


if __name__ == "__main__":
    main(__file__, run)
