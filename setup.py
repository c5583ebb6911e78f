"""Only what pyproject.toml cannot say: the two C++ extensions.

``_kv`` is the page pool (pybind11, no torch); ``_C`` registers the CPU ops with TORCH_LIBRARY. One source,
``csrc/cpu/kernels.inl``, is compiled once per instruction set (``csrc/cpu/isa_*.cpp``) and chosen at run
time, so no flag here depends on the machine that builds. ``MAX_JOBS`` bounds the parallel compilers.
"""

from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# -ffp-contract=off: the contract rounds every product and every sum, unless a line says fma.
CXX_FLAGS = [
    *("-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-c++20-extensions", "-Wno-unused-parameter"),
]
INCLUDE = str(Path(__file__).parent.resolve() / "csrc" / "include")

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
    cmdclass={"build_ext": BuildExtension},
)
