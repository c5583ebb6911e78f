"""Rule 8 on Triton: quantised weights have the bits of the reference in every kernel, at any size and any bytes.

Interpreted, sixteen columns take a fifth of a second; on a GPU there are more of them.
"""

import pytest
import torch

from layerskip_kernels import triton_ops
from layerskip_kernels.ops import reference
from support.models import GPU
from support.quantised_weights import TYPES, activations, random_weight
from support.triton_arguments import DEVICE, assert_equal, attention_case, on_device, packed, random

N = 133 if GPU else 16
MIXED = [("q4_k", "q6_k", "q8_0"), ("q5_1", "q5_1", "q5_1"), ("int15", "dense", "int8")]


def linear(x, weight, bias=None):
    return triton_ops.linear(*on_device(x, packed(weight), bias), len(weight))


def weight_of(name, n, k, dtype=torch.bfloat16, seed=0):
    return random(n, k, dtype=dtype, seed=seed) if name == "dense" else random_weight(name, n, k, seed)


@pytest.mark.parametrize("name", TYPES)
def test_same_bits_at_any_number_of_rows(name):
    x, weight, bias = activations(17, 300), random_weight(name, N, 300), random(N, dtype=torch.bfloat16)
    expected = reference.linear(x, weight, bias, N)
    for rows in range(1, 18) if GPU or name == "q4_0" else (1, 8, 17):
        assert_equal(linear(x[:rows], weight, bias), expected[:rows])


@pytest.mark.skipif(GPU, reason="kernels are launched, not interpreted")
@pytest.mark.parametrize("name", TYPES)
def test_same_bits_of_kernels_that_begin_before_the_one_ahead_is_done(name):
    from support.dependent_launches import dependent_launches

    x, weight = activations(17, 300), random_weight(name, N, 300)
    expected = reference.linear(x, weight, None, N)
    for rows in (1, 8, 17):
        with dependent_launches() as begun:
            assert_equal(linear(x[:rows], weight), expected[:rows])
        assert begun == {"_round_rows_kernel": 1, "_linear_kernel": 1}
    with dependent_launches(waiting=False):
        assert not torch.equal(linear(x, weight), expected)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("k", [1, 31, 33, 255, 257, *([576, 2304, 4096] if GPU else [])])
def test_same_bits_at_odd_sizes(name, k):
    x, weight = activations(3, k), random_weight(name, N, k)
    assert_equal(linear(x, weight), reference.linear(x, weight, None, N))


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q6_k", "q8_0", "int8", "int15"])
def test_same_bits_of_several_steps_in_every_dtype(dtype, name):
    """Segments of three blocks: a step and a half; the last segments are zeros, those before not full."""
    x, weight = activations(2, 580, dtype), random_weight(name, N + 4, 580)
    assert_equal(linear(x, weight), reference.linear(x, weight, None, N + 4))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("scales", ["subnormal", "zero"])
def test_same_bits_with_scales_that_are_tiny(name, scales):
    x, weight = activations(3, 64, torch.float32), random_weight(name, N, 64, scales=scales)
    assert_equal(linear(x, weight), reference.linear(x, weight, None, N))


@pytest.mark.parametrize("name", ["q5_k", "q6_k", "q8_0", "int8", "int15"])
def test_same_bits_of_activations_of_any_size(name):
    x = torch.randn(9, 288)
    x[0], x[1], x[2] = 0.0, x[1] * 2.0**-130, x[2] * 1e30
    x[3, ::5], x[4, 40:] = -0.0, 0.0
    x[5, 7], x[6, 40], x[7, 285] = torch.inf, torch.nan, torch.finfo(torch.float32).max
    weight = random_weight(name, N, 288)
    expected = reference.linear(x, weight, None, N)
    assert_equal(linear(x, weight), expected)
    assert expected[5:7].isnan().all() and expected[[0, 1, 2, 3, 4, 8]].isfinite().all()


