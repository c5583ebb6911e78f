"""Rule 2: the sum of squares over 256 strided lanes."""

import pytest
import torch

from layerskip_kernels.ops import reference

cpu = torch.ops.layerskip


@pytest.mark.parametrize("size", [1, 50, 255, 256, 257, 576, 1000])
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_same_bits(dtype, isa, rows, size):
    generator = torch.Generator().manual_seed(size)
    x = (torch.randn(rows, size, generator=generator) * 3).to(dtype)
    weight = torch.randn(size, generator=generator).to(dtype)
    expected = reference.rms_norm(x, weight, 1e-5)
    assert torch.equal(cpu.rms_norm(x, weight, 1e-5), expected)
    assert torch.equal(torch.cat([reference.rms_norm(row[None], weight, 1e-5) for row in x]), expected)


def test_value_is_the_norm():
    x, weight = torch.randn(4, 576, generator=torch.Generator().manual_seed(0)).split([3, 1])
    true = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert (reference.rms_norm(x, weight, 1e-5) - true).abs().max() < 1e-5


def test_another_summation_order_differs():
    x, weight = torch.randn(64, 576, generator=torch.Generator().manual_seed(0)), torch.ones(576)
    inv = reference.inverse_sqrt(reference.fold((x * x).T) / 576 + 1e-5)
    assert not torch.equal(reference.rms_norm(x, weight, 1e-5), x * inv[:, None])
