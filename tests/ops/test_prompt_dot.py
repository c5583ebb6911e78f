"""Many rows at once: tiles of weights in the model's dtype (triton_ops/prompt_dot.py), bit for bit the reference's.

The interpreter takes the chain as it is written; what the compiler makes of the dot in its place is run on the CPU,
from its PTX.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from layerskip_kernels import triton_ops
from layerskip_kernels.ops import reference
from layerskip_kernels.triton_ops import launch
from support.models import GPU
from support.prompt_tiles import count_tiles
from support.triton_arguments import DEVICE, assert_equal, attention_case, on_device, packed, random

ROOT = Path(__file__).parents[2]
ROWS = [32, 70] if not GPU else [32, 64, 70, 257]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    return count_tiles(monkeypatch)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), [(7, 5), (136, 33), *([(2048, 256)] if GPU else [])])
def test_linear(dtype, rows, inputs, outputs, tiles):
    """Segments of one number, and of three steps, of which two are multiplied at once."""
    x, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype)
    bias = random(outputs, dtype=dtype)
    got = triton_ops.linear(*on_device(x, packed(weight), bias), outputs)
    assert_equal(got, reference.linear(x, weight, bias, outputs))
    assert tiles[1] == 1


def test_fewer_rows_go_the_other_way(tiles):
    x, weight = random(31, 20, dtype=BF16), random(16, 20, dtype=BF16)
    got = triton_ops.linear(*on_device(x, packed(weight), None), 16)
    assert_equal(got, reference.linear(x, weight, None, 16))
    assert not tiles


@pytest.mark.parametrize("config", triton_ops.tuned.PROMPTS)
def test_tiles_of_every_size(config, tiles, monkeypatch):
    monkeypatch.setattr(launch, "config_of", lambda op: triton_ops.tuned.Config(16, {}, config))
    x, weight = random(133, 72, dtype=BF16), random(135, 72, dtype=BF16)
    got = triton_ops.linear(*on_device(x, packed(weight), None), 135)
    assert_equal(got, reference.linear(x, weight, None, 135))
    assert tiles[1] == 1


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_terms_of_very_different_sizes(dtype, tiles):
    """Where every order of addition has bits of its own; and rows with an infinity or a NaN do not reach others."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 200, generator=generator) for n in (40, 48))
    x = (x * torch.exp2(6 * torch.randn(x.shape, generator=generator))).to(dtype)
    x[3, 77], x[39, 5] = torch.inf, torch.nan
    weight = weight.to(dtype)
    got = triton_ops.linear(*on_device(x, packed(weight), None), 48)
    expected = reference.linear(x, weight, None, 48)
    assert_equal(got, expected)
    assert tiles[1] == 1 and expected[4:39].isfinite().all()
    assert not torch.equal(expected, torch.nn.functional.linear(x.float(), weight.float()).to(dtype))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("post_norm", "dtype"), [(False, BF16), (True, BF16), (False, FP32)])
def test_out_residual(rows, post_norm, dtype, tiles):
    x, weight, residual = (random(*s, dtype=dtype, seed=rows) for s in ((rows, 100), (33, 100), (rows, 33)))
    bias, norm = random(33, dtype=dtype), random(33, dtype=dtype)
    rest = bias, residual, norm if post_norm else None, 1e-5, 1.0, 0.37
    got = triton_ops.out_residual(*on_device(x, packed(weight), *rest))
    assert_equal(got, reference.out_residual(x, weight, *rest))
    assert tiles[1] == 1


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("gelu", [False, True])
def test_norm_gate_up_act(rows, gelu, tiles):
    hidden, norm = random(rows, 100, dtype=FP16) * 10, random(100, dtype=FP16)
    gate, up = random(33, 100, dtype=FP16, seed=1) * 50, random(33, 100, dtype=FP16, seed=2)
    bias = random(66, dtype=FP16)
    got = triton_ops.norm_gate_up_act(*on_device(hidden, norm, packed(gate), packed(up)), 33, 1e-5, 1.0,
                                      bias.to(DEVICE), gelu)  # fmt: skip
    assert_equal(got, reference.norm_gate_up_act(hidden, norm, gate, up, 33, 1e-5, 1.0, bias, gelu))
    assert tiles[2] == 1


