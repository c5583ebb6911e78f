"""What the machine lets a process use, read from files that look like Linux's."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from layerskip_kernels import machine, ops
from layerskip_kernels.evaluation.bandwidth import measure_read_bandwidth, read_buffer
from support.models import threads


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"cpu.max": "400000 100000"}, "0::/seen/only/outside/the/container", 4.0),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 3.0),
        ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "300000 100000"}, "0::/a/b", 2.0),
        ({"other/cpu.max": "200000 100000"}, "0::/a", None),
        ({"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/a", 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/\n0::/", None),
        ({}, "", None),
    ],
)
def test_cpu_quota(tmp_path, files, membership, expected):
    for name, contents in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(contents + "\n")
    (tmp_path / "membership").write_text(membership + "\n")
    assert machine.cpu_quota(tmp_path, tmp_path / "membership") == expected


@pytest.mark.parametrize(("quota", "expected"), [(None, 3), (8.0, 3), (2.9, 2), (0.5, 1)])
def test_usable_cores_are_physical_and_within_the_quota(monkeypatch, quota, expected):
    monkeypatch.setattr(machine, "usable_cpus", lambda: {0, 1, 2})
    monkeypatch.setattr(machine, "physical_cores", len)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.usable_cores() == expected


@pytest.mark.parametrize(
    ("quota", "chosen", "environment", "expected"),
    [(1.0, None, None, 1), (2.5, None, None, 2), (None, None, None, 4), (1.0, 3, None, 3), (1.0, None, "4", 4)],
)
def test_the_library_follows_the_quota_where_nobody_chose(monkeypatch, quota, chosen, environment, expected):
    monkeypatch.setattr(machine, "usable_cpus", lambda: set(range(4)))
    monkeypatch.setattr(machine, "physical_cores", len)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    with threads(chosen or 4):
        ops._follow_quota()
        assert torch.get_num_threads() == expected


def test_importing_the_library_follows_the_quota():
    code = (
        "import torch; from layerskip_kernels import machine; before = torch.get_num_threads();"
        "machine.usable_cpus = lambda: set(range(before)); machine.cpu_quota = lambda: 1.0;"
        "from layerskip_kernels import generate; print(before, torch.get_num_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert out.split()[1] == "1"


def test_physical_cores_counts_siblings_once(tmp_path):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(siblings)
    assert machine.physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert machine.physical_cores({0, 2}, tmp_path) == 1
    assert machine.physical_cores({7, 8}, tmp_path) == 2  # the system does not say


def test_last_level_caches_are_counted_once(tmp_path):
    for cpu, shared in enumerate(["0-1", "0-1", "2"]):
        for level, size, cpus in ((2, "1024K", str(cpu)), (3, "32768K", shared)):
            index = tmp_path / f"cpu{cpu}/cache/index{level}"
            index.mkdir(parents=True)
            for name, value in (("level", str(level)), ("size", size), ("shared_cpu_list", cpus)):
                (index / name).write_text(value)
    assert machine.last_level_cache_bytes({0, 1, 2}, tmp_path) == 2 * (32 << 20)
    assert machine.last_level_cache_bytes({0, 1}, tmp_path) == 32 << 20
    assert machine.last_level_cache_bytes({9}, tmp_path) is None


def test_read_bandwidth_is_of_the_order_of_memory():
    assert 0.1 < measure_read_bandwidth(0.1, read_buffer(64 << 20)) < 10_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is meant")
@pytest.mark.parametrize("keep", [False, True])
def test_freed_memory_is_kept_where_wanted(keep):
    program = f"""
from pathlib import Path
from layerskip_kernels.machine import keep_freed_memory
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * {os.sysconf("SC_PAGE_SIZE")}
if {keep}:
    keep_freed_memory()
before = resident()
block = bytearray(256 << 20)
del block
print(resident() - before)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (int(ran.stdout) > 200 << 20) == keep
