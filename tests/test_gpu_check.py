"""`make gpu-check` without a GPU: every stage runs at tiny sizes, leaves its results, and fails where it should."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
STAGES = ROOT / "benchmarks" / "gpu_stages"
CHECK = ROOT / "benchmarks" / "gpu_check.py"
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def rehearse(out, *options):
    command = [sys.executable, "-W", "ignore", CHECK, "--rehearse", "--out", out, *options]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


def load(name, monkeypatch):
    """A stage's module; ``stage`` reads from the command line whether it is a rehearsal."""
    monkeypatch.syspath_prepend(str(STAGES))
    monkeypatch.setattr(sys, "argv", ["pytest", "--rehearse"])
    spec = importlib.util.spec_from_file_location(f"gpu_stage_{name}", STAGES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def rehearsed(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu_check")
    done = rehearse(out)
    assert done.returncode == 0, done.stderr[-3000:]
    return {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}


@pytest.mark.parametrize("file", sorted(STAGES.glob("*.py")), ids=lambda file: file.stem)
def test_a_stage_sets_its_paths_before_it_imports_what_they_lead_to(file):
    """The package need not be installed, and Triton reads once whether it interprets."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    lines = {node.module: node.lineno for node in body if isinstance(node, ast.ImportFrom)}
    lines |= {alias.name: node.lineno for node in body if isinstance(node, ast.Import) for alias in node.names}
    others = {name: line for name, line in lines.items() if name.split(".")[0] not in sys.stdlib_module_names}
    assert min(others, key=others.__getitem__, default="stage") == "stage"


def test_every_stage_leaves_what_it_found(rehearsed):
    stages = {"first_tokens", "bits", "timings", "arithmetic", "sanitizers", "tuning"}
    assert set(rehearsed) == stages | {"summary", "tuned"}
    assert {rehearsed[name]["outcome"] for name in stages} == {"passed"}
    assert set(rehearsed["summary"]) == stages


def test_what_the_stages_show(rehearsed):
    assert rehearsed["first_tokens"]["tiny"]["accepted"] > 0
    assert (rehearsed["bits"]["passed"], rehearsed["bits"]["failed"]) == (2, 0)
    steps = {row["step"] for row in rehearsed["timings"]["steps"]}
    assert steps == {"decode", "draft 1 tokens, exit 1", "prompt of 2 tokens"}
    assert len(rehearsed["timings"]["generation"]) == 4
    assert rehearsed["arithmetic"]["replays"] == {"replays": 2, "captured steps": 0, "with other bits": 0}
    # The interpreter's dots are numpy's, in another order: the comparison sees that.
    assert all(found["other bits"] for found in rehearsed["arithmetic"]["float_dots"].values())
    assert not any(found["other numbers"] for found in rehearsed["arithmetic"]["integer_dots"].values())


def test_nothing_is_timed_where_bits_differed(tmp_path):
    (tmp_path / "bits.json").write_text(json.dumps({"outcome": "failed", "bits_differ": ["a test"]}))
    done = rehearse(tmp_path, "--stage", "timings")
    assert done.returncode == 1
    assert "not run, bits found other bits" in done.stderr and not (tmp_path / "timings.json").exists()


def test_a_stage_that_is_stopped_leaves_what_it_had(tmp_path):
    done = rehearse(tmp_path, "--stage", "first_tokens", "--seconds", "-14")  # a second for Python to start in
    assert done.returncode == 1
    assert json.loads((tmp_path / "summary.json").read_text())["first_tokens"]["status"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run([sys.executable, CHECK, "--out", tmp_path], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2 and "gpu_check needs a GPU" in done.stderr


TESTS = """
import os, pytest
def test_passes(): pass
def test_fails(): assert False
@pytest.mark.skip
def test_is_skipped(): pass
def test_crashes(): os.abort()
"""


def test_what_becomes_of_tests_in_a_process(tmp_path, monkeypatch):
    """Tests that were all skipped are not fine, though pytest's exit status is 0; a crash names its signal."""
    bits = load("bits", monkeypatch)
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)

    def counts(*names):
        result = bits.run_tests([f"{file}::test_{name}" for name in names], seconds=60)
        return (result.passed, result.failed, result.skipped, result.signal, result.fine), result.said

    assert counts("passes", "fails", "is_skipped")[0] == (1, 1, 1, 0, False)
    assert counts("is_skipped")[0] == (0, 0, 1, 0, False)
    crashed, said = counts("crashes")
    assert crashed == (0, 0, 0, 6, False) and "test_some.py" in said  # Python's own backtrace
    assert counts("passes")[0] == (1, 0, 0, 0, True)
    late = bits.run_tests([f"{file}::test_passes"], seconds=0.2)
    assert (late.stopped, late.failed, late.signal, late.fine) == (True, 0, 0, False)


def test_tests_share_a_process_by_function(monkeypatch):
    bits = load("bits", monkeypatch)
    ids = [f"tests/a.py::test_{name}[{i}]" for name, count in (("few", 3), ("many", 25)) for i in range(count)]
    groups = bits.by_function(ids)
    assert {name: len(tests) for name, tests in groups.items()} == {
        "tests/a.py::test_few": 3, "tests/a.py::test_many": 12, "tests/a.py::test_many 12": 12,
        "tests/a.py::test_many 24": 1,
    }  # fmt: skip
    assert [test for tests in groups.values() for test in tests] == ids
    assert bits.is_refusal("tests/ops/test_copy_pages.py::test_wrong_tensors_are_refused[cpu-x]")
    assert not bits.is_refusal("tests/ops/test_copy_pages.py::test_pages_are_copied_whole[bf16-cpu-1]")


def test_the_fastest_configuration(monkeypatch):
    tuning = load("tuning", monkeypatch)
    monkeypatch.setattr(tuning, "ROWS", (1, 8))
    times = {("linear", columns, rows, ahead): ms for columns, rows, ahead, ms in [
        (16, 1, 2, 5.0), (16, 1, 4, 3.0), (16, 8, 2, 6.0), (16, 8, 4, 9.0),
        (32, 1, 2, 1.0), (32, 1, 4, 2.0), (32, 8, 2, 8.5), (32, 8, 4, 9.5),
    ]}  # fmt: skip
    assert tuning.fastest(times, "linear") == {"columns": 16, "ahead": {"1": 4, "2": 4, "4": 4, "8": 2}}
    del times["linear", 16, 8, 2], times["linear", 16, 8, 4]
    assert tuning.fastest(times, "linear") == {"columns": 32, "ahead": {"1": 2, "2": 4, "4": 4, "8": 2}}
    assert tuning.fastest(times, "out_residual") is None


def test_whether_it_pays_that_kernels_begin_early(monkeypatch):
    pays = load("tuning", monkeypatch).pays
    assert pays({"decode": {"off": 2.0, "on": 1.9}, "verify 8 rows": {"off": 3.0, "on": 3.01}})
    assert not pays({"decode": {"off": 2.0, "on": 1.99}, "verify 8 rows": {"off": 3.0, "on": 3.0}})
    assert not pays({"decode": {"off": 2.0, "on": 1.9}, "verify 8 rows": {"off": 3.0, "on": 3.2}})


def test_the_package_reads_what_was_tuned(tmp_path, monkeypatch):
    from layerskip_kernels.triton_ops import launch, tuned

    file = tmp_path / "tuned.json"
    ahead = {"1": 16, "2": 1, "4": 2, "8": 4}
    said = {"A GPU": {"linear": {"columns": 16, "ahead": ahead, "prompt": [32, 64, 4], "dependent": True}}}
    said["a third"] = {"out_residual": {"columns": 16, "ahead": ahead, "split": True}}
    file.write_text(json.dumps(said))
    monkeypatch.setenv("LAYERSKIP_TRITON_TUNED", str(file))
    weight = torch.empty(2, 32, 8, 16, 8, dtype=torch.bfloat16)
    assert launch.streaming("linear", 1, 1, 2048, weight)["C"] == 32  # interpreted: no GPU's
    for gpu, columns, ahead, prompt in (("A GPU", 16, 16, 32), ("another", 32, 4, 64)):
        monkeypatch.setattr(tuned, "_gpu", lambda gpu=gpu: gpu)
        assert launch.streaming("linear", 1, 1, 2048, weight)["C"] == launch.columns_of("linear", weight) == columns
        assert tuned.config_of("linear").ahead[1] == ahead
        assert launch.streaming("linear", 40, 1, 2048, weight)["ROWS"] == prompt
        assert tuned.config_of("linear").dependent == (gpu == "A GPU")
        assert tuned.config_of("out_residual") == tuned.DEFAULTS["out_residual"]
    for gpu, split in (("another", False), ("a third", True)):
        monkeypatch.setattr(tuned, "_gpu", lambda gpu=gpu: gpu)
        assert [launch.is_split(rows, weight) for rows in (1, 31, 32)] == [split, split, False]
        assert not launch.is_split(1, torch.empty(2, 8, 512, dtype=torch.uint8))


@pytest.mark.parametrize(("backend", "arch", "depends"), [("cuda", 90, True), ("cuda", 80, False), ("hip", 0, False)])
def test_kernels_of_few_rows_alone_begin_early(monkeypatch, backend, arch, depends):
    """On GPUs that can, where tuned.json says so: not in the interpreter, nor prompts."""
    from layerskip_kernels.triton_ops import launch, tuned

    def dependent(rows, weight, **tuned_so):
        monkeypatch.setattr(launch, "config_of", lambda op: replace(tuned.DEFAULTS[op], **tuned_so))
        options = launch.streaming("out_residual", rows, 1, 2048, weight)
        assert options["DEPENDENT"] == options.get("launch_pdl", False)
        return options["DEPENDENT"]

    weight, quantised = torch.empty(2, 32, 8, 16, 8, dtype=torch.bfloat16), torch.empty(2, 8, 512, dtype=torch.uint8)
    assert not dependent(1, weight, dependent=True)
    target = SimpleNamespace(backend=backend, arch=arch, warp_size=32)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: target))
    monkeypatch.setattr(launch.triton.runtime, "driver", driver)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for weights in (weight, quantised):
        assert [dependent(rows, weights, dependent=True) for rows in (1, 8, 31, 32)] == [depends] * 3 + [False]
        assert not dependent(1, weights)


