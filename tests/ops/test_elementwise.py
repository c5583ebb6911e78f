"""Rule 5 (exp, log, silu, gelu, tanh) and 1 / sqrt: against float64, and the same bits on every backend."""

import numpy as np
import pytest
import torch

from layerskip_kernels.ops import reference

cpu = torch.ops.layerskip


def floats_of_all_sizes() -> torch.Tensor:
    """Two million bit patterns spread over all finite floats, and the dense range that matters."""
    bits = np.random.default_rng(0).integers(0, 2**32, size=1_000_000, dtype=np.uint32)
    dense = np.random.default_rng(1).uniform(-110.0, 110.0, size=1_000_000).astype(np.float32)
    values = np.concatenate([bits.view(np.float32), dense])
    edges = np.float32([0.0, -0.0, 1.0, -1.0, 88.722839, 88.72284, -87.33655, -103.97, -103.98, 2.0**-149, 2.0**-126])
    return torch.from_numpy(np.concatenate([values[np.isfinite(values)], edges]))


def ulps(got: torch.Tensor, true: np.ndarray) -> float:
    """The largest distance in units of the last place that fp32 has at the true value."""
    _, exponent = np.frexp(true)
    unit = np.ldexp(1.0, np.maximum(exponent - 24, -149))
    limit = float(np.finfo(np.float32).max)
    overflows = np.abs(true) >= limit
    assert np.all(np.abs(got.numpy()[overflows]) >= limit), "a result beyond fp32 must be infinite"
    return float(np.max(np.abs(got.double().numpy()[~overflows] - true[~overflows]) / unit[~overflows]))


def true_silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def true_gelu(x: np.ndarray) -> np.ndarray:
    """Gelu's tanh form, its tanh written with exp: 1 + tanh(y) would lose all digits below -9."""
    wide = np.clip(x, -40, 40).astype(np.longdouble)
    z = 2 * np.sqrt(np.longdouble(2 / np.pi)) * (wide + np.longdouble(0.044715) * wide**3)
    return np.where(x > 40, x, (wide / (1 + np.exp(-z))).astype(np.float64))


@pytest.mark.parametrize(
    ("name", "true"), [("exp", np.exp), ("log", np.log), ("silu", true_silu), ("gelu", true_gelu), ("tanh", np.tanh)]
)
def test_within_two_ulp_of_float64(name, true):
    x = floats_of_all_sizes()
    x = x[x > 0] if name == "log" else x
    with np.errstate(over="ignore"):
        assert ulps(getattr(reference, name)(x), true(x.double().numpy())) <= 2.0


@pytest.mark.parametrize("name", ["exp", "log", "silu", "gelu", "tanh", "inverse_sqrt"])
def test_same_bits_as_the_reference(name, isa):
    x = floats_of_all_sizes()
    x = torch.cat([x.abs() if name in ("log", "inverse_sqrt") else x, torch.tensor([torch.inf])])
    assert torch.equal(getattr(cpu, name)(x), getattr(reference, name)(x))


@pytest.mark.parametrize("name", ["exp", "log", "silu", "gelu", "tanh", "inverse_sqrt"])
def test_nan_stays_nan(name, isa):
    x = torch.full((33,), torch.nan)
    assert getattr(cpu, name)(x).isnan().all()
    assert getattr(reference, name)(x).isnan().all()


def test_logarithm_of_what_has_none(isa):
    x = torch.tensor([0.0, -1.0, -torch.inf])
    for log in (cpu.log, reference.log):
        assert log(x)[0] == -torch.inf
        assert log(x)[1:].isnan().all()


def test_square_root_and_division_are_correctly_rounded(isa):
    x = floats_of_all_sizes().abs()
    x = x[x > 0]
    true = (np.float32(1.0) / np.sqrt(x.numpy())).astype(np.float32)  # numpy's are the processor's IEEE operations
    assert torch.equal(cpu.inverse_sqrt(x), torch.from_numpy(true))
    assert torch.equal(reference.inverse_sqrt(x), torch.from_numpy(true))


def test_flush_to_zero_is_not_inherited(isa):
    x = torch.tensor([-100.0, -95.0, -88.0] * 20)
    expected = reference.exp(x)
    assert (expected > 0).all() and (expected < 2.0**-126).all(), "the test needs subnormal results"
    try:
        assert torch.set_flush_denormal(True)
        assert torch.equal(cpu.exp(x).view(torch.int32), expected.view(torch.int32))
    finally:
        torch.set_flush_denormal(False)
