"""The programs in examples/ run as they stand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from layerskip_kernels import GenerationConfig, Model, generate
from support.servers import serving

ROOT = Path(__file__).parents[1]


def run(name: str, *args: str) -> str:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *args], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_openai_client(tiny_code: Model):
    with serving(tiny_code) as server:
        out = run("openai_client.py", server.url, "def fibonacci(n):")
    [expected] = generate(tiny_code, ["def fibonacci(n):"], GenerationConfig(max_new_tokens=48))
    text, _, drafts = out.rstrip("\n").rpartition("\n")
    assert text == expected.text
    accepted, _, drafted, *_ = drafts.split()
    assert 0 < int(accepted) <= int(drafted)


def test_transformers_generate():
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("custom_generate needs Transformers 5")
    assert run("transformers_generate.py").endswith("the same tokens as Transformers'\n")


def test_ray_data(tmp_path: Path):
    pytest.importorskip("ray.data", reason="needs Ray Data (pip install 'ray[data]')")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def add("}\n{"prompt": "class A:"}\n')
    run("ray_data.py", str(tmp_path / "prompts.jsonl"), str(tmp_path / "out"), "1")
    lines = [json.loads(line) for path in (tmp_path / "out").glob("*.json") for line in path.read_text().splitlines()]
    assert sorted(line["prompt"] for line in lines) == ["class A:", "def add("] and all(
        line["generated"] for line in lines
    )