def test_another_fold_is_noticed():
    """The negative control: blocks in another order, and with them their activations, give another sum somewhere."""
    x, weight = activations(3, 2304, torch.float32), random_weight("q4_0", N, 2304)
    turned = x.unflatten(1, (-1, 32)).flip(1).flatten(1)
    assert not torch.equal(linear(turned, weight.flip(1)).cpu(), reference.linear(x, weight, None, N))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("k", [33, 300, 576])
def test_rows_are_selected_and_embedded(dtype, name, k):
    weight, rows = random_weight(name, 37, k), torch.tensor([36, 0, 17, 16, 3])
    assert torch.equal(triton_ops.select_rows(packed(weight), rows), packed(weight[rows]))
    assert_equal(
        triton_ops.embed_tokens(rows.to(DEVICE), packed(weight), k, dtype),
        reference.embed_tokens(rows, weight, k, dtype),
    )


@pytest.mark.parametrize("names", MIXED)
@pytest.mark.parametrize("rows", [1, 9])
def test_norm_qkv_rope_append(names, rows):
    case = attention_case(torch.bfloat16, rows, 2, 1, 10, 16, hidden_size=40)
    weights = [weight_of(name, n, 40, seed=n) for name, n in zip(names, (20, 10, 10), strict=True)]
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


@pytest.mark.parametrize("names", [("q4_k", "q6_k"), ("int8", "int8"), ("int15", "int15"), ("dense", "q5_0")])
@pytest.mark.parametrize("rows", [2, 9])
def test_norm_gate_up_act(names, rows):
    hidden, norm = random(rows, 70, dtype=torch.bfloat16) * 10, random(70, dtype=torch.bfloat16)
    gate, up = (weight_of(name, 21, 70, seed=i) for i, name in enumerate(names))
    got = triton_ops.norm_gate_up_act(*on_device(hidden, norm, packed(gate), packed(up)), 21, 1e-5)
    assert_equal(got, reference.norm_gate_up_act(hidden, norm, gate, up, 21, 1e-5))


@pytest.mark.parametrize("name", ["q6_k", "q8_0"])
def test_out_residual_and_down_residual(dtype, name):
    x, weight, residual = random(9, 40, dtype=dtype), random_weight(name, 21, 40), random(9, 21, dtype=dtype)
    bias = random(21, dtype=dtype)
    got = triton_ops.out_residual(*on_device(x, packed(weight), bias, residual))
    assert_equal(got, reference.out_residual(x, weight, bias, residual))
    got = triton_ops.down_residual(*on_device(x, packed(weight), residual))
    assert_equal(got, reference.down_residual(x, weight, residual))


@pytest.mark.parametrize("name", ["q6_k", "q4_0", "int8", "int15"])
@pytest.mark.parametrize("vocab_size", [5, 101])
def test_norm_head_argmax(name, vocab_size):
    hidden, norm = random(9, 50, dtype=torch.bfloat16), random(50, dtype=torch.bfloat16)
    head = random_weight(name, vocab_size, 50)
    head[-1] = head[0]  # equal logits: the lowest index wins
    got = triton_ops.norm_head_argmax(*on_device(hidden, norm, packed(head)), vocab_size, 1e-5)
    for a, b in zip(got, reference.norm_head_argmax(hidden, norm, head, vocab_size, 1e-5), strict=True):
        assert_equal(a, b)


def test_other_bytes_are_refused():
    with pytest.raises(ValueError, match="blocks of 19 bytes, which no known type has"):
        packed(torch.zeros(4, 2, 19, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no packed weight of a known type"):
        triton_ops.linear(torch.zeros(1, 64).to(DEVICE), torch.zeros(1, 2, 19, dtype=torch.uint8).to(DEVICE), None, 4)
    for dtype in (torch.int8, torch.int16):
        with pytest.raises(ValueError, match="whole blocks of 32"):
            packed(torch.zeros(4, 40, dtype=dtype))