@pytest.mark.parametrize(
    "said",
    [
        [], {"A GPU": []}, {"A GPU": {"linear": {"columns": 16}}}, {"A GPU": {"an op": {"columns": 16, "ahead": {}}}},
        {"A GPU": {"linear": {"columns": 24, "ahead": {"1": 1, "2": 1, "4": 1, "8": 1}}}},
        {"A GPU": {"linear": {"columns": 16, "ahead": {"1": 3, "2": 1, "4": 1, "8": 1}}}},
        {"A GPU": {"linear": {"columns": 16, "ahead": {"1": 1}}}},
        {"A GPU": {"linear": {"columns": 16, "ahead": dict.fromkeys("1248", 1), "prompt": [48, 64, 4]}}},
        {"A GPU": {"linear": {"columns": 16, "ahead": dict.fromkeys("1248", 1), "dependent": 1}}},
        {"A GPU": {"out_residual": {"columns": 16, "ahead": dict.fromkeys("1248", 1), "split": 1}}},
        {"A GPU": {"linear": {"columns": 16, "ahead": dict.fromkeys("1248", 1), "split": True}}},
        {"A GPU": {"norm_head_argmax": {"columns": 16, "ahead": dict.fromkeys("1248", 1), "prompt": [64, 64, 4]}}},
    ],
)  # fmt: skip
def test_what_is_no_configuration_is_refused(tmp_path, said):
    from layerskip_kernels.triton_ops import tuned

    file = tmp_path / "tuned.json"
    file.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"tuned.json holds no launch configurations"):
        tuned.read_tuned(file)
