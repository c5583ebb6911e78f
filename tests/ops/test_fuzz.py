"""No call of an op, however hostile, ends the process, hangs or writes where it must not.

``make fuzz`` goes further, with other seeds. What fails names its seed;
``PYTHONPATH=.:tests python -m support.fuzz_ops SEED 1`` repeats it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.random_walks import times_further

ROOT = Path(__file__).parents[2]
MALLOC_CHECKS = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")  # glibc's checks of its heap, where it has them
SECONDS_EACH = 1.0  # of time for a call, on average; most take a thousandth


def run(first: int, count: int, heap_checks: bool = False) -> str:
    """What the program printed. Fails with the seed where it does not come to its end."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "2"}
    if heap_checks and MALLOC_CHECKS.exists():
        environment |= {"LD_PRELOAD": str(MALLOC_CHECKS), "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    program = [sys.executable, "-m", "support.fuzz_ops", str(first), str(count)]
    try:
        result = subprocess.run(
            program, env=environment, capture_output=True, text=True, timeout=60 + SECONDS_EACH * count
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"seed {last_seed(error.stdout.decode())} hangs") from None
    assert result.returncode == 0, (
        f"seed {last_seed(result.stdout)} ended the process with {result.returncode}:\n{result.stderr[-4000:]}"
    )
    return result.stdout.splitlines()[-1]


def last_seed(printed: str) -> str:
    return printed.splitlines()[-1] if printed else "of none"


@pytest.mark.parametrize("heap_checks", [False, True])
def test_hostile_calls(heap_checks):
    count = times_further(1000)
    outcomes = eval(run(count * heap_checks, count, heap_checks))
    print(outcomes)
    assert sum(outcomes.values()) == count
    assert all(outcomes[kind] > count / 100 for kind in ("done", "ValueError", "TypeError"))


# ---- kinds of it, by name ----

NO_PAGES = {
    "no heads": ((1, 0, 4, 16), (1, 0, 16, 4)),
    "no positions in a page": ((1, 1, 4, 0), (1, 1, 0, 4)),
    "no dimensions": ((1, 1, 0, 16), (1, 1, 16, 0)),
    "no pages": ((0, 1, 4, 16), (0, 1, 16, 4)),
}


@pytest.mark.parametrize("kind", NO_PAGES)
def test_pages_with_a_size_of_zero(kind):
    k, v = map(torch.zeros, NO_PAGES[kind])
    head_dim, table = k.size(2), torch.zeros(1, 1, dtype=torch.int32)
    rows = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="no size of 0"):
        torch.ops.layerskip.paged_attention(torch.zeros(1, 2, head_dim), k, v, table, rows, torch.tensor([0]), 0.5)


@pytest.mark.parametrize("size", [0, -1, -16, -31, -46, -(2**63), 2**31, 2**63 - 1])
def test_sizes_that_round_to_a_wildcard(size):
    """(n + 15) / 16 is -1 for n in -46..-31, which once meant "any"."""
    ops = torch.ops.layerskip
    x, norm, packed = torch.zeros(2, 4), torch.ones(4), torch.zeros(1, 4, 16)
    for call in (
        lambda: ops.linear(x, packed, None, size),
        lambda: ops.norm_gate_up_act(x, norm, packed, packed, size, 1e-5),
        lambda: ops.norm_head_argmax(x, norm, packed, size, 1e-5),
    ):
        with pytest.raises(ValueError, match=r"must have 1\.\.2147483647 output columns, asked for"):
            call()
    with pytest.raises(ValueError, match=r"hidden_size must be in 1\.\.2147483647"):
        ops.embed_tokens(torch.tensor([0]), packed, size, packed.dtype)


def test_what_is_never_refused_by_accident():
    """The program sees a call that ends the process."""
    code = "import os, sys; print(3, flush=True); print(4, flush=True); os.abort()"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/sh")
        patch.setattr(subprocess, "run", lambda program, run=subprocess.run, **kw: run(["python3", "-c", code], **kw))
        with pytest.raises(AssertionError, match="seed 4 ended the process with -6"):
            run(0, 10)
