"""Memory in huge pages: it is aligned, asked for as such, and goes back to the system."""

import mmap
import re
import resource
from pathlib import Path

import pytest
import torch

from layerskip_kernels.ops.memory import Arena, empty

HUGE = 2 << 20
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def mapping_of(address: int) -> str:
    """What /proc/self/smaps says of the mapping that an address lies in."""
    text = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            if text:
                return text
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        if inside:
            text += line + "\n"
    return text


def test_freed_memory_goes_back_to_the_system():
    """A deleter that does nothing would leave 64 MiB at every turn."""
    empty(64 << 20, dtype=torch.uint8).fill_(1)
    before = resident_bytes()
    for value in range(30):
        empty(64 << 20, dtype=torch.uint8).fill_(value)
    assert resident_bytes() - before < 128 << 20


def test_address_space_goes_back_too():
    """More in turn than a process may have at a time."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (2 << 30), limits[1]))
    try:
        for _ in range(20):
            assert empty(1 << 30, dtype=torch.uint8).numel() == 1 << 30
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_it_begins_at_a_huge_page():
    for count in (HUGE, 3 * HUGE + 1, HUGE // 8):
        assert empty(count, dtype=torch.uint8).data_ptr() % HUGE == 0


@pytest.mark.skipif(
    not THP.exists() or "[never]" in THP.read_text(),
    reason="this system has no transparent huge pages, or has them switched off",
)
def test_huge_pages_are_asked_for():
    """VmFlags hg: MADV_HUGEPAGE was given; without it a quarter of the bandwidth goes into page walks."""
    memory = empty(8 * HUGE, dtype=torch.uint8).fill_(1)
    flags = re.search(r"^VmFlags:(.*)$", mapping_of(memory.data_ptr() + 4 * HUGE), re.MULTILINE)
    assert flags is not None and "hg" in flags[1].split()
    plain = torch.frombuffer(mmap.mmap(-1, 8 * HUGE), dtype=torch.uint8).fill_(1)  # not torch's: it may reuse ours
    flags = re.search(r"^VmFlags:(.*)$", mapping_of(plain.data_ptr() + 4 * HUGE), re.MULTILINE)
    assert flags is not None and "hg" not in flags[1].split(), "this test cannot tell"


def test_untouched_memory_takes_none():
    before = resident_bytes()
    memory = empty(1 << 30, dtype=torch.uint8)
    memory[:HUGE].fill_(1)
    assert resident_bytes() - before < 100 << 20


@pytest.mark.parametrize("count", [-1, 1 << 62])
def test_absurd_sizes_are_refused(count):
    with pytest.raises(ValueError, match=r"num_bytes must be in 0\.\."):
        torch.ops.layerskip.empty_huge(count)


def test_an_arena_keeps_what_is_placed_in_it():
    arena = Arena()
    tensors = [torch.randn(size) for size in (3, 1000, 17)]
    placed = [arena.place(tensor) for tensor in tensors]
    assert all(map(torch.equal, placed, tensors))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in placed)
