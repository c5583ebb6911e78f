"""The bodies of the cache ops under the sanitizers: the lines that nvcc compiles for the device, built by g++."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_bodies_stay_inside_their_tensors(tmp_path):
    program = tmp_path / "cuda_cache_test"
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", *flags, ROOT / "tests/cpp/cuda_cache_test.cpp", "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
