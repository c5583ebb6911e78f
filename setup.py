"""Only what pyproject.toml cannot say: the C++ extensions.

``_kv`` is the page pool (pybind11, no torch); ``_C`` registers the CPU ops with TORCH_LIBRARY. One source,
``csrc/cpu/kernels.inl``, is compiled once per instruction set (``csrc/cpu/isa_*.cpp``) and chosen at run
time, so no flag here depends on the machine that builds. ``MAX_JOBS`` bounds the parallel compilers.

``_cuda`` holds the cache ops for CUDA tensors. Whether it is built is decided by ``LAYERSKIP_CUDA``: 0 no, 1 yes,
auto (the default) where nvcc and a CUDA build of torch are there. ``TORCH_CUDA_ARCH_LIST`` names the architectures
as it does for torch's own extensions. No GPU is asked for, then or when the extension is imported.
"""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup

ROOT = Path(__file__).parent.resolve()
INCLUDE = str(ROOT / "csrc" / "include")  # absolute: ninja compiles from inside the build folder

# ---- CUDA: decided before torch's build helpers are imported, which read CUDA_HOME once ----

ARCHITECTURES = "8.0;9.0;10.0+PTX"  # A100, H100, B200, and what comes after
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
OLDEST_TORCH_FOR_CUDA = (2, 11)  # c10::Stream::native_handle; older ones were not tried

# --fmad=false: as -ffp-contract=off below. The visibility keeps the kernels' host stubs out of the symbol table.
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false", "-Xcompiler=-Wall,-Wextra,-fvisibility=hidden,-fPIC"]


def cuda_home() -> Path | None:
    """The toolkit that nvcc belongs to: CUDA_HOME, the PATH, or the package nvidia-cuda-nvcc beside this Python."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return Path(os.environ[name]) if (Path(os.environ[name]) / "bin" / "nvcc").exists() else None
    if nvcc := shutil.which("nvcc"):
        # The nvcc on the PATH may be a link or a script elsewhere; it says itself where it lives.
        said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        if top := re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE):
            return Path(top[1].strip()).resolve()
    packages = [Path(folder) / "nvidia" for folder in [*sys.path, *site.getsitepackages()] if folder]
    found = [nvcc.parents[1] for package in packages for nvcc in sorted(package.glob("cu*/bin/nvcc"))]
    return found[-1] if found else None


def nvcc_release(home: Path) -> tuple[int, int]:
    """The release of a toolkit, (13, 0) for instance."""
    said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", said)
    if not match:
        raise RuntimeError(f"{home}/bin/nvcc --version does not name a release: {said!r}")
    return int(match[1]), int(match[2])


def missing_for_cuda(
    torch_release: tuple[int, ...], torch_cuda: str | None, nvcc: tuple[int, int] | None
) -> str | None:
    """Why the CUDA part can't be built, and what to do; None where it can."""
    if torch_cuda is None:
        return "this torch is a build without CUDA; install one with CUDA first"
    if torch_release < OLDEST_TORCH_FOR_CUDA:
        return f"torch is older than {'.'.join(map(str, OLDEST_TORCH_FOR_CUDA))}; install a newer one"
    wanted = int(torch_cuda.split(".")[0])
    if nvcc is None:
        return (
            f"no nvcc on the PATH or in CUDA_HOME; install the CUDA {wanted} toolkit, or pip install nvidia-cuda-nvcc"
        )
    if nvcc[0] != wanted:
        return f"nvcc is of CUDA {nvcc[0]}.{nvcc[1]}, torch of CUDA {torch_cuda}; install the toolkit of CUDA {wanted}"
    return None


def builds_cuda(setting: str, missing: str | None) -> bool:
    """Whether ``_cuda`` is built, by LAYERSKIP_CUDA and what is missing. Raises where it can't be but was asked for."""
    if setting not in ("0", "1", "auto"):
        raise ValueError(f"LAYERSKIP_CUDA must be 0, 1 or auto, got {setting!r}")
    if setting == "1" and missing:
        raise RuntimeError(f"LAYERSKIP_CUDA=1, but {missing}. LAYERSKIP_CUDA=0 builds without the CUDA part.")
    return setting != "0" and not missing


def architectures(nvcc: tuple[int, int]) -> str:
    """The default of TORCH_CUDA_ARCH_LIST: as many of ARCHITECTURES as this nvcc knows."""
    return ARCHITECTURES if nvcc >= (12, 8) else "8.0;9.0+PTX"


