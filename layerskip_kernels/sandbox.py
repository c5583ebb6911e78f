"""Programs that a model wrote, run where they can do nothing but compute: for HumanEval's pass@1.

Each runs in a process of its own (sandbox_child.py), in an empty directory, with limits on time, memory and output. The
kernel lets it make no system call beside those that computing and reading files take (seccomp, a list of what is
allowed): no socket, no process, no signal, and no file opened for writing, created, renamed or removed. It may read
what its user may read, and has nowhere to take it. What is not defended against is a program that means to be taken
for a right one: it runs in one interpreter with its tests. Models that write for people don't.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Outcome", "require_sandbox", "run_tests"]

LIBRARY = "libseccomp.so.2"
CHILD = Path(__file__).with_name("sandbox_child.py")
PASSED = "passed"
OUTPUT_BYTES = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """Whether all tests were reached and passed, and if not, what happened instead."""

    passed: bool
    reason: str


def require_sandbox() -> None:
    """Raise ValueError, saying what to do, where this system has no sandbox: nothing is run without it."""
    if not sys.platform.startswith("linux"):
        raise ValueError("running a model's programs needs Linux, whose kernel confines them; use a container there")
    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise ValueError("running a model's programs needs libseccomp; run: apt-get install libseccomp2") from error


def run_tests(program: str, tests: str, entry_point: str, seconds: float = 10.0, memory: int = 512 << 20) -> Outcome:
    """Run ``program``, then ``tests`` and its ``check(entry_point)``, confined.

    ``seconds``: of wall time, after which it is killed; ``memory``: bytes of address space. A program counts as passed
    only if it came to the end of the tests: the child says so with a word that was drawn for it. Raises ValueError
    where there is no sandbox (`require_sandbox`), RuntimeError where it could not be set up.
    """
    require_sandbox()
    seal = secrets.token_hex(16)
    limits = dict(seconds=seconds, memory=memory, output=OUTPUT_BYTES)
    job = dict(program=program, tests=tests, entry_point=entry_point, seal=seal, limits=limits)
    with (
        tempfile.TemporaryDirectory(prefix="layerskip-") as folder,
        tempfile.TemporaryFile() as told,
        tempfile.TemporaryFile() as heard,
    ):
        told.write(json.dumps(job).encode())
        told.seek(0)
        status = _run(folder, told.fileno(), heard.fileno(), seconds)
        heard.seek(0)
        return _outcome(heard.read(OUTPUT_BYTES), seal, status)


def _run(folder: str, stdin: int, stdout: int, seconds: float) -> int | None:
    """The child's exit status; None where it was killed for taking too long."""
    # Nothing of this environment: it may hold keys.
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(CHILD)], stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL,
        cwd=folder, env={"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"}, start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Before it is waited for, so that its number still is its own.
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _outcome(said: bytes, seal: str, status: int | None) -> Outcome:
    try:
        answer = json.loads(said)
    except ValueError:
        answer = None
    if isinstance(answer, dict) and answer.get("seal") == seal:
        if "unconfined" in answer:
            raise RuntimeError(f"the sandbox could not be set up: {answer['unconfined']}")
        return Outcome(answer["outcome"] == PASSED, str(answer["outcome"]))
    if status is None:
        return Outcome(False, "timeout")
    return Outcome(False, f"killed by signal {-status}" if status < 0 else "ended before its tests did")
