"""What this machine lets the process use: cores, caches, OpenMP runtimes."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "cpu_model",
    "cpu_quota",
    "has_bf16_units",
    "keep_freed_memory",
    "last_level_cache_bytes",
    "openmp_runtimes",
    "physical_cores",
    "usable_cores",
    "usable_cpus",
]

CPUS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
OPENMP_LIBRARY = re.compile(r"\S*/lib(?:gomp|iomp5|omp)[-.][^/\s]*")


def usable_cores() -> int:
    """How many threads compute best: physical cores this process may run on, bounded by its cgroup's CPU quota."""
    cores, quota = physical_cores(usable_cpus()), cpu_quota()
    # Rounded down: threads that wait for each other lose more by being throttled than a part of a core gives.
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def usable_cpus() -> set[int]:
    """The logical CPUs that the process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def physical_cores(cpus: set[int], root: Path = CPUS) -> int:
    """The number of physical cores behind some logical CPUs."""
    return len({_read(root / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus})


def cpu_quota(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """The CPUs' worth of time that control groups (v1 or v2) grant this process; None: no bound."""
    quotas = [_quota_of(folder) for folder in _cgroup_folders(root, membership)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _cgroup_folders(root: Path, membership: Path) -> Iterator[Path]:
    """The process's own group and all above it; in a container, often only the topmost exists."""
    for line in (_read(membership) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "cpu" if controllers else root
        folder = mount / path.lstrip("/")
        yield from (folder, *(parent for parent in folder.parents if parent.is_relative_to(mount)))


def _quota_of(folder: Path) -> float | None:
    contents = _read(folder / "cpu.max")
    if contents is None:
        contents = f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
    quota, _, period = contents.partition(" ")
    # No bound is "max" in v2 and "-1" in v1; a folder without the files reads "None".
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def cpu_model() -> str:
    """The processor's name."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")) or "", re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def has_bf16_units(cpuinfo: str | None = None) -> bool:
    """Whether the processor multiplies bf16 itself (by ``/proc/cpuinfo``, or its text); True where it is not known."""
    text = _read(Path("/proc/cpuinfo")) or "" if cpuinfo is None else cpuinfo
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return flags is None or not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[1].split())


def last_level_cache_bytes(cpus: set[int], root: Path = CPUS) -> int | None:
    """All last-level caches of some logical CPUs together, in bytes; None where the system does not say."""
    sizes: dict[str, int] = {}
    for cpu in cpus:
        levels = {_read(path / "level"): path for path in (root / f"cpu{cpu}/cache").glob("index*")}
        last = levels.get(max((level for level in levels if level), default=None))
        size = re.fullmatch(r"(\d+)K", _read(last / "size") or "") if last else None
        if last and size:
            sizes[_read(last / "shared_cpu_list") or str(cpu)] = int(size[1]) << 10
    return sum(sizes.values()) or None


def openmp_runtimes(maps: str | None = None) -> list[str]:
    """Paths of the OpenMP libraries loaded into this process, from ``/proc/self/maps`` (or its text).

    There should be one: two runtimes each keep a team of threads, and the teams fight for the cores.
    """
    maps = _read(Path("/proc/self/maps")) or "" if maps is None else maps
    return sorted(set(OPENMP_LIBRARY.findall(maps)))


def _read(path: Path) -> str | None:
    """A small file's text; None where it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed, for this process's whole life, instead of giving it back to the kernel.

    For programs that ask for as much again at once, as a step of training does: page faults took up to a quarter of it.
    Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)
