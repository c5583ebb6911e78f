"""The first fused op of a layer: q, and k and v in their pages."""

import pytest
import torch
from conftest import threads

from layerskip_kernels import reference

cpu = torch.ops.layerskip
HIDDEN, HEADS, KV_HEADS = 50, 6, 2


def arguments(dtype, rows, head_dim=18, page_size=7, bias=True, pack=reference.pack_weight):
    generator = torch.Generator().manual_seed(rows)

    def random(*shape):
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    sizes = [HEADS * head_dim, KV_HEADS * head_dim, KV_HEADS * head_dim]
    cos, sin = reference.rope_tables(torch.rand(head_dim // 2, generator=generator), 64)
    pages = -(-64 // page_size)
    slots = torch.randperm(pages * page_size, generator=generator)[:rows]
    slots[rows // 2] = -1 if rows > 1 else slots[0]
    return dict(
        hidden=random(rows, HIDDEN),
        norm_weight=random(HIDDEN),
        **{name: pack(random(size, HIDDEN)) for name, size in zip(("wq", "wk", "wv"), sizes, strict=True)},
        qkv_bias=random(sum(sizes)) if bias else None,
        cos=cos,
        sin=sin,
        positions=torch.arange(rows) * 3,
        slot_mapping=slots,
        k_pages=torch.zeros(pages, KV_HEADS, head_dim, page_size, dtype=dtype),
        v_pages=torch.zeros(pages, KV_HEADS, page_size, head_dim, dtype=dtype),
        num_heads=HEADS,
        eps=1e-5,
    )


def assert_same(rows, **options):
    expected, got = arguments(rows=rows, **options), arguments(rows=rows, pack=cpu.pack_weight, **options)
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
    args = arguments(torch.bfloat16, rows=4, pack=cpu.pack_weight)
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
    args = arguments(torch.bfloat16, rows=4, pack=cpu.pack_weight)
    args[name][0] = value
    with pytest.raises(ValueError, match=message):
        cpu.norm_qkv_rope_append(**args)
    assert not args["k_pages"].any() and not args["v_pages"].any()
