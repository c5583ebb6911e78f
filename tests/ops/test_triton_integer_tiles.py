"""Rule 8 on Triton for many rows: tiles of rows and columns have the bits of the reference in every kernel.

Interpreted, a program's tile takes seconds: it has fewer rows, and takes over from fewer on; no choice changes a bit.
"""

import pytest
import torch

from layerskip_kernels import triton_ops
from layerskip_kernels.ops import reference
from layerskip_kernels.triton_ops import launch
from layerskip_kernels.triton_ops.integer_rows import Rows, round_rows
from support.models import GPU
from support.prompt_tiles import count_integer_tiles
from support.quantised_weights import TYPES, activations, random_weight
from support.triton_arguments import DEVICE, assert_equal, attention_case, on_device, packed, random

ROWS = 67 if GPU else 11  # of the second tile, not all


@pytest.fixture
def tiles(monkeypatch):
    if not GPU:
        monkeypatch.setattr(launch, "PROMPT_ROWS", 9)
        monkeypatch.setattr(launch, "INTEGER_TILES", ((8, 32),))
    return count_integer_tiles(monkeypatch)


def linear(x, weight, bias=None):
    return triton_ops.linear(*on_device(x, packed(weight), bias), len(weight))


@pytest.mark.parametrize("name", TYPES)
def test_every_type(tiles, name):
    """Segments of three blocks: a step and a half; the last ones are zeros. More columns than a tile has."""
    x, weight, bias = activations(ROWS, 580), random_weight(name, 36, 580), random(36, dtype=torch.bfloat16)
    assert_equal(linear(x, weight, bias), reference.linear(x, weight, bias, 36))
    assert tiles == {1: 1}


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q6_k", "q8_0", "int15"])
@pytest.mark.parametrize("k", [1, 33, 257])
def test_odd_sizes(tiles, name, k):
    x, weight = activations(ROWS, k), random_weight(name, 16, k)
    assert_equal(linear(x, weight), reference.linear(x, weight, None, 16))
    assert tiles == {1: 1}


@pytest.mark.parametrize(("name", "scales"), [("q4_0", "subnormal"), ("q5_k", "usual"), ("q8_0", "subnormal"),
                                              ("int8", "usual")])  # fmt: skip
def test_activations_of_any_size(tiles, name, scales):
    """Beside rows that are infinite or no numbers, whose scales are NaN; and scales of weights that are tiny."""
    x = torch.randn(ROWS, 288, generator=torch.Generator().manual_seed(0))
    x[0], x[1], x[2] = 0.0, x[1] * 2.0**-130, x[2] * 1e30
    x[3, ::5], x[4, 40:] = -0.0, 0.0
    x[5, 7], x[6, 40], x[7, 285] = torch.inf, torch.nan, torch.finfo(torch.float32).max
    weight = random_weight(name, 16, 288, scales=scales)
    expected = reference.linear(x, weight, None, 16)
    assert_equal(linear(x, weight), expected)
    assert expected[5:7].isnan().all() and expected[8:].isfinite().all()


def test_rows_are_turned_into_memory_that_held_others():
    """Such as rows for tiles of another size: what fills the last step up is written, too."""
    weight = packed(random_weight("q4_0", 16, 580))
    x = Rows.of_numbers(activations(8, 580).to(DEVICE), weight)
    found = []
    for before in (-1, 0x7FC00000):
        memory = x.turned_of(weight).view(torch.int32).fill_(before)
        round_rows(x, 8, weight, tile=8)
        found.append(memory.flatten()[: 8 * 2 * 160].clone())  # rows, steps, words
    assert torch.equal(*found)


@pytest.mark.parametrize("rows", [31, 32, 70] if GPU else [32, 41])
def test_tiles_as_they_are(monkeypatch, rows):
    """Without other sizes for the interpreter: which rows are tiles, and how many a program has."""
    found = count_integer_tiles(monkeypatch)
    x, weight = activations(rows, 40), random_weight("q4_0", 20, 40)
    assert_equal(linear(x, weight), reference.linear(x, weight, None, 20))
    assert found == ({1: 1} if rows >= launch.PROMPT_ROWS else {})


@pytest.mark.parametrize("names", [("q4_k", "q6_k", "q8_0"), ("int15", "int15", "int15")])
def test_norm_qkv_rope_append(tiles, names):
    """Heads of ten: a tile's columns begin anywhere, and pairs of them lie in two groups."""
    case = attention_case(torch.bfloat16, ROWS, 2, 1, 10, 16, hidden_size=40)
    weights = [random_weight(name, n, 40, seed=n) for name, n in zip(names, (20, 10, 10), strict=True)]
    results = []
    for ops, pack, device in ((triton_ops, packed, DEVICE), (reference, reference.pack_weight, "cpu")):
        k, v = case["k_pages"].to(device, copy=True), case["v_pages"].to(device, copy=True)
        rest = (case[name].to(device) for name in ("bias", "cos", "sin", "positions", "slots"))
        q = ops.norm_qkv_rope_append(
            case["hidden"].to(device), case["norm_weight"].to(device), *map(pack, weights), *rest, k, v, 2, 1e-5
        )
        results.append((q, k, v))
    for got, expected in zip(*results, strict=True):
        assert_equal(got, expected)
    assert tiles == {2: 1}


@pytest.mark.parametrize(("names", "taken"), [(("q4_k", "q6_k"), 1), (("q5_1", "q5_1"), 1), (("dense", "q5_0"), 0)])
def test_norm_gate_up_act(tiles, names, taken):
    """Beside a weight in the model's dtype, of which rows are not turned that way, few rows a program."""
    hidden, norm = random(ROWS, 70, dtype=torch.bfloat16) * 10, random(70, dtype=torch.bfloat16)
    gate, up = (random(21, 70, dtype=torch.bfloat16, seed=i) if name == "dense" else random_weight(name, 21, 70, i)
                for i, name in enumerate(names))  # fmt: skip
    got = triton_ops.norm_gate_up_act(*on_device(hidden, norm, packed(gate), packed(up)), 21, 1e-5)
    assert_equal(got, reference.norm_gate_up_act(hidden, norm, gate, up, 21, 1e-5))
    assert tiles == ({2: 1} if taken else {})


def test_out_residual(tiles, dtype):
    x, weight, residual = random(ROWS, 40, dtype=dtype), random_weight("q6_k", 37, 40), random(ROWS, 37, dtype=dtype)
    bias = random(37, dtype=dtype)
    got = triton_ops.out_residual(*on_device(x, packed(weight), bias, residual))
    assert_equal(got, reference.out_residual(x, weight, bias, residual))
    assert tiles == {1: 1}
