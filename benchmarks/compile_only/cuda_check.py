"""`make cuda-check`: compiles and links csrc/cuda for the architectures below, with any torch and without a GPU.

Every warning is an error, and so is a spill. The library is linked as setup.py links it and then loaded, which
registers the ops. Needs nvcc (setup.py says where it is looked for) and Python.h on CPATH or beside the interpreter.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("80", "90", "100")  # A100, H100, B200
OPS = ("copy_pages", "gather_kv", "scatter_kv")

ENTRY = re.compile(r"Compiling entry function '(?P<kernel>\S+)' for 'sm_(?P<architecture>\w+)'")
STACK = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill")
USED = re.compile(r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?")

LOAD = """
import sys, torch
schemas, library, *ops = sys.argv[1:]
torch.ops.load_library(schemas)
torch.ops.load_library(library)
missing = [op for op in ops if not torch._C._dispatch_has_kernel_for_dispatch_key(f"layerskip::{op}", "CUDA")]
sys.exit(f"not registered for CUDA: {missing}" if missing else 0)
"""


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel on one architecture; bytes are per thread, shared ones per block."""

    name: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.spill_stores or self.spill_loads)


def parse_ptxas(log: str) -> list[Kernel]:
    """The kernels in the output of ``ptxas -v``. Raises ValueError where one is not described to the end."""
    kernels = []
    for text in re.split(r"(?=Compiling entry function)", log)[1:]:
        entry, stack, used = ENTRY.search(text), STACK.search(text), USED.search(text)
        if not (entry and stack and used):
            raise ValueError(f"cannot read what ptxas says: {text!r}")
        numbers = (int(value) for value in stack.groups())
        kernels.append(
            Kernel(entry["kernel"], entry["architecture"], int(used["registers"]), *numbers, int(used["shared"] or 0))
        )
    return kernels


def run(command: list[str | Path]) -> str:
    """Runs a compiler; returns its messages. Raises RuntimeError with them where it fails."""
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def compile_kernels(nvcc: Path, flags: list[str], source: Path, target: Path) -> list[Kernel]:
    """Compiles a .cu file for all architectures, warnings being errors."""
    code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    strict = ["-Werror", "all-warnings", "-Xcompiler=-Werror", "-Xptxas=-v"]
    return parse_ptxas(run([nvcc, *flags, *code, *strict, "-Icsrc/include", "-c", source, "-o", target]))


def compile_binding(flags: list[str], home: Path, target: Path) -> None:
    python = sysconfig.get_path("include")
    includes = ["-Icsrc/include", "-isystem", home / "include", "-isystem", python]
    run(["g++", *flags, "-Werror", "-fPIC", *includes, "-c", "csrc/cuda/cache_ops.cpp", "-o", target])


def link(home: Path, torch_library: Path, objects: list[Path], target: Path) -> None:
    torch = [f"-L{torch_library}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    runtime = [f"-L{home}/lib64", f"-L{home}/lib", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    run(["g++", "-shared", *objects, *torch, *runtime, "-o", target])


def short_name(kernel: str) -> str:
    """Op and element of a mangled name: CopyPages Word<16>, say."""
    names = re.findall(r"\d+(CopyPages|MoveKv)", kernel)
    word, move = re.search(r"WordILi(\d+)E", kernel), re.search(r"MoveKvI([tj])Lb([01])E", kernel)
    if move:
        return f"MoveKv {'out' if move[2] == '1' else 'in'} {2 if move[1] == 't' else 4} bytes"
    return f"{names[0] if names else kernel} {f'{word[1]} bytes' if word else ''}".strip()


def check(build: Path) -> list[Kernel]:
    """Compiles, links and loads everything into ``build``; returns the kernels. Raises RuntimeError."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    home = setup["cuda_home"]()
    if home is None:
        raise RuntimeError("no nvcc on the PATH or in CUDA_HOME; pip install nvidia-cuda-nvcc, or a CUDA toolkit")
    build.mkdir(parents=True, exist_ok=True)
    objects, library = [build / "cache_kernels.o", build / "cache_ops.o"], build / "_cuda.so"
    kernels = compile_kernels(home / "bin/nvcc", setup["NVCC_FLAGS"], Path("csrc/cuda/cache_kernels.cu"), objects[0])
    compile_binding(setup["CXX_FLAGS"], home, objects[1])
    link(home, Path(setup["torch"].__file__).parent / "lib", objects, library)
    schemas = ROOT / "layerskip_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    run([sys.executable, "-c", LOAD, schemas, library, *OPS])
    return kernels


def main() -> int:
    try:
        kernels = check(ROOT / "build" / "cuda")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for kernel in kernels:
        spills = f"{kernel.spill_stores + kernel.spill_loads} bytes spilled, {kernel.stack} of stack"
        print(f"sm_{kernel.architecture:<5}{short_name(kernel.name):<20}{kernel.registers:>4} registers, {spills}")
    spilled = [kernel for kernel in kernels if kernel.spills]
    print(f"{len(kernels)} kernels for {', '.join(f'sm_{number}' for number in ARCHITECTURES)}: no warnings, "
          f"{len(spilled)} with spills; linked and loaded")  # fmt: skip
    return int(bool(spilled))


if __name__ == "__main__":
    sys.exit(main())
