"""Rule 4: attention over pages, in chunks of 256 absolute positions."""

import pytest
import torch
from conftest import threads

from layerskip_kernels import reference

cpu = torch.ops.layerskip


def arguments(dtype, contexts, rows, head_dim=18, heads=6, kv_heads=2, page_size=16, seed=0):
    """Sequence b has contexts[b] positions; its last rows[b] are queries. Pages are dealt at random."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-context // page_size) for context in contexts]
    order = torch.randperm(sum(blocks), generator=generator).int()
    table = torch.full((len(contexts), max(blocks)), -1, dtype=torch.int32)
    for b, pages in enumerate(order.split(blocks)):
        table[b, : len(pages)] = pages
    shape = (sum(blocks), kv_heads, head_dim, page_size)
    return dict(
        q=torch.randn(sum(rows), heads, head_dim, generator=generator).to(dtype),
        k_pages=torch.randn(*shape, generator=generator).to(dtype),
        v_pages=torch.randn(*shape, generator=generator).transpose(2, 3).contiguous().to(dtype),
        block_table=table,
        query_start_loc=torch.tensor([0, *torch.tensor(rows).cumsum(0)], dtype=torch.int32),
        positions=torch.cat([torch.arange(c - r, c) for c, r in zip(contexts, rows, strict=True)]),
        scale=head_dim**-0.5,
    )


def assert_same(dtype, contexts, rows, **options):
    args = arguments(dtype, contexts, rows, **options)
    expected = reference.paged_attention(**args)
    assert expected.isfinite().all()
    assert torch.equal(cpu.paged_attention(**args), expected)


@pytest.mark.parametrize("rows", range(1, 18))
def test_same_bits_at_any_number_of_rows(dtype, isa, rows):
    assert_same(dtype, [40, 21], [rows, 3])


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize("context", [1, 255, 256, 257, 700])
def test_same_bits_across_chunks_and_pages(dtype, isa, context, page_size):
    assert_same(dtype, [context], [min(context, 4)], page_size=page_size)


@pytest.mark.parametrize("head_dim", [16, 18, 24, 64, 80, 128])
@pytest.mark.parametrize("heads_per_kv", [1, 2, 3, 4])
def test_same_bits_at_any_head(dtype, isa, head_dim, heads_per_kv):
    assert_same(dtype, [70], [3], head_dim=head_dim, heads=2 * heads_per_kv)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_do_not_matter(dtype, count):
    with threads(count):
        assert_same(dtype, [600, 30, 300], [7, 1, 20])


def test_pages_do_not_matter(dtype):
    """The same keys and values on pages of another size, in another place."""
    outputs = []
    for page_size in (1, 7, 16, 64):
        args = arguments(dtype, [300], [5], page_size=page_size)
        k, v = (torch.randn(300, 2, 18, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (1, 2))
        args["q"] = k[:5].repeat_interleave(3, dim=1)
        for position in range(300):
            page, offset = args["block_table"][0, position // page_size], position % page_size
            args["k_pages"][page, :, :, offset], args["v_pages"][page, :, offset, :] = k[position], v[position]
        outputs.append(cpu.paged_attention(**args))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_what_is_not_visible_is_not_read(dtype):
    args = arguments(dtype, [300], [5])
    expected = cpu.paged_attention(**args)
    page, offset = args["block_table"][0, 18], 300 % 16  # positions 300.. of the last page
    args["k_pages"][page, :, :, offset:] = torch.nan
    args["v_pages"][page, :, offset:, :] = torch.inf
    assert torch.equal(cpu.paged_attention(**args), expected)


def test_value_is_attention():
    args = arguments(torch.float32, [300], [300], page_size=300)
    k, v = args["k_pages"][0].transpose(1, 2), args["v_pages"][0]
    true = torch.nn.functional.scaled_dot_product_attention(
        args["q"].transpose(0, 1).double(), k.double(), v.double(), is_causal=True, scale=args["scale"], enable_gqa=True
    )
    assert (cpu.paged_attention(**args) - true.transpose(0, 1).reshape(300, -1)).abs().max() < 1e-5


def test_chunks_are_part_of_the_contract(monkeypatch):
    """The negative control: another chunk size gives other bits."""
    args = arguments(torch.float32, [700], [3])
    expected = reference.paged_attention(**args)
    monkeypatch.setattr(reference, "CHUNK", 128)
    assert not torch.equal(reference.paged_attention(**args), expected)


@pytest.mark.parametrize("entry", [-1, 10_000])
def test_a_bad_table_entry_is_refused(entry):
    args = arguments(torch.bfloat16, [100], [2])
    args["block_table"][0, 3] = entry
    with pytest.raises(ValueError, match=r"block_table\[0\]\[3\]"):
        cpu.paged_attention(**args)


def test_a_short_table_is_refused():
    args = arguments(torch.bfloat16, [100], [2])
    args["block_table"] = args["block_table"][:, :3].contiguous()
    with pytest.raises(ValueError, match="needs position 48"):
        cpu.paged_attention(**args)
