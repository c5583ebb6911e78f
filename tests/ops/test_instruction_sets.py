"""LAYERSKIP_ISA and ``set_instruction_set`` choose the kernels; what this machine lacks is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.models import ALL_INSTRUCTION_SETS, INSTRUCTION_SETS

ROOT = Path(__file__).parents[2]
SAYS = "import torch, layerskip_kernels._C; print(torch.ops.layerskip.instruction_set())"
MISSING = [name for name in ALL_INSTRUCTION_SETS if name not in INSTRUCTION_SETS]


def chosen(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "LAYERSKIP_ISA"}
    return subprocess.run(
        [sys.executable, "-c", SAYS],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_the_environment_chooses(name):
    result = chosen({"LAYERSKIP_ISA": name})
    assert (result.returncode, result.stdout.strip()) == (0, name), result.stderr


def test_the_best_is_the_default():
    assert chosen({}).stdout.strip() == INSTRUCTION_SETS[-1]


@pytest.mark.parametrize("name", [*MISSING, "sse9", ""])
def test_what_this_machine_lacks_is_refused(name):
    result = chosen({"LAYERSKIP_ISA": name})
    assert result.returncode != 0
    assert f"LAYERSKIP_ISA is '{name}', which this machine lacks" in result.stderr
    with pytest.raises(ValueError, match="is not supported here; supported: "):
        torch.ops.layerskip.set_instruction_set(name)


def test_all_sets_are_known_by_name():
    assert [name for name in ALL_INSTRUCTION_SETS if name in INSTRUCTION_SETS] == INSTRUCTION_SETS