def prepare_cuda() -> Path | None:
    """The toolkit to build ``_cuda`` with, put where torch looks for it; None: don't build it."""
    setting, home = os.environ.get("LAYERSKIP_CUDA", "auto"), cuda_home()
    nvcc = nvcc_release(home) if home else None
    missing = missing_for_cuda(TORCH, torch.version.cuda, nvcc)
    if not builds_cuda(setting, missing):
        print(f"layerskip_kernels: built without CUDA: {missing or 'LAYERSKIP_CUDA=0'}")
        return None
    assert home and nvcc
    os.environ["CUDA_HOME"] = str(home)
    # Without it torch asks the GPUs that it sees, and fails where there is none.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(nvcc))
    print(f"layerskip_kernels: built with CUDA, {home}, for {os.environ['TORCH_CUDA_ARCH_LIST']}")
    return home


CUDA = prepare_cuda() if __name__ == "__main__" else None

from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths  # noqa: E402

# -ffp-contract=off: the contract rounds every product and every sum, unless a line says fma.
CXX_FLAGS = [
    "-std=c++20" if TORCH >= (2, 14) else "-std=c++17",  # our lines are C++17; torch's headers are C++20 since 2.14
    *("-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # as system headers, so that warnings are about our own lines
    *(f"-isystem{path}" for path in [*include_paths(), pybind11.get_include()]),
]


def missing_for_cpp(compiler: str, include: Path, search: str) -> str | None:
    """What the C++ part lacks, and what to do; None where it has all. ``search``: folders, as in CPATH."""
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} is not on the PATH. Install g++ (sudo apt-get install g++), or set CXX"
    if not any((Path(folder) / "Python.h").is_file() for folder in [str(include), *search.split(":")] if folder):
        return f"no Python.h in {include}. Install Python's headers (sudo apt-get install python3-dev), or use make"
    return None


class BuildOnce(BuildExtension):
    """One folder of objects for every way to build (-e, wheel, ...): ninja compiles only what has changed."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "objects")

    def build_extensions(self) -> None:
        compiler = os.environ.get("CXX", "g++").split()[0]
        search = os.pathsep.join(os.environ.get(name, "") for name in ("CPATH", "CPLUS_INCLUDE_PATH"))
        if missing := missing_for_cpp(compiler, Path(sysconfig.get_path("include")), search):
            raise SystemExit(f"layerskip_kernels cannot be built: {missing}")
        with shown_progress(Path(self.build_temp), sum(len(extension.sources) for extension in self.extensions)):
            super().build_extensions()


@contextmanager
def shown_progress(folder: Path, total: int) -> Iterator[None]:
    """A line for each object that is compiled: to stderr, or to the terminal that pip hides it from."""
    try:
        stream = sys.stderr if sys.stderr.isatty() else open("/dev/tty", "w")
    except OSError:
        stream = sys.stderr
    start, done = time.time() - 0.05, threading.Event()  # file times are coarser than the clock

    def watch() -> None:
        seen = 0
        ended = False
        while not ended:
            ended = done.wait(1.0)
            compiled = sum(path.stat().st_mtime >= start for path in folder.rglob("*.o"))
            if compiled > seen:
                seen = compiled
                print(f"layerskip_kernels: {seen} of up to {total} objects compiled", file=stream, flush=True)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def cuda_extension(home: Path) -> Extension:
    return CppExtension(
        "layerskip_kernels._cuda",
        ["csrc/cuda/cache_ops.cpp", "csrc/cuda/cache_kernels.cu"],
        include_dirs=[INCLUDE],
        depends=glob("csrc/**/*.h", recursive=True),
        extra_compile_args={"cxx": [*CXX_FLAGS, f"-isystem{home}/include"], "nvcc": NVCC_FLAGS},
        # The runtime as a part of the extension: it takes torch's streams as they are, and asks for the driver at
        # the first launch only. Toolkits keep it in lib64, the packages of PyPI in lib.
        extra_link_args=[f"-L{home}/lib64", f"-L{home}/lib", "-lcudart_static", "-ldl", "-lrt", "-lpthread"],
    )


EXTENSIONS = [
    Extension(
        "layerskip_kernels._kv",
        sorted(glob("csrc/kv/*.cpp")),
        include_dirs=[INCLUDE, pybind11.get_include()],
        depends=[*glob("csrc/kv/*.h"), "csrc/include/fork_safe_mutex.h"],
        define_macros=[("LAYERSKIP_TORCH", '"{}.{}"'.format(*TORCH))],
        extra_compile_args=CXX_FLAGS,
        language="c++",
    ),
    CppExtension(
        "layerskip_kernels._C",
        ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        include_dirs=[INCLUDE],
        depends=glob("csrc/**/*.[hi]*", recursive=True),
        extra_compile_args=[*CXX_FLAGS, "-fopenmp"],
        extra_link_args=["-fopenmp"],
    ),
    *([cuda_extension(CUDA)] if CUDA else []),
]

if __name__ == "__main__":  # benchmarks/compile_only/cuda_check.py and the tests read this file as well
    setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildOnce})
