"""The CUDA part without a GPU: when it is built, and that nvcc has nothing to say against it."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch

import layerskip_kernels.ops.cache_ops  # noqa: F401 - registers the ops

ROOT = Path(__file__).parents[2]
setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")  # its functions; it builds nothing under this name


def load_cuda_check():
    spec = importlib.util.spec_from_file_location("cuda_check", ROOT / "benchmarks" / "compile_only" / "cuda_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_check"] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


cuda_check = load_cuda_check()
HOME = setup["cuda_home"]()
needs_nvcc = pytest.mark.skipif(HOME is None, reason="needs nvcc: make cuda-check fetches it")

# ---- when it is built ----


@pytest.mark.parametrize(
    ("torch_release", "torch_cuda", "nvcc", "missing"),
    [
        ((2, 14), "13.0", (13, 0), None),
        ((2, 13), "12.8", (12, 4), None),
        ((2, 13), None, (13, 0), "without CUDA"),
        ((2, 10), "13.0", (13, 0), r"torch is older than 2\.11"),
        ((2, 13), "13.0", None, "install the CUDA 13 toolkit"),
        ((2, 13), "12.8", (13, 0), r"nvcc is of CUDA 13\.0, torch of CUDA 12\.8"),
    ],
)
def test_what_is_missing(torch_release, torch_cuda, nvcc, missing):
    said = setup["missing_for_cuda"](torch_release, torch_cuda, nvcc)
    if missing is None:
        assert said is None
    else:
        with pytest.raises(RuntimeError, match=missing):
            setup["builds_cuda"]("1", said)
        assert not setup["builds_cuda"]("auto", said)


def test_the_switch():
    assert [setup["builds_cuda"](setting, None) for setting in ("0", "1", "auto")] == [False, True, True]
    with pytest.raises(ValueError, match="LAYERSKIP_CUDA must be 0, 1 or auto, got 'yes'"):
        setup["builds_cuda"]("yes", None)


def fake_toolkit(path):
    (path / "bin").mkdir(parents=True)
    nvcc = path / "bin" / "nvcc"
    nvcc.write_text('#!/bin/sh\necho "#$ TOP=$(dirname "$0")/.." >&2\necho "release 12.6, V12.6.1"\n')
    nvcc.chmod(0o755)
    return path


def test_where_nvcc_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    packaged = fake_toolkit(tmp_path / "packages" / "nvidia" / "cu13")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages")])
    assert setup["cuda_home"]() == packaged
    on_path = fake_toolkit(tmp_path / "cuda")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text(f'#!/bin/sh\nexec {on_path}/bin/nvcc "$@"\n')  # a script, not a link
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin:/usr/bin")
    assert setup["cuda_home"]() == on_path
    assert setup["nvcc_release"](on_path) == (12, 6)
    named = fake_toolkit(tmp_path / "named")
    monkeypatch.setenv("CUDA_HOME", str(named))
    assert setup["cuda_home"]() == named
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert setup["cuda_home"]() is None


def test_default_architectures_are_those_nvcc_knows():
    assert setup["architectures"]((13, 0)) == "8.0;9.0;10.0+PTX"
    assert setup["architectures"]((12, 4)) == "8.0;9.0+PTX"


def test_ops_for_cuda_tensors_are_there_whatever_was_built():
    for op in ("copy_pages", "gather_kv", "scatter_kv"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"layerskip::{op}", "CUDA")


# ---- what nvcc says ----


@needs_nvcc
def test_everything_compiles_links_and_loads(tmp_path):
    kernels = cuda_check.check(tmp_path)
    assert {(kernel.architecture, cuda_check.short_name(kernel.name)) for kernel in kernels} == {
        (architecture, name)
        for architecture in ("80", "90", "100")
        for name in (
            "CopyPages 2 bytes", "CopyPages 16 bytes", "MoveKv out 2 bytes", "MoveKv out 4 bytes", "MoveKv in 2 bytes",
            "MoveKv in 4 bytes",
        )
    }  # fmt: skip
    assert not [kernel for kernel in kernels if kernel.spills]
    assert max(kernel.registers for kernel in kernels) <= 64  # four blocks of 256 threads per multiprocessor


SPILLS = """
__global__ void __launch_bounds__(1024) Spills(const float* x, float* y) {
  float held[200];
#pragma unroll
  for (int i = 0; i < 200; ++i) held[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 200; ++i) y[i * 1024 + threadIdx.x] = held[199 - i] * held[i];
}
"""


@needs_nvcc
def test_a_spill_is_seen(tmp_path):
    (tmp_path / "spills.cu").write_text(SPILLS)
    flags = setup["NVCC_FLAGS"]
    kernels = cuda_check.compile_kernels(HOME / "bin/nvcc", flags, tmp_path / "spills.cu", tmp_path / "spills.o")
    assert [kernel.architecture for kernel in kernels if kernel.spills] == ["80", "90", "100"]


@needs_nvcc
@pytest.mark.parametrize("line", ["int unused;", "unsigned u = 1; int i = x; if (i < u) return;"], ids=["nvcc", "g++"])
def test_a_warning_is_an_error(tmp_path, line):
    (tmp_path / "warns.cu").write_text(f"void Warns(int x) {{ {line} (void)x; }}\n")
    flags = setup["NVCC_FLAGS"]
    with pytest.raises(RuntimeError, match=r"unused|comparison"):
        cuda_check.compile_kernels(HOME / "bin/nvcc", flags, tmp_path / "warns.cu", tmp_path / "warns.o")


def test_unreadable_output_is_no_success():
    with pytest.raises(ValueError, match="cannot read what ptxas says"):
        cuda_check.parse_ptxas("ptxas info : Compiling entry function '_Z1k' for 'sm_90'\nptxas info : quiet\n")
