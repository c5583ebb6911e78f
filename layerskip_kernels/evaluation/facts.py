"""What a figure depends on beside the code: the machine, its load, the versions and the day."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from layerskip_kernels import machine

__all__ = ["caption", "load_of", "machine_facts", "made_with"]

PACKAGES = ("torch", "transformers", "numpy", "layerskip_kernels")


def machine_facts() -> dict[str, Any]:
    """What a figure depends on beside the code. Nothing that names the machine or its owner."""
    cpus = machine.usable_cpus()
    return {
        "cpu": machine.cpu_model(),
        "cores": machine.physical_cores(cpus),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.ops.layerskip.instruction_set(),
        "last_level_cache_bytes": machine.last_level_cache_bytes(cpus),
        "load_average": round(os.getloadavg()[0], 2),  # of the last minute, when this was asked
        "python": platform.python_version(),
        "date": _today(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def load_of(facts: dict[str, Any]) -> str:
    """How busy the machine was, in words: before the measurement, and by other processes during it if that is known."""
    others = facts.get("other_cpus")
    meanwhile = "" if others is None else f", other processes used {others:.1f} CPUs meanwhile"
    return f"load before {facts['load_average']:.1f}{meanwhile}"


def caption(facts: dict[str, Any]) -> str:
    """A line below a picture: what it was made with, when and on what; with the load where times were measured."""
    made = f"layerskip_kernels {facts['versions']['layerskip_kernels']}, {facts['date']}"
    parts = [made, f"{facts['cpu']}, {facts['threads']} threads"]
    return "; ".join([*parts, load_of(facts)] if "other_cpus" in facts else parts)


def made_with() -> str:
    """The part of a caption that holds without a measurement."""
    return f"layerskip_kernels {_version('layerskip_kernels')}, {_today()}"


def _today() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")
