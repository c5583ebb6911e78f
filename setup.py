"""Only what pyproject.toml cannot say: the two C++ extensions.

``_kv`` is the page pool (pybind11, no torch); ``_C`` registers the CPU ops with TORCH_LIBRARY. One source,
``csrc/cpu/kernels.inl``, is compiled once per instruction set (``csrc/cpu/isa_*.cpp``) and chosen at run
time, so no flag here depends on the machine that builds. ``MAX_JOBS`` bounds the parallel compilers.
"""

from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

# -ffp-contract=off: the contract rounds every product and every sum, unless a line says fma.
CXX_FLAGS = [
    *("-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # as system headers, so that warnings are about our own lines
    *(f"-isystem{path}" for path in [*include_paths(), pybind11.get_include()]),
]
ROOT = Path(__file__).parent.resolve()
INCLUDE = str(ROOT / "csrc" / "include")  # absolute: ninja compiles from inside the build folder


class BuildOnce(BuildExtension):
    """One folder of objects for every way to build (-e, wheel, ...): ninja compiles only what has changed."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "objects")


setup(
    ext_modules=[
        Extension(
            "layerskip_kernels._kv",
            sorted(glob("csrc/kv/*.cpp")),
            include_dirs=[INCLUDE, pybind11.get_include()],
            depends=glob("csrc/kv/*.h"),
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
    ],
    cmdclass={"build_ext": BuildOnce},
)
