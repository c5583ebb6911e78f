"""Quantised weights from a file to tokens: kept as they are, read as numbers, rounded, written."""

import os
import re
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from layerskip_kernels import GenerationConfig, generate, load_model
from layerskip_kernels.cli import measurement, options
from layerskip_kernels.cli.main import main
from layerskip_kernels.model import gguf_write
from layerskip_kernels.model.loading import read_checkpoint
from layerskip_kernels.model.quantise import WEIGHT_TYPES
from layerskip_kernels.model.quantise import quantise as rounded
from layerskip_kernels.ops import reference
from support.checkpoint_files import HF_CONFIG, random_tensors
from support.gguf_files import GgmlType, gguf_rows, write_gguf
from support.llama_cpp import LIVE, first_probabilities

UP, DOWN, Q = (f"model.layers.1.{name}.weight" for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"))
BLOCKS = list(reference.BLOCK_TYPES)
WIDE = HF_CONFIG | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}  # rows of whole blocks of 256
WIDE_KEYS = dict(llama__embedding_length=256, llama__rope__dimension_count=64, llama__feed_forward_length=256)
KEEP = dict(return_logits=True, return_kv=True)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of converted files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def raw_blocks(name: str, tensor_name: str, tensors: dict) -> np.ndarray:
    """A matrix as a file holds it: llama.cpp's order of rows, in blocks."""
    return rounded(torch.from_numpy(gguf_rows(tensor_name, tensors[tensor_name])), name).flatten(1).numpy()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A file of many types, as llama.cpp mixes them: layers differ, and so do matrices of a layer; 16-bit ones, too."""
    tensors = random_tensors(WIDE)
    parts = {"attn_q": Q, "ffn_up": UP, "ffn_down": DOWN, "attn_v": "model.layers.1.self_attn.v_proj.weight"}
    types = {"attn_q": "q4_k", "ffn_up": "q5_1", "ffn_down": "q6_k", "attn_v": "q8_0"}
    raw = {f"blk.1.{part}.weight": (GgmlType[types[part].upper()], raw_blocks(types[part], name, tensors))
           for part, name in parts.items()}  # fmt: skip
    embedding = raw_blocks("q6_k", "model.embed_tokens.weight", tensors)
    raw["token_embd.weight"] = (GgmlType.Q6_K, embedding)
    raw["blk.0.attn_k.weight"] = (
        GgmlType.F16,
        gguf_rows("x.k_proj.x", tensors["model.layers.0.self_attn.k_proj.weight"]).astype(np.float16),
    )
    write_gguf(tmp_path / "mixed.gguf", tensors, GgmlType.Q4_0, raw=raw, **WIDE_KEYS)
    return tmp_path / "mixed.gguf"


def same_bits(a, b) -> bool:
    kv = all(torch.equal(x, y) for x, y in zip(a.kv, b.kv, strict=True))
    return a.token_ids == b.token_ids and torch.equal(a.logits, b.logits) and kv


def test_a_file_keeps_its_blocks(mixed):
    kept = read_checkpoint(mixed, keep_quantised=True).tensors
    assert kept["model.embed_tokens.weight"].shape[1:] == (1, 210) and kept[DOWN].shape[1:] == (1, 210)
    assert kept[Q].shape[1:] == (1, 144) and kept[UP].shape[1:] == (8, 24)
    assert kept["model.layers.0.self_attn.q_proj.weight"].shape[1:] == (8, 18)
    assert kept["model.layers.0.self_attn.k_proj.weight"].dtype == torch.bfloat16
    numbers = read_checkpoint(mixed, torch.float32).tensors
    for name, blocks in kept.items():
        if blocks.dtype == torch.uint8:
            assert torch.equal(reference.dequantise(blocks, 256), numbers[name])


def test_the_same_bits_from_both_backends_and_strategies(mixed, dtype):
    models = [load_model(mixed, dtype, backend) for backend in ("cpu", "reference")]
    assert models[0].weights.embedding is models[0].weights.lm_head  # tied: one tensor
    prompt = list(range(3, 20))
    plain = GenerationConfig("autoregressive", max_new_tokens=10, eos_token_ids=(), **KEEP)
    expected = generate(models[1], [prompt], plain)[0]
    assert same_bits(generate(models[0], [prompt], plain)[0], expected)
    early = GenerationConfig(exit_layer=1, max_new_tokens=10, eos_token_ids=(), **KEEP)
    for model in (models[0], models[0].with_draft_vocab(range(0, 96, 3))):
        drafted = generate(model, [prompt], early)[0]
        assert same_bits(drafted, expected) and drafted.drafted > 0
    numbers = generate(load_model(mixed, dtype, weights="16bit"), [prompt], plain)[0]
    assert not torch.equal(numbers.logits[0], expected.logits[0])  # another model, but a near one
    assert (numbers.logits[0] - expected.logits[0]).norm() < 0.1 * expected.logits[0].norm()


def test_other_weights_are_rounded_from_numbers(mixed):
    model, numbers = load_model(mixed, weights="q8_0"), read_checkpoint(mixed).tensors
    expected = torch.ops.layerskip.pack_weight(rounded(numbers[UP], "q8_0"))
    assert torch.equal(model.weights.layers[1].w_up, expected) and model.weights.embedding.dtype == torch.bfloat16


@pytest.mark.parametrize("name", BLOCKS)
def test_a_damaged_scale_is_named(tmp_path, name):
    tensors = random_tensors(WIDE)
    for at in reference.BLOCK_TYPES[name].fp16:
        raw = raw_blocks(name, UP, tensors)
        raw[3, at : at + 2] = np.array([np.nan], np.float16).view(np.uint8)
        path = tmp_path / f"damaged{at}.gguf"
        write_gguf(path, tensors, raw={"blk.1.ffn_up.weight": (GgmlType[name.upper()], raw)}, **WIDE_KEYS)
        with pytest.raises(ValueError, match=r"'blk.1.ffn_up.weight' in .*damaged.*\.gguf has a block whose scale"):
            load_model(path)


def test_a_type_without_kernels_is_read_as_numbers_and_says_so(tmp_path, capsys):
    kind = GgmlType.IQ4_XS
    raw = np.random.default_rng(1).integers(0, 4, (256, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    write_gguf(
        tmp_path / "m.gguf", random_tensors(WIDE), GgmlType.Q8_0, raw={"blk.1.ffn_up.weight": (kind, raw)}, **WIDE_KEYS
    )
    kept = read_checkpoint(tmp_path / "m.gguf", keep_quantised=True).tensors
    assert kept[UP].dtype == torch.bfloat16 and kept[DOWN].dtype == torch.uint8
    assert torch.equal(kept[UP], torch.from_numpy(dequantize(raw, kind)).bfloat16())
    assert "its IQ4_XS tensors are read as bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "at", "spelt"), [("IQ4_NL", 0, "q8_0"), ("Q3_K", 108, "q6_k")])
def test_a_type_that_another_spells_stands_for_the_same_numbers(tmp_path, name, at, spelt, capsys):
    kind, generator = GgmlType[name], np.random.default_rng(1)
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = generator.integers(0, 256, (256, 256 // size, nbytes), dtype=np.uint8)
    raw[..., at : at + 2] = generator.normal(size=raw.shape[:2]).astype(np.float16)[..., None].view(np.uint8)
    raw = raw.reshape(256, -1)
    path = tmp_path / "m.gguf"
    write_gguf(path, random_tensors(WIDE), GgmlType.Q8_0, raw={"blk.1.ffn_up.weight": (kind, raw)}, **WIDE_KEYS)
    kept = read_checkpoint(path, keep_quantised=True).tensors[UP]
    assert reference.block_type(kept).name == spelt
    assert torch.equal(reference.dequantise(kept, 256), torch.from_numpy(dequantize(raw, kind)))
    assert "are read as" not in capsys.readouterr().err


# ---- rounding ----


@pytest.mark.parametrize("name", [n for n in BLOCKS if n[-1] != "k"])
def test_rounding_is_nearer_than_ggufs(name):
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(3))
    kind = GgmlType[name.upper()]
    theirs = torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind))
    ours = reference.dequantise(rounded(weight, name), 256)
    assert (ours - weight).norm() <= 1.001 * (theirs - weight).norm()


@pytest.mark.parametrize(
    ("name", "most"),
    [("q4_k", 0.08), ("q5_k", 0.04), ("q6_k", 0.019), ("int8", 0.008), ("q8_0", 0.006), ("int15", 7e-5)],
)
def test_rounding_is_near(name, most):
    weight = torch.randn(40, 512, generator=torch.Generator().manual_seed(3)) * torch.logspace(-2, 0, 40)[:, None]
    error = reference.dequantise(rounded(weight, name), 512) - weight
    assert (error.norm(dim=1) < most * weight.norm(dim=1)).all()


@pytest.mark.parametrize("name", WEIGHT_TYPES)
def test_rounding_what_is_extreme(name):
    for weight in (torch.zeros(3, 256), torch.full((3, 256), -2.5), torch.eye(256)[:3] * 1e-3, torch.ones(2, 40)):
        numbers = reference.dequantise(rounded(weight, name), weight.size(1))
        assert (numbers - weight).abs().max() <= 0.04 * weight.abs().max()


# ---- writing ----


@pytest.mark.parametrize("type_name", ["q4_0", "q8_0", "q4_k_m"])
def test_a_written_file_is_read_as_what_was_rounded(tmp_path, type_name, capsys):
    path = tmp_path / "out.gguf"
    assert main(["quantise", "layerskip-tiny-code", str(path), "--type", type_name]) == 0
    assert re.search(r"out\.gguf: \d+ MB", capsys.readouterr().out)
    kept, numbers = read_checkpoint(path, keep_quantised=True), read_checkpoint("layerskip-tiny-code")
    assert replace(kept.config, rms_norm_eps=1e-6) == numbers.config  # fp32 in the file
    text = "def f(x):\n    return x + 12345\n"
    assert kept.tokenizer.encode(text) == numbers.tokenizer.encode(text)
    for name, tensor in numbers.tensors.items():
        if tensor.dim() == 2:
            found = reference.dequantise(kept.tensors[name], tensor.size(1))
            assert (found - tensor).norm() < 0.1 * tensor.norm()
        else:
            assert torch.equal(kept.tensors[name], tensor)
    if type_name == "q4_k_m":
        kinds = {reference.block_type(tensor).name for tensor in kept.tensors.values() if tensor.dim() == 3}
        assert kinds == {"q4_k", "q6_k"}


@LIVE
@pytest.mark.parametrize("type_name", ["q4_0", "q5_1", "q8_0", "q4_k_m", "q6_k"])
def test_llama_cpp_reads_what_is_written(tmp_path, type_name):
    """Its activations are rounded to 8 bits by another rule: near, not equal."""
    path, prompt = tmp_path / "out.gguf", list(range(300, 340))
    gguf_write.write_gguf(read_checkpoint("layerskip-tiny-code"), path, type_name)
    config = GenerationConfig("autoregressive", max_new_tokens=1, return_logits=True, eos_token_ids=())
    ours = generate(load_model(path, torch.float32), [prompt], config)[0].logits[0].softmax(dim=0)
    theirs = first_probabilities(path, prompt)
    difference = max(abs(float(ours[token]) - probability) for token, probability in theirs.items())
    assert len(theirs) > 100 and max(theirs.values()) > 0.05 and difference < 0.004


def test_the_command_verifies_a_written_file(tmp_path, capsys):
    path = tmp_path / "out.gguf"
    assert main(["quantise", "layerskip-tiny-code", str(path)]) == 0
    assert (
        main(["verify", "--model", str(path), "--max-new-tokens", "8", "--num-prompts", "2", "--exit-layer", "4"]) == 0
    )
    assert "all equal, bit for bit" in capsys.readouterr().out


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    def failing(rows, name):
        raise MemoryError("as asked")

    monkeypatch.setattr(gguf_write, "quantise", failing)
    with pytest.raises(MemoryError, match="as asked"):
        gguf_write.write_gguf(read_checkpoint("layerskip-tiny-code"), tmp_path / "out.gguf", "q4_0")
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_two_processes_that_write_one_file(tmp_path, monkeypatch):
    """Each under a name of its own: the last one is what is there, whole; what a killed one left is cleared."""
    path = tmp_path / "out.gguf"
    gguf_write.write_gguf(read_checkpoint("layerskip-tiny-code"), path, "q4_0")
    expected = path.read_bytes()
    left = tmp_path / ".out.gguf.1.unfinished"
    left.write_text("half")
    os.utime(left, (0, 0))
    own, quantised = gguf_write.quantise, []

    def slowly(rows, name):
        quantised.append(name)
        if len(quantised) == 5:
            with monkeypatch.context() as patch:
                patch.setattr("os.getpid", lambda: 7)
                gguf_write.write_gguf(read_checkpoint("layerskip-tiny-code"), path, "q8_0")
            assert path.read_bytes() != expected
        return own(rows, name)

    monkeypatch.setattr(gguf_write, "quantise", slowly)
    gguf_write.write_gguf(read_checkpoint("layerskip-tiny-code"), path, "q4_0")
    assert len(quantised) > 10 and path.read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["out.gguf"]


@pytest.mark.parametrize("name", BLOCKS)
def test_numbers_beyond_fp16_scales_are_refused(name):
    with pytest.raises(ValueError, match=f"too large for {name}'s fp16 scales"):
        rounded(torch.full((2, 256), 1e12), name)


def test_the_command_line_names_the_types_that_there_are():
    """It lists them itself, so that --help need not import torch."""
    assert options.WEIGHTS == ("16bit", *WEIGHT_TYPES)
    assert measurement.FILE_TYPES == tuple(gguf_write.FILE_TYPES)


def test_what_cannot_be_written_is_refused(tmp_path, capsys):
    assert main(["quantise", "layerskip-tiny-code", str(tmp_path / "out.bin")]) == 2
    assert "must end in .gguf" in capsys.readouterr().err
