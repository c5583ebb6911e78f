"""Rule 1: the dot product, at any number of rows, threads and lanes."""

import pytest
import torch

from layerskip_kernels.ops import reference
from support.models import threads

cpu = torch.ops.layerskip


def operands(dtype, rows, n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((rows, k), (n, k), (n,)))
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("rows", range(1, 18))
def test_same_bits_at_any_number_of_rows(dtype, isa, rows):
    x, weight, bias = operands(dtype, rows, n=77, k=100)
    expected = reference.linear(x, weight, bias, 77)
    assert torch.equal(cpu.linear(x, cpu.pack_weight(weight), bias, 77), expected)
    alone = torch.cat([cpu.linear(row[None], cpu.pack_weight(weight), bias, 77) for row in x])
    assert torch.equal(alone, expected)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 130])
@pytest.mark.parametrize("k", [1, 7, 8, 9, 63, 64, 65, 576])
def test_same_bits_at_odd_sizes(dtype, isa, n, k):
    x, weight, _ = operands(dtype, rows=3, n=n, k=k)
    assert torch.equal(cpu.linear(x, cpu.pack_weight(weight), None, n), reference.linear(x, weight, None, n))


@pytest.mark.parametrize("rows", [1, 6, 12, 13, 40, 100])
@pytest.mark.parametrize("k", [16, 48, 128, 576])
def test_same_bits_at_round_sizes(dtype, isa, rows, k):
    """Where bf16 products are added in pairs."""
    x, weight, bias = operands(dtype, rows, n=77, k=k)
    assert torch.equal(cpu.linear(x, cpu.pack_weight(weight), bias, 77), reference.linear(x, weight, bias, 77))


@pytest.mark.parametrize("exponents", [(-60, -60), (-120, 0), (0, -120), (-20, -20)], ids=str)
@pytest.mark.parametrize("tiny_rows", [1, 13])
def test_subnormal_sums_are_kept(isa, exponents, tiny_rows):
    """Normal operands and products whose difference is subnormal: vdpbf16ps alone would make it zero."""
    x, weight, _ = operands(torch.bfloat16, rows=13, n=77, k=64)
    x[-tiny_rows:] = 2.0 ** exponents[0]
    weight[:40, 0::2], weight[:40, 1::2] = 2.0 ** exponents[1], -(1 + 2**-7) * 2.0 ** exponents[1]
    expected = reference.dot(x, weight)
    assert expected[-1, 0] != 0
    assert torch.equal(cpu.linear(x, cpu.pack_weight(weight), None, 77), reference.linear(x, weight, None, 77))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_same_bits_at_any_number_of_threads(dtype, count):
    x, weight, bias = operands(dtype, rows=5, n=77, k=100)
    with threads(count):
        assert torch.equal(cpu.linear(x, cpu.pack_weight(weight), bias, 77), reference.linear(x, weight, bias, 77))


def test_another_summation_order_differs(dtype):
    """The negative control: were the order not fixed, the tests above would notice."""
    x, weight, _ = operands(torch.float32, rows=3, n=77, k=576)
    x, weight = x.to(dtype).float(), weight.to(dtype).float()
    exact_order = reference.dot(x, weight)
    one_fold = reference.fold((x[:, None, :] * weight[None]).permute(2, 0, 1))
    reversed_k = reference.dot(x.flip(1), weight.flip(1))
    assert not torch.equal(exact_order, one_fold)
    assert not torch.equal(exact_order, reversed_k)


def test_products_of_16_bit_operands_are_exact():
    """Why a fused multiply-add may stand for two roundings there, and may not for fp32."""
    for dtype in (torch.bfloat16, torch.float16):
        x, weight, _ = operands(dtype, rows=1, n=1, k=100_000)
        assert torch.equal((x.float() * weight.float()).double(), x.double() * weight.double())
    x, weight, _ = operands(torch.float32, rows=1, n=1, k=100_000)
    assert not torch.equal((x * weight).double(), x.double() * weight.double())


def test_value_is_the_dot_product():
    x, weight, bias = operands(torch.float32, rows=4, n=33, k=200)
    true = x.double() @ weight.double().T + bias.double()
    assert (reference.linear(x, weight, bias, 33) - true).abs().max() < 1e-4


def test_selected_rows_are_those_of_the_weight(dtype):
    x, weight, _ = operands(dtype, rows=3, n=77, k=50)
    rows = torch.tensor([76, 0, 0, 15, 16, 40, *range(20)])
    got = cpu.linear(x, cpu.select_rows(cpu.pack_weight(weight), rows), None, len(rows))
    assert torch.equal(got, reference.linear(x, reference.select_rows(weight, rows), None, len(rows)))


def test_bad_shapes_are_refused():
    x, weight, bias = operands(torch.bfloat16, rows=2, n=20, k=30)
    packed = cpu.pack_weight(weight)
    with pytest.raises(ValueError, match="weight must have the shape"):
        cpu.linear(x, packed, bias, 33)
    with pytest.raises(TypeError, match="weight must be"):
        cpu.linear(x.float(), packed, None, 20)
    with pytest.raises(ValueError, match="contiguous"):
        cpu.linear(x[:, ::2], packed, None, 20)
