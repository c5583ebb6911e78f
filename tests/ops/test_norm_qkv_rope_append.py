"""The first fused op of a layer: q, and k and v in their pages."""

import pytest
import torch

from layerskip_kernels.ops import reference
from support.models import threads
from support.op_arguments import qkv_arguments

cpu = torch.ops.layerskip
HIDDEN, HEADS, KV_HEADS = 50, 6, 2


def assert_same(rows, **options):
    expected, got = qkv_arguments(rows=rows, **options), qkv_arguments(rows=rows, pack=cpu.pack_weight, **options)
    assert torch.equal(cpu.norm_qkv_rope_append(**got), reference.norm_qkv_rope_append(**expected))
    assert torch.equal(got["k_pages"], expected["k_pages"])
    assert torch.equal(got["v_pages"], expected["v_pages"])
    assert expected["k_pages"].any(), "the reference must have written something"


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 17])
def test_same_bits_at_any_number_of_rows(dtype, isa, rows):
    assert_same(rows, dtype=dtype)


@pytest.mark.parametrize("head_dim", [16, 18, 64, 128])
@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
def test_same_bits_at_any_head_and_page_size(dtype, head_dim, page_size):
    assert_same(5, dtype=dtype, head_dim=head_dim, page_size=page_size, bias=False)


def test_threads_do_not_matter(dtype):
    with threads(1):
        assert_same(5, dtype=dtype)
    with threads(2):
        assert_same(5, dtype=dtype)


def test_skipped_slots_write_nothing():
    args = qkv_arguments(torch.bfloat16, rows=4, pack=cpu.pack_weight)
    args["slot_mapping"].fill_(-1)
    cpu.norm_qkv_rope_append(**args)
    assert not args["k_pages"].any() and not args["v_pages"].any()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("slot_mapping", 10_000, r"slot_mapping\[0\] is 10000"),
        ("slot_mapping", -2, r"slot_mapping\[0\] is -2"),
        ("positions", 64, r"positions\[0\] is 64"),
        ("positions", -1, r"positions\[0\] is -1"),
    ],
)
def test_stray_indices_are_refused(name, value, message):
    args = qkv_arguments(torch.bfloat16, rows=4, pack=cpu.pack_weight)
    args[name][0] = value
    with pytest.raises(ValueError, match=message):
        cpu.norm_qkv_rope_append(**args)
    assert not args["k_pages"].any() and not args["v_pages"].any()
