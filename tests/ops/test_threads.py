"""The bits do not depend on how many threads the OpenMP runtime gives, nor on the caller's floating-point mode."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from support import teams
from support.models import threads
from support.teams import assert_equal_bits, bits, load_teams

TESTS = Path(teams.__file__).parents[1]


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    """What one thread computes."""
    with threads(1):
        return bits()


# ---- fewer threads than asked for ----


@pytest.mark.parametrize(
    ("setting", "asked", "size"),
    [
        ({}, 3, 3),
        ({"OMP_THREAD_LIMIT": "1"}, 3, 1),
        ({"OMP_THREAD_LIMIT": "2"}, 3, 2),
        ({"OMP_MAX_ACTIVE_LEVELS": "0"}, 2, 1),
        ({"OMP_DYNAMIC": "true"}, 500, None),  # as many as there are idle processors, at least one
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) or "as it is" if isinstance(value, dict) else "",
)
def test_a_smaller_team_does_all_the_work(setting, asked, size, alone, tmp_path):
    environment = {**os.environ, **setting, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    program = [sys.executable, "-m", "support.teams", str(tmp_path / "bits"), str(asked), teams.teams_path()]
    result = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    got = torch.load(tmp_path / "bits")
    given = int(got.pop("team size"))
    assert given == size if size is not None else 1 <= given < asked
    assert_equal_bits(got, alone)


@contextmanager
def max_active_levels(library: ctypes.CDLL, levels: int) -> Iterator[None]:
    library.set_max_active_levels(levels)
    try:
        yield
    finally:
        library.set_max_active_levels(1)


def test_a_team_that_changes_between_steps(alone):
    """Three threads, one, two, one ...: the number asked for and the number given change independently."""
    library, sizes = load_teams(), []

    def between(step: int) -> None:
        torch.set_num_threads(3 - step % 2)
        library.set_max_active_levels(int(step % 4 < 2))
        sizes.append(library.team_size(3))

    with threads(3), max_active_levels(library, 1):
        got = bits(between)
    assert {1, 3} <= set(sizes)
    assert_equal_bits(got, alone)


@pytest.mark.parametrize("levels", [1, 2])
def test_a_call_from_inside_another_region(levels, alone):
    """Every thread of a foreign region calls the ops; with ``levels`` 2 it would get threads of its own."""
    library, results = load_teams(), {}

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def call(thread: int) -> None:
        results[thread] = bits()

    with threads(2), max_active_levels(library, levels):
        library.call_in_team(2, call)
    assert sorted(results) == [0, 1]
    for got in results.values():
        assert_equal_bits(got, alone)


# ---- the caller's floating-point mode ----


@contextmanager
def rounding(library: ctypes.CDLL, mode: int) -> Iterator[None]:
    """0..3: to nearest, down, up, to zero."""
    before = library.set_rounding(mode)
    assert before >= 0
    try:
        yield
    finally:
        assert library.set_rounding(before) == mode, "an op did not restore the caller's mode"


class InMode(torch.utils._python_dispatch.TorchDispatchMode):
    """Runs our ops, and only them, in a rounding mode: what Python and torch prepare is not theirs to keep."""

    def __init__(self, library: ctypes.CDLL, mode: int) -> None:
        super().__init__()
        self.library, self.mode, self.calls = library, mode, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "layerskip":
            return func(*args, **(kwargs or {}))
        self.calls += 1
        with rounding(self.library, self.mode):
            return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", range(4), ids=["nearest", "down", "up", "zero"])
@pytest.mark.parametrize("count", [1, 2])
def test_rounding_mode(mode, count, alone):
    """Set on the calling thread; a worker of the OpenMP runtime takes its creator's. All ops compute the same bits."""
    library = load_teams()
    with threads(count), InMode(library, mode) as watched:
        got = bits()
    assert watched.calls > 30
    assert_equal_bits(got, alone)


def test_an_op_alone_in_every_rounding_mode():
    """exp, log, silu and inverse_sqrt run on the calling thread; eps and scales are narrowed by the op itself."""
    library, ops = load_teams(), torch.ops.layerskip
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 9
    weight = torch.ones(1000)

    def run() -> list[torch.Tensor]:
        return [
            ops.exp(x),
            ops.log(x),
            ops.silu(x),
            ops.inverse_sqrt(x),
            ops.rms_norm(x[None], weight, 0.1),
            ops.gumbel(torch.arange(9)),
        ]

    expected, rounded = run(), set()
    for mode in range(4):
        with rounding(library, mode):
            got = run()
            rounded.add(float(torch.tensor(1.0) / torch.tensor(3.0)))
        assert all(map(torch.equal, got, expected))
    assert len(rounded) == 2, "the mode had no effect on torch's own arithmetic, so this shows nothing"
