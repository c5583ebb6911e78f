"""Slots out of a block table, guarded: a bad column or page is no slot."""

import pytest
import torch
from cache_case import on_each_device

from layerskip_kernels import cache_ops

pytestmark = on_each_device


def make(device, table, positions, starts, num_pages=50, page_size=7):
    error = cache_ops.new_error(device)
    slots = cache_ops.make_slot_mapping(
        torch.tensor(table, dtype=torch.int32, device=device),
        torch.tensor(positions, dtype=torch.int64, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
        num_pages,
        page_size,
        error,
    )
    return slots.tolist(), error


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [1, 9, 600])
def test_as_plain_indexing(device, seed, rows):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(0, 50, (4, 3), generator=generator)
    starts = torch.cat([torch.tensor([0]), torch.randint(0, rows + 1, (3,), generator=generator).sort()[0],
                        torch.tensor([rows])])  # fmt: skip
    positions = torch.randint(-1, 21, (rows,), generator=generator)
    sequence = torch.bucketize(torch.arange(rows), starts, right=True) - 1
    expected = table[sequence, positions.clamp(min=0) // 7] * 7 + positions % 7
    expected[positions < 0] = -1
    got, error = make(device, table.tolist(), positions.tolist(), starts.tolist())
    assert got == expected.tolist()
    cache_ops.check_error(error)


@pytest.mark.parametrize(
    ("position", "page", "starts", "message"),
    [
        (14, 3, [0, 1, 3], "position 1 .make_slot_mapping: the row.* beyond its block table"),
        (-2, 3, [0, 1, 3], "position 1 .* beyond its block table"),
        (2**62, 3, [0, 1, 3], "position 1 .* beyond its block table"),
        (8, 50, [0, 1, 3], "entry 1 of .* names a page outside"),
        (8, -1, [0, 1, 3], "entry 1 of .* names a page outside"),
        (8, 3, [0, 0, 1], "position 1 .* beyond its block table"),
    ],
    ids=["column", "negative", "huge", "page", "no page", "no sequence"],
)
def test_stray_rows_get_no_slot(device, position, page, starts, message):
    got, error = make(device, [[4, 5], [6, page]], [3, position, 2], starts)
    assert got[1] == -1 and -1 not in got[:1]
    with pytest.raises(ValueError, match=message):
        cache_ops.check_error(error)


def test_rows_and_sizes_must_fit(device):
    with pytest.raises(ValueError, match=r"query_start_loc must have the shape \[3\]"):
        make(device, [[1], [2]], [0], [0, 1])
    with pytest.raises(ValueError, match="page_size must be at least 1"):
        make(device, [[1]], [0], [0, 1], page_size=0)
