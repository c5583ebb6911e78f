"""Arguments of Triton's ops, on the device that the kernels run on, and how results are compared."""

import torch

from layerskip_kernels import triton_ops
from layerskip_kernels.ops import reference
from support.models import GPU

DEVICE = "cuda" if GPU else "cpu"


def random(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)


def on_device(*values):
    return [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in values]


def packed(weight):
    return triton_ops.pack_weight(weight.to(DEVICE))


def assert_equal(got, expected):
    """NaN equals NaN; of them only the place counts."""
    got = got.cpu()
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


def attention_case(dtype, rows, heads, kv_heads, head_dim, page_size, start=0, hidden_size=37):
    """One sequence of ``rows`` rows from position ``start`` on; pages in random order, no memory that is no number."""
    generator = torch.Generator().manual_seed(rows)
    used = -(-(start + rows) // page_size)
    pages = torch.randperm(used + 3, generator=generator)
    positions = torch.arange(start, start + rows)
    slots = pages[positions // page_size] * page_size + positions % page_size
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    cos, sin = reference.rope_tables(torch.rand(head_dim // 2, generator=generator), start + rows + 1)
    return dict(
        hidden=random(rows, hidden_size, dtype=dtype), norm_weight=random(hidden_size, dtype=dtype) * 5,
        weights=[random(size, hidden_size, dtype=dtype, seed=i) * 6 for i, size in enumerate(sizes)],
        bias=random(sum(sizes), dtype=dtype), cos=cos, sin=sin, positions=positions, slots=slots,
        k_pages=random(used + 3, kv_heads, head_dim, page_size, dtype=dtype) * 4,
        v_pages=random(used + 3, kv_heads, page_size, head_dim, dtype=dtype) * 4,
        block_table=pages[None, :used].int(),
    )  # fmt: skip
