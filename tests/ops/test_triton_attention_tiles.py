"""Attention of many rows on Triton: tiles of rows and query heads have the bits of the reference."""

import sys
from types import SimpleNamespace

import pytest
import torch

from layerskip_kernels import triton_ops
from layerskip_kernels.ops import reference
from layerskip_kernels.triton_ops import launch
from support.triton_arguments import assert_equal, attention_case, on_device, random

attention = sys.modules[triton_ops.paged_attention.__module__]
ROWS = 34


@pytest.fixture
def scratches(monkeypatch):
    """What attention is launched with from here on."""
    made = []

    def recorded(*args, make=attention.AttentionScratch):
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(attention, "AttentionScratch", recorded)
    return made


def check(dtype, heads, kv_heads, head_dim, page_size, start, window=0, cap=0.0, infinite=False):
    case = attention_case(dtype, ROWS, heads, kv_heads, head_dim, page_size, start)
    q = random(ROWS, heads, head_dim, dtype=dtype) * 3
    if infinite:  # in the V of one row, which those before must not see
        slot = int(case["slots"][20])
        case["v_pages"][slot // page_size, :, slot % page_size] = torch.inf
    # A second sequence on the same pages has one row, which comes first.
    table, starts = torch.cat([case["block_table"]] * 2), torch.tensor([0, 1, ROWS], dtype=torch.int32)
    args = (q, case["k_pages"], case["v_pages"], table, starts, case["positions"], 0.3, window, cap)
    expected = reference.paged_attention(*args)
    assert_equal(triton_ops.paged_attention(*on_device(*args)), expected)
    return expected


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "rows"), [(3, 1, 18, 16), (2, 2, 16, 64)])
def test_tiles(scratches, heads, kv_heads, head_dim, rows):
    """Across a border of chunks; query heads and dimensions that fill no tile."""
    check(torch.bfloat16, heads, kv_heads, head_dim, 7, 240)
    assert scratches[0].tiled and scratches[0].rows == rows


def test_windows_and_caps(scratches):
    check(torch.float16, 2, 1, 20, 16, 240, window=9, cap=2.0)
    assert scratches[0].tiled


def test_rows_do_not_see_what_comes_later(scratches):
    expected = check(torch.bfloat16, 1, 1, 16, 16, 0, infinite=True)
    assert scratches[0].tiled
    assert expected[:20].isfinite().all() and not expected[20:].isfinite().any()


@pytest.mark.parametrize(("enough", "most"), [(1, 1), (1000, 1)], ids=["in turn", "one"])
def test_programs_with_several_chunks(scratches, monkeypatch, enough, most):
    monkeypatch.setattr(attention, "ENOUGH_PROGRAMS", enough)
    monkeypatch.setattr(attention, "MOST_PROGRAMS", most)
    check(torch.bfloat16, 4, 1, 16, 16, 240)
    assert scratches[0].tiled and scratches[0].in_turn == (enough == 1)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 16), (torch.bfloat16, 10)])
def test_what_has_no_tiles(scratches, dtype, head_dim):
    """Numbers whose products are rounded, and heads of fewer numbers than a dot takes."""
    check(dtype, 1, 1, head_dim, 16, 0)
    assert not scratches[0].tiled


def test_no_tiles_where_dots_are_no_chains(scratches, monkeypatch):
    monkeypatch.setattr(attention, "wide_dots_are_chains", lambda: False)
    check(torch.bfloat16, 1, 1, 16, 16, 0)
    assert not scratches[0].tiled


@pytest.mark.parametrize(("backend", "arch", "chains"), [("cuda", 80, True), ("cuda", 90, True), ("cuda", 100, False),
                                                         ("hip", "gfx942", False)])  # fmt: skip
def test_which_gpus_have_no_chains(monkeypatch, backend, arch, chains):
    target = SimpleNamespace(backend=backend, arch=arch)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: target))
    monkeypatch.setattr(launch.triton.runtime, "driver", driver)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert launch.wide_dots_are_chains() == chains
