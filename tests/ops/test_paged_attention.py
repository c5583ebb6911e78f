"""Rule 4: attention over pages, in chunks of 256 absolute positions."""

import pytest
import torch

from layerskip_kernels import ops
from layerskip_kernels.ops import reference
from support.models import threads
from support.op_arguments import attention_arguments

cpu = torch.ops.layerskip


def assert_same(dtype, contexts, rows, **options):
    args = attention_arguments(dtype, contexts, rows, **options)
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


@pytest.mark.parametrize("window", [1, 5, 16, 100, 256, 257, 600])
@pytest.mark.parametrize("page_size", [7, 16])
def test_a_window_ends_what_a_row_sees(dtype, isa, window, page_size):
    args = attention_arguments(dtype, [700, 30], [20, 30], page_size=page_size) | {"window": window}
    expected = reference.paged_attention(**args)
    assert torch.equal(cpu.paged_attention(**args), expected)
    without = reference.paged_attention(**args | {"window": 0})
    assert not torch.equal(expected[:20], without[:20])
    assert torch.equal(expected[20 : 20 + window], without[20 : 20 + window])


def test_a_window_is_what_a_mask_would_hide():
    args = attention_arguments(torch.float32, [300], [300]) | {"window": 40, "cap": 3.0}
    k = args["k_pages"][args["block_table"][0].long()].permute(0, 3, 1, 2).flatten(0, 1)[:300]
    v = args["v_pages"][args["block_table"][0].long()].transpose(1, 2).flatten(0, 1)[:300]
    k, v, q = (x.double().transpose(0, 1) for x in (k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), args["q"]))
    scores = 3.0 * torch.tanh(q @ k.transpose(1, 2) * args["scale"] / 3.0)
    distance = torch.arange(300)[:, None] - torch.arange(300)
    scores = scores.masked_fill((distance < 0) | (distance >= 40), -torch.inf)
    true = (scores.softmax(dim=2) @ v).transpose(0, 1).flatten(1)
    assert (cpu.paged_attention(**args) - true).abs().max() < 1e-5


@pytest.mark.parametrize("cap", [0.5, 50.0])
def test_capped_scores(dtype, isa, cap):
    args = attention_arguments(dtype, [300], [4]) | {"cap": cap}
    expected = reference.paged_attention(**args)
    assert torch.equal(cpu.paged_attention(**args), expected)
    assert not torch.equal(expected, reference.paged_attention(**args | {"cap": 0.0}))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_do_not_matter(dtype, count):
    with threads(count):
        assert_same(dtype, [600, 30, 300], [7, 1, 20])


def test_pages_do_not_matter(dtype):
    """The same keys and values on pages of another size, in another place."""
    outputs = []
    for page_size in (1, 7, 16, 64):
        args = attention_arguments(dtype, [300], [5], page_size=page_size)
        k, v = (torch.randn(300, 2, 18, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (1, 2))
        args["q"] = k[:5].repeat_interleave(3, dim=1)
        for position in range(300):
            page, offset = args["block_table"][0, position // page_size], position % page_size
            args["k_pages"][page, :, :, offset], args["v_pages"][page, :, offset, :] = k[position], v[position]
        outputs.append(cpu.paged_attention(**args))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_what_is_not_visible_is_not_read(dtype):
    args = attention_arguments(dtype, [300], [5])
    expected = cpu.paged_attention(**args)
    page, offset = args["block_table"][0, 18], 300 % 16  # positions 300.. of the last page
    args["k_pages"][page, :, :, offset:] = torch.nan
    args["v_pages"][page, :, offset:, :] = torch.inf
    assert torch.equal(cpu.paged_attention(**args), expected)


def test_value_is_attention():
    args = attention_arguments(torch.float32, [300], [300], page_size=300)
    k, v = args["k_pages"][0].transpose(1, 2), args["v_pages"][0]
    true = torch.nn.functional.scaled_dot_product_attention(
        args["q"].transpose(0, 1).double(), k.double(), v.double(), is_causal=True, scale=args["scale"], enable_gqa=True
    )
    assert (cpu.paged_attention(**args) - true.transpose(0, 1).reshape(300, -1)).abs().max() < 1e-5


def test_chunks_are_part_of_the_contract(monkeypatch):
    """The negative control: another chunk size gives other bits."""
    args = attention_arguments(torch.float32, [700], [3])
    expected = reference.paged_attention(**args)
    monkeypatch.setattr(reference.layers, "CHUNK", 128)
    assert not torch.equal(reference.paged_attention(**args), expected)


@pytest.mark.parametrize("entry", [-1, 10_000])
def test_a_bad_table_entry_is_refused(entry):
    args = attention_arguments(torch.bfloat16, [100], [2])
    args["block_table"][0, 3] = entry
    with pytest.raises(ValueError, match=r"block_table\[0\]\[3\]"):
        cpu.paged_attention(**args)


def test_a_short_table_is_refused():
    args = attention_arguments(torch.bfloat16, [100], [2])
    args["block_table"] = args["block_table"][:, :3].contiguous()
    with pytest.raises(ValueError, match="needs position 48"):
        cpu.paged_attention(**args)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_a_row_never_reads_what_comes_after_it(dtype, backend, bad):
    """Rows of one sequence share a pass: K and V of later rows that overflowed leave the earlier rows' bits alone."""
    op = ops.backend(backend).paged_attention
    arguments = attention_arguments(dtype, contexts=[11], rows=[4], head_dim=6, heads=2, kv_heads=1, page_size=4)
    expected = op(**arguments)
    assert expected.isfinite().all()
    page = arguments["block_table"][0, 10 // 4]
    arguments["v_pages"][page, :, 10 % 4] = bad
    arguments["k_pages"][page, :, :, 10 % 4] = bad
    found = op(**arguments)
    assert torch.equal(found[:3], expected[:3])
    assert not found[3].isfinite().any()
