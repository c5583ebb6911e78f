"""Quantised weights whose blocks ggml's own quantiser made, in files of our making: read, run and verified."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf.quants import dequantize

from layerskip_kernels import GenerationConfig, generate, load_model
from layerskip_kernels.cli.main import main
from layerskip_kernels.model import gguf_write
from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.loading import read_checkpoint
from layerskip_kernels.ops import reference
from support.checkpoint_files import HF_CONFIG, random_tensors
from support.ggml import ggml_blocks
from support.gguf_files import GgmlType, gguf_name, gguf_rows, write_gguf
from support.llama_cpp import LIVE

pytestmark = [LIVE, pytest.mark.usefixtures("one_thread")]

BLOCKS = list(reference.BLOCK_TYPES)
WIDE = HF_CONFIG | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}  # rows of whole blocks of 256
WIDE_KEYS = dict(llama__embedding_length=256, llama__rope__dimension_count=64, llama__feed_forward_length=256)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of converted files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def some_rows(of: str) -> torch.Tensor:
    if of == "trained":
        return read_checkpoint("layerskip-tiny-code").tensors["model.layers.3.mlp.gate_proj.weight"][:96].float()
    rows = torch.randn(24, 512, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 24)[:, None]
    rows[5], rows[7, :256] = 0.0, 0.0
    return rows


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("of", ["random", "trained"])
def test_ggmls_blocks_are_the_numbers_that_gguf_reads(name, of):
    rows = some_rows(of)
    blocks = ggml_blocks(rows, name)
    numbers = reference.dequantise(blocks, rows.size(1))
    assert torch.equal(numbers, torch.from_numpy(dequantize(blocks.flatten(1).numpy(), GgmlType[name.upper()])))
    assert (numbers - rows).norm() < 0.1 * rows.norm()


@pytest.mark.parametrize("name", BLOCKS)
def test_ggmls_blocks_are_multiplied_as_the_reference_does(name):
    blocks = ggml_blocks(some_rows("random"), name)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(2))
    got = torch.ops.layerskip.linear(x, torch.ops.layerskip.pack_weight(blocks), None, len(blocks))
    assert torch.equal(got, reference.linear(x, blocks, None, len(blocks)))


def assert_the_same_everywhere(path: Path, exit_layer: int, prompt: list[int]) -> None:
    """Plain and drafting, on the CPU, against the reference's plain decoding: tokens, logits, K and V."""
    keep = dict(max_new_tokens=10, eos_token_ids=(), return_logits=True, return_kv=True)
    plain, drafting = GenerationConfig("autoregressive", **keep), GenerationConfig(exit_layer=exit_layer, **keep)
    [expected] = generate(load_model(path, backend="reference"), [prompt], plain)
    [alone], [drafted] = (generate(load_model(path), [prompt], config) for config in (plain, drafting))
    for got in (alone, drafted):
        assert got.token_ids == expected.token_ids and torch.equal(got.logits, expected.logits)
        assert all(map(torch.equal, got.kv, expected.kv))
    assert drafted.accepted > 0


def test_a_file_of_all_types(tmp_path):
    tensors = random_tensors(WIDE)
    for part in ("self_attn.o_proj", "mlp.down_proj"):  # so that the second layer changes little: drafts are accepted
        tensors[f"model.layers.1.{part}.weight"] *= 0.02
    matrices = [name for name, tensor in tensors.items() if tensor.dim() == 2]
    types = dict(zip(matrices, BLOCKS * len(matrices), strict=False))
    raw = {}
    for name, kind in types.items():
        blocks = ggml_blocks(torch.from_numpy(gguf_rows(name, tensors[name])), kind)
        raw[gguf_name(name)] = (GgmlType[kind.upper()], blocks.flatten(1).numpy())
    write_gguf(tmp_path / "all.gguf", tensors, raw=raw, **WIDE_KEYS)
    kept = read_checkpoint(tmp_path / "all.gguf", keep_quantised=True).tensors
    assert {name: reference.block_type(kept[name]).name for name in matrices} == types
    assert set(types.values()) == set(BLOCKS)
    assert_the_same_everywhere(tmp_path / "all.gguf", 1, list(range(3, 20)))


def first_layers(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """The embedding, so many layers and the last norm: SmolLM2's shape at a test's size."""
    outside = tuple(f"model.layers.{layer}." for layer in range(count, checkpoint.config.num_layers))
    tensors = {name: checkpoint.tensors[name] for name in checkpoint.tensors if not name.startswith(outside)}
    config = replace(checkpoint.config, num_layers=count)
    return replace(checkpoint, config=config, tensors=tensors, defaults=None)


@pytest.mark.parametrize(
    ("source", "num_layers", "exit_layer", "kinds"),
    [
        ("layerskip-tiny-code", 12, 4, {"q4_k", "q6_k"}),
        # Its rows of 576 are no whole blocks of 256, and get the types that llama.cpp gives them in their place.
        ("smollm2-135m-parse", 6, 5, {"q5_0", "q8_0", "q4_k", "q6_k"}),
    ],
)
def test_the_mix_of_q4_k_m(tmp_path, monkeypatch, capsys, source, num_layers, exit_layer, kinds):
    path = tmp_path / "mix.gguf"
    checkpoint = first_layers(read_checkpoint(source), num_layers)
    prompt = checkpoint.tokenizer.encode("def fibonacci(n):" if "code" in source else "play some jazz =>")
    monkeypatch.setattr(gguf_write, "quantise", ggml_blocks)
    gguf_write.write_gguf(checkpoint, path, "q4_k_m")
    kept = read_checkpoint(path, keep_quantised=True).tensors.values()
    assert {reference.block_type(tensor).name for tensor in kept if tensor.dim() == 3} == kinds
    assert_the_same_everywhere(path, exit_layer, prompt)
    verify = ["verify", "--model", str(path), "--max-new-tokens", "8", "--num-prompts", "2"]
    assert main([*verify, "--exit-layer", str(exit_layer)]) == 0
    assert "all equal, bit for bit" in capsys.readouterr().out
