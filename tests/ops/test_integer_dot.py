"""Rule 8: quantised weights have the bits of their reference, on every instruction set, at any size and any bytes."""

import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from layerskip_kernels.ops import reference
from support.models import threads
from support.quantised_weights import BLOCKS, TYPES, activations, random_weight

cpu = torch.ops.layerskip


@pytest.mark.parametrize("name", BLOCKS)
def test_weights_stand_for_what_gguf_says(name):
    raw = random_weight(name, 5, 512)
    kind = GGMLQuantizationType[name.upper()]
    assert torch.equal(reference.dequantise(raw, 512), torch.from_numpy(dequantize(raw.flatten(1).numpy(), kind)))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("rows", [*range(1, 18), 40])
def test_same_bits_at_any_number_of_rows(integer_isa, name, rows):
    x, weight = activations(rows, 512), random_weight(name, 37, 512)
    bias = torch.randn(37).bfloat16()
    expected = reference.linear(x, weight, bias, 37)
    packed = cpu.pack_weight(weight)
    assert torch.equal(cpu.linear(x, packed, bias, 37), expected)
    if rows in (5, 17):
        assert torch.equal(torch.cat([cpu.linear(row[None], packed, bias, 37) for row in x]), expected)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("k", [1, 31, 32, 33, 100, 255, 256, 257, 288, 576, 2304])
def test_same_bits_at_odd_sizes(integer_isa, dtype, name, k):
    x, weight = activations(3, k, dtype), random_weight(name, 17, k)
    assert torch.equal(cpu.linear(x, cpu.pack_weight(weight), None, 17), reference.linear(x, weight, None, 17))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("scales", ["subnormal", "zero"])
def test_same_bits_with_scales_that_are_tiny(integer_isa, name, scales):
    x, weight = activations(3, 256, torch.float32), random_weight(name, 17, 256, scales=scales)
    assert torch.equal(cpu.linear(x, cpu.pack_weight(weight), None, 17), reference.linear(x, weight, None, 17))


@pytest.mark.parametrize("name", TYPES)
def test_same_bits_of_activations_of_any_size(integer_isa, name):
    x = torch.randn(9, 288)
    x[0], x[1], x[2] = 0.0, x[1] * 2.0**-130, x[2] * 1e30
    x[3, ::5], x[4, 40:] = -0.0, 0.0
    x[5, 7], x[6, 40], x[7, 285] = torch.inf, torch.nan, torch.finfo(torch.float32).max
    weight = random_weight(name, 17, 288)
    expected, got = reference.linear(x, weight, None, 17), cpu.linear(x, cpu.pack_weight(weight), None, 17)
    assert torch.equal(got.isnan(), expected.isnan()) and expected[5:7].isnan().all()
    finite = [0, 1, 2, 3, 4, 8]
    assert torch.equal(got[finite], expected[finite]) and expected[finite].isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", ["q4_k", "q8_0"])
def test_same_bits_at_any_number_of_threads(name, count):
    for rows in (2, 30):
        x, weight = activations(rows, 256), random_weight(name, 130, 256)
        with threads(count):
            got = cpu.linear(x, cpu.pack_weight(weight), None, 130)
        assert torch.equal(got, reference.linear(x, weight, None, 130))


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_selected_and_embedded(dtype, name):
    weight, rows = random_weight(name, 37, 300), torch.tensor([36, 0, 17, 16, 3])
    assert torch.equal(cpu.select_rows(cpu.pack_weight(weight), rows), cpu.pack_weight(weight[rows]))
    assert torch.equal(
        cpu.embed_tokens(rows, cpu.pack_weight(weight), 300, dtype), reference.embed_tokens(rows, weight, 300, dtype)
    )


@pytest.mark.parametrize("name", TYPES)
def test_the_dot_is_near_what_the_numbers_say(name):
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    weight = random_weight(name, 64, 512)
    exact = x.double() @ reference.dequantise(weight, 512).double().T
    error = (reference.integer_dot(x, weight) - exact).norm() / exact.norm()
    assert error < (3e-4 if name in ("int8", "int15", "q8_0") else 8e-3)


@pytest.mark.parametrize("planes", [1, 2])
def test_integers_fit_their_planes(planes):
    x = torch.randn(50, 4, 32) * torch.logspace(-30, 30, 50)[:, None, None]
    X, scale = reference.quantise_rows(x, planes)
    assert X.abs().max() <= (127 if planes == 1 else 8192) and X.abs().max() > 100
    assert ((X * scale[..., None] - x).abs() <= 0.5001 * scale[..., None]).all()


def test_another_fold_differs():
    """The negative control: were terms not folded in their order, the tests above would notice."""
    x, weight = activations(3, 2304), random_weight("q4_0", 64, 2304)
    turned = weight.flip(1)
    x_turned = x.unflatten(1, (-1, 32)).flip(1).flatten(1)
    assert not torch.equal(reference.integer_dot(x, weight), reference.integer_dot(x_turned, turned))


def test_other_bytes_are_refused():
    with pytest.raises(ValueError, match="blocks of 19 bytes, which no known type has"):
        cpu.pack_weight(torch.zeros(4, 2, 19, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no packed weight of a known type"):
        cpu.linear(torch.zeros(1, 64), torch.zeros(1, 2, 19, dtype=torch.uint8), None, 4)
    with pytest.raises(ValueError, match="must have the shape"):
        cpu.linear(torch.zeros(1, 96), cpu.pack_weight(random_weight("q4_0", 4, 64)), None, 4)
    for dtype in (torch.int8, torch.int16):
        with pytest.raises(ValueError, match="whole blocks of 32"):
            cpu.pack_weight(torch.zeros(4, 40, dtype=dtype))
        with pytest.raises(ValueError, match="must have the shape"):
            cpu.linear(torch.zeros(1, 96), torch.zeros(1, 96, 16, dtype=dtype), None, 4)
