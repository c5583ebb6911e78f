"""The floors against numbers worked out by hand, from the shapes' public configs and the data sheets."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from layerskip_kernels.cli.main import main
from layerskip_kernels.evaluation.datasheets import GPUS, SHAPES
from layerskip_kernels.evaluation.exit_layers import exit_layers_of
from layerskip_kernels.evaluation.floors import decode, draft, memory_bound_rows, prompt, speedup, verify
from layerskip_kernels.evaluation.roofline import roofline
from layerskip_kernels.evaluation.step_bytes import ceiling
from layerskip_kernels.model.tensor_names import tensor_shapes

LLAMA2_7B, H100 = SHAPES["llama2-7b"], GPUS["h100"]
# 4 * 4096^2 + 3 * 4096 * 11008 weights in a layer, 32000 * 4096 in the head; norms are read, not multiplied with.
LAYER, HEAD, NORM = 202_375_168, 131_072_000, 4096


@pytest.mark.parametrize(
    ("shape", "parameters"),  # as their model cards and weights count them
    [
        ("llama3.2-1b", 1_235_814_400),
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama3-8b", 8_030_261_248),
        ("codellama-7b", 6_738_546_688),
        ("codellama-34b", 33_743_970_304),
        ("llama2-70b", 68_976_648_192),
    ],
)
def test_shapes_have_the_published_number_of_parameters(shape, parameters):
    assert sum(map(math.prod, tensor_shapes(SHAPES[shape]).values())) == parameters


def test_decoding_by_hand():
    """After 511 tokens 512 positions are read: 2 * 512 * 32 * 128 elements of K and V in each layer."""
    floor = decode(LLAMA2_7B, H100, context=511)
    assert floor.bytes == 2 * (32 * (LAYER + 2 * NORM + 4_194_304) + HEAD + NORM) == 13_483_122_688
    assert floor.operations == 2 * (32 * (LAYER + 4_194_304) + HEAD)
    assert floor.seconds == pytest.approx(13_483_122_688 / 3.35e12)
    assert floor.seconds == pytest.approx(4.0248e-3, rel=1e-4)


def test_drafting_by_hand():
    """Two drafts through 8 layers, which read 1 and 2 positions."""
    floor = draft(LLAMA2_7B, H100, exit_layer=8, drafts=2, context=0)
    assert floor.bytes == 2 * (8 * (2 * (LAYER + 2 * NORM) + 3 * 8192) + 2 * (HEAD + NORM))
    assert floor.operations == 2 * (8 * (2 * LAYER + 3 * 8192) + 2 * HEAD)
    assert floor.seconds == pytest.approx(floor.bytes / 3.35e12)


def test_verifying_by_hand():
    """The last of 4 drafts passes 8 layers alone; 5 rows pass the other 24 and the head. All weights are read once."""
    floor = verify(LLAMA2_7B, H100, exit_layer=8, drafts=4, context=0)
    assert floor.bytes == 2 * (32 * (LAYER + 2 * NORM + 5 * 8192) + HEAD + NORM)
    assert floor.operations == 2 * ((8 + 24 * 5) * (LAYER + 5 * 8192) + 5 * HEAD)
    assert floor.seconds == pytest.approx(floor.bytes / 3.35e12)


def test_a_prompt_by_hand():
    """300 rows in chunks of 256 and 44; row i sees i + 1 positions; the head has one row. Arithmetic bounds."""
    floor = prompt(LLAMA2_7B, H100, 300)
    assert floor.bytes == 2 * (32 * (2 * (LAYER + 2 * NORM) + 8192 * (256 + 300)) + HEAD + NORM)
    assert floor.operations == 2 * (32 * (300 * LAYER + 8192 * (300 * 301 // 2)) + HEAD)
    chunks = floor.operations - 2 * HEAD
    assert floor.seconds == pytest.approx(chunks / 67e12 + 2 * (HEAD + NORM) / 3.35e12)


@pytest.mark.parametrize(
    # 38,400 rows of 4,096 inputs and 4,096 of 11,008, each with 32 bytes of scales; or blocks of 32 and 256
    ("weights", "layer", "head", "products"),
    [
        ("int8", 38400 * 4128 + 4096 * 11040, 32000 * 4128, 2),
        ("int15", 38400 * 8224 + 4096 * 22048, 32000 * 8224, 4),
        ("q4_0", LAYER // 32 * 18, HEAD // 32 * 18, 1),
        ("q8_0", LAYER // 32 * 34, HEAD // 32 * 34, 2),
        ("q4_k", LAYER // 256 * 144, HEAD // 256 * 144, 1),
        ("q6_k", LAYER // 256 * 210, HEAD // 256 * 210, 1),
    ],
)
def test_quantised_weights_by_hand(weights, layer, head, products):
    """Of 202,375,168 weights in a layer; norms, K and V stay bf16, and attention's operations fp32."""
    floor = decode(LLAMA2_7B, H100, context=0, weights=weights)
    assert floor.bytes == 32 * (layer + 2 * (2 * NORM + 8192)) + head + 2 * NORM
    assert floor.operations == 2 * 32 * 8192
    assert floor.integer_operations == 2 * products * (32 * LAYER + HEAD)
    assert floor.seconds == pytest.approx(floor.bytes / 3.35e12)


