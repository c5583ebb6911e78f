"""What every bench_<op>.py shares: the cases, the check of the bits that comes before the time, and the results."""

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor

from layerskip_kernels import ModelConfig
from layerskip_kernels.machine import usable_cores
from layerskip_kernels.ops import reference
from shapes import SHAPES
from timing import finish, interleave, limit_candidates, limits_of, rotating

cpu = torch.ops.layerskip
MAX_ROWS = 12
SECONDS, MIN_ROUNDS, MAX_ROUNDS = 0.2, 5, 200
Arguments = dict[str, Any]
RESULTS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save", action="store_true", help="write benchmarks/results/ops.json")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(usable_cores())
    config.stash[RESULTS] = []


def pytest_unconfigure(config: pytest.Config) -> None:
    """After pytest's own last line, so that the last one is the JSON."""
    results = config.stash.get(RESULTS, [])
    if not results:
        return
    # Apart from the ops, which choose their own rounds; but in the same process, right after them.
    limits = limits_of(interleave(limit_candidates(), min_rounds=20))
    for result in results:
        gb_s = result["bytes"] / result["median_s"] / 1e9
        result |= {"gb_s": gb_s, "fraction_of_limit": gb_s / limits["read_bandwidth_gb_s"]}
    command = "python -m pytest " + " ".join(map(str, config.invocation_params.args))
    finish("ops", {**limits, "results": results}, config.getoption("save"), command)


# ---- the cases ----


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def config(shape: str) -> ModelConfig:
    return SHAPES[shape]


@pytest.fixture(params=[1, 6, MAX_ROWS], ids="{}rows".format)
def rows(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=[100, 1000], ids="context{}".format)
def context(request: pytest.FixtureRequest) -> int:
    return request.param


def hidden(rows: int, size: int) -> Tensor:
    """The first ``rows`` of always the same rows: one row alone must give what it gives among others."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(MAX_ROWS, size, generator=generator).bfloat16()[:rows]


# ---- check, then time ----


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """``record(name, num_bytes, **case)``, called before the time is taken: keeps it when the benchmark is over."""
    kept: dict[str, Any] = {}

    def keep(name: str, num_bytes: int, **case: Any) -> None:
        kept.update(name=name, **case, bytes=num_bytes)

    yield keep
    if kept and benchmark.stats:
        stats = benchmark.stats.stats
        times = {"median_s": stats.median, "iqr_s": stats.iqr, "rounds": stats.rounds}
        request.config.stash[RESULTS].append({**kept, **times})


@pytest.fixture
def measure(benchmark: Any, record: Callable[..., None], shape: str) -> Callable[..., None]:
    """``measure(op, weights, inputs, rows, reads=(), **case)``: check an op's bits and time it.

    ``weights``: the row-major weights among its arguments; ``inputs(rows)``: its other arguments, always the same
    ones; ``reads``: those of them that count as read from memory, beside the weights. Each call gets another copy
    of what it reads.
    """

    def run(op: str, weights: Arguments, inputs: Callable[[int], Arguments], rows: int,
            reads: tuple[str, ...] = (), **case: Any) -> None:  # fmt: skip
        packed = {name: _packed(weight) for name, weight in weights.items()}
        if shape == "SmolLM2-135M":
            assert_equals_reference(op, {**packed, **inputs(rows)}, {**weights, **inputs(rows)})
        else:
            assert_row_invariant(op, {**packed, **inputs(rows)}, {**packed, **inputs(1)})
        arguments = {**packed, **inputs(rows)}
        read = (*weights, *reads)
        num_bytes = sum(arguments[name].nbytes for name in read)
        copies = rotating(lambda: {**arguments, **{name: arguments[name].clone() for name in read}}, num_bytes)
        record(op, num_bytes, shape=shape, rows=rows, **case)
        repeat(benchmark, lambda **arguments: getattr(cpu, op)(**arguments), lambda: ((), copies()))

    return run


def repeat(benchmark: Any, run: Callable[..., Any], setup: Callable[[], tuple[tuple, Arguments]]) -> None:
    """As many rounds as fit into the time of a case."""
    args, kwargs = setup()
    start = perf_counter()
    run(*args, **kwargs)
    rounds = int(SECONDS / (perf_counter() - start))
    rounds = min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)
    benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=2)


def _packed(weight: Tensor) -> Tensor:
    return cpu.pack_weight(weight) if weight.dim() == 2 else weight


def assert_equals_reference(op: str, arguments: Arguments, expected: Arguments) -> None:
    """Results, and pages written in place."""
    got = _results(op, cpu, arguments) + _pages(arguments)
    wanted = _results(op, reference, expected) + _pages(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), f"{op} differs from the reference"


def assert_row_invariant(op: str, many: Arguments, one: Arguments) -> None:
    got, wanted = _results(op, cpu, many), _results(op, cpu, one)
    assert all(torch.equal(a[:1], b) for a, b in zip(got, wanted, strict=True)), f"{op} depends on the other rows"


def _results(op: str, backend: Any, arguments: Arguments) -> list[Tensor]:
    result = getattr(backend, op)(**arguments)
    return [result] if isinstance(result, Tensor) else list(result)


def _pages(arguments: Arguments) -> list[Tensor]:
    return [arguments[name] for name in ("k_pages", "v_pages") if name in arguments]
