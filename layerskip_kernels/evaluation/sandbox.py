"""Run programs that a model wrote against tests, for HumanEval's pass@1: confined, and judged by another process.

Two processes for each program (sandbox_child.py), both confined (sandbox_confine.py): the *candidate* runs the program
and calls its entry point; the *judge* runs the tests. A call that the tests make is sent from one to the other as plain
data (sandbox_values.py), so that the program reaches neither the tests nor the interpreter that decides. Nothing that
the program says is passed on: an `Outcome` names one of `REASONS`, or a signal.

docs/evaluation.md says what this defends against and what not.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

__all__ = ["PASSED", "REASONS", "Outcome", "require_sandbox", "run_tests"]

LIBRARY = "libseccomp.so.2"
CHILD = Path(__file__).with_name("sandbox_child.py")
REPORT_BYTES = 1 << 12
PASSED, ENDED, TIMEOUT = "passed", "ended before its tests did", "timeout"
REASONS = frozenset(
    [
        PASSED, ENDED, TIMEOUT, "an answer is not plain data", "an answer is too large",
        "the tests pass something that is not plain data",
        *(name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Whether all tests were reached and passed; ``reason`` is one of `REASONS`, or "killed by signal N"."""

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


def run_tests(
    program: str, tests: str, entry_point: str, seconds: float = 10.0, memory: int = 512 << 20, given: str = ""
) -> Outcome:
    """Run ``program`` confined, and ``tests`` with ``check(entry_point)`` in a process that it cannot reach.

    ``given``: trusted definitions that the tests may use by name, such as a problem's prompt; the program's own names
    are not visible to the tests. ``seconds``: of wall time for everything, after which it is killed. ``memory``: bytes
    of address space of each process. Raises ValueError where there is no sandbox (`require_sandbox`), RuntimeError
    where it could not be set up.
    """
    require_sandbox()
    job = dict(program=program, tests=tests, entry_point=entry_point, given=given)
    with tempfile.TemporaryDirectory(prefix="layerskip-") as folder, tempfile.TemporaryFile() as job_file:
        os.chmod(folder, 0o555)  # nobody writes there, and another user may enter it
        job_file.write(json.dumps(job).encode())
        job_file.seek(0)
        with tempfile.TemporaryFile() as report, _Undumpable():
            statuses = _run(folder, job_file.fileno(), report.fileno(), seconds, memory)
            report.seek(0)
            return _outcome(report.read(REPORT_BYTES), *statuses)


def _run(folder: str, job: int, report: int, seconds: float, memory: int) -> tuple[int | None, int | None]:
    """The exit statuses of the judge and of the candidate; None where it was killed here."""
    deadline = monotonic() + seconds
    limits = dict(seconds=seconds, memory=memory, parent=os.getpid())
    question, ask = os.pipe()
    listen, answer = os.pipe()
    try:
        candidate = _start("candidate", folder, limits, stdin=question, stdout=answer)
        with _ended(candidate):
            judge = _start("judge", folder, {**limits, "ask": ask, "listen": listen}, job, report, (ask, listen))
            for end in (question, ask, listen, answer):
                os.close(end)  # or no process would see that the other one has ended
            question = -1
            with _ended(judge):
                judged = _wait(judge, deadline - monotonic())
            return judged, None if judged is None else _wait(candidate, 1.0)
    finally:
        if question >= 0:
            for end in (question, ask, listen, answer):
                os.close(end)


def _start(
    role: str, folder: str, settings: dict[str, Any], stdin: int, stdout: int, others: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    # Nothing of this environment: it may hold keys.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(CHILD), role, json.dumps(settings)],
        stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL, pass_fds=others, cwd=folder,
        env={"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"}, start_new_session=True,
    )  # fmt: skip


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill a process and its children on leaving, unless it has been waited for."""
    try:
        yield
    finally:
        # Before it is waited for, so that its number still is its own.
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None


def _outcome(report: bytes, judge: int | None, candidate: int | None) -> Outcome:
    """What the judge reports; the program has no part in it but for the reason's choice out of `REASONS`."""
    if judge is None:
        return Outcome(False, TIMEOUT)
    first, answer = (_object(line) for line in [*report.split(b"\n"), b""][:2])
    if "confined" not in first:  # the program was not sent before the judge had said so
        problem = str(first.get("unconfined", "its processes ended before they were confined"))
        raise RuntimeError("the sandbox could not be set up: " + "".join(filter(str.isprintable, problem))[:300])
    reason = answer.get("outcome")
    reason = reason if isinstance(reason, str) and reason in REASONS else ENDED
    if reason == ENDED and candidate is not None and candidate < 0:
        reason = f"killed by signal {-candidate}"
    return Outcome(reason == PASSED, reason)


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


class _Undumpable:
    """Closes this process's /proc entry (environment, memory) to its own user while programs run."""

    GET, SET = 3, 4  # PR_GET_DUMPABLE, PR_SET_DUMPABLE
    lock: ClassVar = threading.Lock()
    users: ClassVar = 0
    before: ClassVar = 1

    def __enter__(self) -> None:
        with self.lock:
            if not _Undumpable.users:
                _Undumpable.before = _prctl(self.GET, 0)
                _prctl(self.SET, 0)
            _Undumpable.users += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            _Undumpable.users -= 1
            if not _Undumpable.users:
                _prctl(self.SET, min(_Undumpable.before, 1))


def _prctl(option: int, value: int) -> int:
    return ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3)