@pytest.mark.parametrize(("rows", "normed"), [(70, False), (32, True)])
def test_norm_qkv_rope_append(rows, normed, tiles):
    """Heads of which six of ten numbers are turned; a row whose K and V are not kept."""
    case = attention_case(BF16, rows, 6, 2, 10, 16)
    slots = case["slots"].clone()
    slots[rows - 2] = -1
    cos, sin = (case[name][:, :3].contiguous() for name in ("cos", "sin"))
    norms = [random(10, dtype=BF16, seed=i) for i in (1, 2)] if normed else [None, None]
    results = []
    for ops, pack, device in ((triton_ops, packed, DEVICE), (reference, reference.pack_weight, "cpu")):
        k, v = case["k_pages"].to(device, copy=True), case["v_pages"].to(device, copy=True)
        rest = (case["bias"], cos, sin, case["positions"], slots)
        q = ops.norm_qkv_rope_append(
            case["hidden"].to(device), case["norm_weight"].to(device), *map(pack, case["weights"]),
            *(tensor.to(device) for tensor in rest), k, v, 6, 1e-5, 0.0,
            *(None if norm is None else norm.to(device) for norm in norms),
        )  # fmt: skip
        results.append((q, k, v))
    for got, expected in zip(*results, strict=True):
        assert_equal(got, expected)
    assert tiles[2] == 1


# ---- what is compiled ----


def run_compiled(folder, *options):
    command = [sys.executable, ROOT / "benchmarks/compile_only/prompt_check.py", "--target", "sm_90", *options]
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return list(map(json.loads, result.stdout.splitlines()))


def test_the_compiled_dot_has_rule_1s_bits(tmp_path):
    """All four kernels, run from their PTX; and lanes do not wait for each other's banks of shared memory."""
    [found] = run_compiled(tmp_path, "--case", "bf16,64,64,4")
    assert found["bits"] == dict.fromkeys(("linear", "out_residual", "gate_up_act", "qkv"), True)
    assert found["multiply_adds"] > 0 < found["shared_loads"]
    assert found["bank_cycles"] <= 4 * found["shared_loads"]


def test_the_compiled_tiles_of_quantised_weights_and_of_attention(tmp_path):
    """Run from their PTX as well: rule 8's bits, and rule 4's."""
    *quantised, attention = run_compiled(tmp_path, "--quantised", "q4_0", "--quantised", "q6_k", "--attention")
    assert [found["weights"] for found in quantised] == ["q4_0", "q6_k"]
    for found in quantised:
        assert found["bits"] == {"linear": True, "gate_up_act": True} and found["integer_products"] > 0
    assert attention["bits"] == {"attention": True} and attention["multiply_adds"] > 0


@pytest.fixture
def ptx_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "compile_only"))
    return importlib.import_module("ptx_run")


def test_half_of_a_pair_may_be_what_nobody_wrote(ptx_run):
    """As LLVM leaves it where sm_100 multiplies two numbers at a time; what is written later is not that."""
    pair = "mov.b32 %r1, 7; mov.b64 %rd1, {%r1, %r2}; mov.b64 {%r3, %r4}, %rd1;"

    def run(ptx):
        program = ptx_run.Program(f".entry pair() {{ {ptx} ret;", 2, 0, np.zeros(0, np.uint8), {}, ptx_run.Counts())
        program.run((0, 0, 0), (1, 1, 1))
        return program

    program = run(pair)
    assert program.read("%r3", np.int32).tolist() == [7, 7] and np.isnan(program.read("%r4", np.float32)).all()
    with pytest.raises(ValueError, match="%r2"):
        run(f"{pair} mov.b32 %r2, 1;")


def test_pairs_of_16_bits_are_added_apart(ptx_run):
    program = ptx_run.Program(".entry add() { ret;", 2, 0, np.zeros(0, np.uint8), {}, ptx_run.Counts())
    words = np.array([[0x0001FFFF, 0x7FFF8000], [0x00010001, 0x00018000]], np.uint32)
    program.registers = dict(zip("ab", words, strict=True))
    assert program.value(("add", "s16x2"), ("a", "b")).tolist() == [0x00020000, 0x80000000]