def test_integer_tensor_cores_bound_a_quantised_prompt():
    floor = prompt(LLAMA2_7B, replace(H100, fp32=1e9), 256, weights="int8")
    assert floor.integer_operations == 4 * (256 * 32 * LAYER + HEAD)
    assert floor.seconds == pytest.approx(4 * 256 * 32 * LAYER / 1979e12 + (32000 * 4128 + 2 * NORM) / 3.35e12)


def test_arithmetic_bounds_where_it_is_slower():
    slow = replace(H100, fp32=0.001)
    floor = verify(LLAMA2_7B, slow, exit_layer=8, drafts=4, context=0)
    assert floor.seconds == pytest.approx(floor.operations / 1e9)
    assert memory_bound_rows(LLAMA2_7B, slow, 0, torch.bfloat16) == 0
    # 2 bytes and 2 operations per weight: 67e12 / 3.35e12 = 20 rows, and a few norms that are only read.
    assert memory_bound_rows(LLAMA2_7B, H100, 0, torch.bfloat16) == 20
    assert memory_bound_rows(LLAMA2_7B, GPUS["a100"], 0, torch.bfloat16) == 9
    # fp32: 4 bytes, and a product and a sum rounded one after the other.
    assert memory_bound_rows(LLAMA2_7B, H100, 0, torch.float32) == 20


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("drafts", [1, 5])
def test_speedup_is_the_ceiling_while_memory_bounds(shape, drafts):
    """Without context and arithmetic, time is layers passed: the closed formula of bench.ceiling."""
    config, gpu = SHAPES[shape], replace(H100, fp32=1e9)
    layer = (sum(map(math.prod, tensor_shapes(config).values()))
             - config.hidden_size * (1 + config.vocab_size * (1 if config.tie_word_embeddings else 2))
             ) / config.num_layers  # fmt: skip
    head = config.hidden_size * config.vocab_size / layer
    expected = ceiling(config.num_layers, 4, drafts, 0.6, head)
    assert speedup(config, gpu, 4, drafts, 0.6, context=0) == pytest.approx(expected, rel=2e-3)


def test_speedup_by_hand_where_arithmetic_bounds():
    """Rows cost what they compute: 4 drafts pass 8 layers, then 1 row 8 layers and 5 rows 24, heads 4 + 5."""
    config, gpu = LLAMA2_7B, replace(H100, bandwidth=1e12)
    head = HEAD / LAYER
    expected = (32 + head) * (1 + 0.5 * 4) / (4 * 8 + 8 + 5 * 24 + 9 * head)
    assert speedup(config, gpu, 8, 4, 0.5, context=0) == pytest.approx(expected, rel=1e-3)
    assert expected < 1


@pytest.mark.parametrize("shape", SHAPES)
def test_the_exits_by_default_are_those_of_a_sweep(shape):
    found = {entry["exit_layer"] for entry in roofline(shape, "h100", drafts=[2])["speedups"]}
    assert sorted(found) == exit_layers_of(SHAPES[shape].num_layers)


def test_command_prints_tables(capsys):
    assert main(["roofline", "--shape", "llama2-7b", "--gpu", "h100", "--context", "511"]) == 0
    output = capsys.readouterr().out
    assert "lower bounds computed from data sheets, not measurements" in output
    assert "NVIDIA H100 Tensor Core GPU data sheet" in output
    lines = [line.split() for line in output.splitlines()]
    assert ["decode", "1", "13.48", "13.5", "0.0", "4.025", "ms", "0.201", "ms", "4.025", "ms"] in lines
    assert "do not fit" not in output


def test_command_gives_json(capsys):
    options = [
        "--exit-layer",
        "8",
        "--num-speculations",
        "4",
        "--acceptance",
        "0.5,1",
        "--dtype",
        "fp16",
        "--prompt",
        "300,5000",
        "--json",
    ]
    assert main(["roofline", "--shape", "llama2-70b", "--gpu", "a100", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["fits"] is False and report["gpu"]["bandwidth"] == 2039
    assert [(step["name"], step["rows"]) for step in report["steps"]] == [
        ("decode", 1), ("draft one token, exit 8", 1), ("verify 4 drafts, exit 8", 5), ("prompt of 300 tokens", 300),
    ]  # fmt: skip
    assert [entry["acceptance"] for entry in report["speedups"]] == [0.5, 1.0]
    config = SHAPES["llama2-70b"]
    assert report["speedups"][1]["speedup"] == speedup(config, GPUS["a100"], 8, 4, 1.0, 512, torch.float16)


def test_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofline.png"
    assert main(["roofline", "--shape", "llama3-8b", "--gpu", "a100", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "gpt2"], "shape must be one of llama3.2-1b, llama2-7b,"),
        (["--gpu", "tpu"], "gpu must be one of a100, a100-40gb, h100,"),
        (["--exit-layer", "32"], "exit_layer must be in 1..31, got 32"),
        (["--weights", "q3_k"], "weights must be None, '16bit' or one of int8, int15, q4_0"),
        (["--acceptance", "1.2"], "acceptance must be in 0..1, got 1.2"),
        (["--acceptance", "many"], "must be numbers in 0..1, with commas between, got 'many'"),
        (["--context", "4084"], "context must be 0 or more and leave room for the drafts in 4096 positions"),
    ],
)
def test_what_is_not_supported_is_said(options, message, capsys):
    given = {"--shape": "llama2-7b", "--gpu": "h100"} | dict([options])
    assert main(["roofline", *(part for option in given.items() for part in option)]) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_the_remedy_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["roofline", "--shape", "llama2-7b", "--gpu", "h100", "--plot", "x.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
