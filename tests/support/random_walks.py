"""How far what draws at random goes, in `make test` and in `make fuzz`; and the random walks of the page pool, the
cache and the engine, which must have got about."""

import os
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

LEAST_STEPS = 20_000  # of `make test`: with fewer, not every kind of move comes up
MOST_STEPS = max(LEAST_STEPS, int(os.environ.get("LAYERSKIP_FUZZ_STEPS", "0")))


def times_further(count: int) -> int:
    """``count`` in `make test`, and in `make fuzz` as many times more as there are steps."""
    return count * MOST_STEPS // LEAST_STEPS


def walk(machine: Any, taken: Counter[str], steps: int, steps_per_walk: int, moves: str) -> None:
    """Random walks of a state machine, which counts in ``taken``, until ``steps`` are done; every move now and then."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=-(-steps * 5 // (4 * steps_per_walk)),  # some end early
            stateful_step_count=steps_per_walk, deadline=None, print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    print(dict(taken))
    assert taken["steps"] >= steps
    assert all(taken[move] >= steps / 1000 for move in moves.split()), taken
