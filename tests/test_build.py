"""What is said where the package cannot be built or was built for another torch; oldest versions."""

import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from layerskip_kernels import _kv
from layerskip_kernels.ops.extension import check_torch

ROOT = Path(__file__).parents[1]
setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")  # its functions; it builds nothing under this name
oldest = runpy.run_path(str(ROOT / "tests" / "oldest.py"), run_name="oldest")["oldest"]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


# ---- which torch ----


def test_this_build_is_for_the_torch_that_runs():
    assert _kv.TORCH == ".".join(torch.__version__.split(".")[:2])


@pytest.mark.parametrize("running", ["2.13.0", "2.13.1+cpu", "2.13.0a0+git12ab"])
def test_a_patch_release_is_the_same_torch(running):
    check_torch("2.13", running)


@pytest.mark.parametrize("running", ["2.14.0", "2.1.3", "3.13.0", "2.12.1+cu130"])
def test_another_torch_is_refused_with_what_to_do(running):
    with pytest.raises(
        ImportError, match=r"is for torch 2\.13, but torch .* is installed: install torch 2\.13, or build"
    ):
        check_torch("2.13", running)


def test_the_command_says_it_in_one_line():
    code = (
        "import sys, torch\ntorch.__version__ = '2.99.0'\nfrom layerskip_kernels.cli.main import main\n"
        "sys.exit(main(['generate', 'a', '--model', 'layerskip-tiny-code']))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr.startswith("layerskip: error: this build of layerskip_kernels is for torch ")
    assert ran.stderr.count("\n") == 1


# ---- building ----


def test_what_the_cpp_part_lacks_is_named(tmp_path):
    (tmp_path / "Python.h").touch()
    missing = setup["missing_for_cpp"]
    assert missing(sys.executable, tmp_path, "") is None
    assert missing(sys.executable, tmp_path / "none", f":{tmp_path}:") is None
    assert re.search("apt-get install g\\+\\+.*CXX", missing("no-such-compiler", tmp_path, ""))
    assert re.search("apt-get install python3-dev", missing(sys.executable, tmp_path / "none", str(tmp_path / "other")))


def test_a_build_shows_each_object_once(tmp_path, capsys, monkeypatch):
    def no_terminal(*_: object) -> None:
        raise OSError

    monkeypatch.setitem(setup["shown_progress"].__wrapped__.__globals__, "open", no_terminal)
    (tmp_path / "old.o").touch()
    os.utime(tmp_path / "old.o", (1, 1))
    with setup["shown_progress"](tmp_path, 2):
        (tmp_path / "csrc").mkdir()
        (tmp_path / "csrc/a.o").touch()
        time.sleep(1.5)
        (tmp_path / "b.o").touch()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"layerskip_kernels: {n} of up to 2 objects compiled" for n in (1, 2)]


# ---- dependencies ----


def test_what_only_builds_need_is_no_dependency():
    dependencies = re.search(r"^dependencies = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL)[1]
    names = re.findall(r'"([a-z0-9_]+)', dependencies)
    assert {"torch", "tokenizers", "numpy", "gguf", "triton"} <= set(names)
    assert {"ninja", "pybind11", "setuptools", "transformers"}.isdisjoint(names)


def test_every_dependency_has_a_lower_bound_and_the_oldest_are_those():
    requirements = oldest(PYPROJECT)
    dependencies = re.search(r"^dependencies = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL)[1]
    bounded = re.findall(r'"([^"]+)"', dependencies)
    assert all(">=" in requirement for requirement in bounded)
    assert {requirement.replace(">=", "==") for requirement in bounded} <= set(requirements)
    assert "transformers==4.57.1" in requirements and "pytest" in requirements
