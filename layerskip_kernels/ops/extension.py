"""The C++ extension: importing this registers its ops, if it was built for the torch that runs."""

import torch

from layerskip_kernels._kv import TORCH

__all__ = ["check_torch"]

BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def check_torch(built_for: str, running: str) -> None:
    """Raises ImportError where a build for one release of torch, such as "2.13", runs with another: its C++ interface
    changes from release to release, and a wrong one may crash instead of failing."""
    if running.split(".")[:2] != built_for.split("."):
        raise ImportError(
            f"this build of layerskip_kernels is for torch {built_for}, but torch {running} is installed: install "
            f"torch {built_for}, or build again for this one, in a checkout: {BUILD}"
        )


check_torch(TORCH, torch.__version__)

try:
    import layerskip_kernels._C  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(f"the C++ extension of layerskip_kernels is not built; in a checkout: {BUILD}") from error
