"""out_residual, norm_gate_up_act and down_residual: the rest of a layer."""

import pytest
import torch

from layerskip_kernels.ops import reference
from support.models import threads

cpu = torch.ops.layerskip
HIDDEN, INNER = 50, 75


def random(dtype, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.mark.parametrize("rows", [1, 2, 6, 7, 17])
@pytest.mark.parametrize("bias", [False, True])
def test_out_residual(dtype, isa, rows, bias):
    x, weight, residual = random(dtype, rows, INNER), random(dtype, HIDDEN, INNER), random(dtype, rows, HIDDEN)
    b = random(dtype, HIDDEN) if bias else None
    got = cpu.out_residual(x, cpu.pack_weight(weight), b, residual)
    assert torch.equal(got, reference.out_residual(x, weight, b, residual))


@pytest.mark.parametrize("rows", [1, 2, 6, 7, 17])
def test_down_residual(dtype, isa, rows):
    x, weight, residual = random(dtype, rows, INNER), random(dtype, HIDDEN, INNER), random(dtype, rows, HIDDEN)
    got = cpu.down_residual(x, cpu.pack_weight(weight), residual)
    assert torch.equal(got, reference.down_residual(x, weight, residual))


@pytest.mark.parametrize("rows", [1, 2, 6, 7, 17])
@pytest.mark.parametrize("count", [1, 2])
def test_norm_gate_up_act(dtype, isa, rows, count):
    x, norm = random(dtype, rows, HIDDEN), random(dtype, HIDDEN)
    gate, up = random(dtype, INNER, HIDDEN), random(dtype, INNER, HIDDEN, seed=1)
    with threads(count):
        got = cpu.norm_gate_up_act(x, norm, cpu.pack_weight(gate), cpu.pack_weight(up), INNER, 1e-5)
    assert torch.equal(got, reference.norm_gate_up_act(x, norm, gate, up, INNER, 1e-5))


def test_value_of_the_activation():
    x, norm = random(torch.float32, 3, HIDDEN), random(torch.float32, HIDDEN)
    gate, up = random(torch.float32, INNER, HIDDEN), random(torch.float32, INNER, HIDDEN, seed=1)
    y = torch.nn.functional.rms_norm(x.double(), (HIDDEN,), norm.double(), 1e-5)
    true = torch.nn.functional.silu(y @ gate.double().T) * (y @ up.double().T)
    assert (reference.norm_gate_up_act(x, norm, gate, up, INNER, 1e-5) - true).abs().max() < 1e-3
