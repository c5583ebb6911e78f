"""GGUF files: each type of theirs, converted once; every damaged file is refused by name."""

import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from torch import Tensor

from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.model import gguf_convert
from layerskip_kernels.model.hf_config import read_hf_config
from layerskip_kernels.model.loading import read_checkpoint
from layerskip_kernels.model_config import RopeScaling
from support.checkpoint_files import HF_CONFIG, UP, assert_same, random_tensors
from support.gguf_files import write_gguf


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of converted files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "layerskip_kernels"


def conversions(cache: Path) -> list[Path]:
    """The directories in the cache, half-made ones too: all but its lock."""
    return [path for path in cache.iterdir() if path.name != ".lock"] if cache.is_dir() else []


GgmlType = gguf.GGMLQuantizationType


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
    expected = read_hf_config(HF_CONFIG | {"rms_norm_eps": float(np.float32(1e-5)), "rope_theta": 5e5})
    assert read_checkpoint(tmp_path / "tiny.gguf").config == expected


def test_an_untied_gguf_file_with_biases(tmp_path: Path, cache: Path):
    tensors = random_tensors(HF_CONFIG | {"tie_word_embeddings": False, "attention_bias": True})
    write_gguf(tmp_path / "tiny.gguf", tensors)
    checkpoint = read_checkpoint(tmp_path / "tiny.gguf")
    assert checkpoint.config.qkv_bias and checkpoint.config.out_bias and not checkpoint.config.tie_word_embeddings
    assert_same(checkpoint, tensors)


def test_transformers_reads_the_same_rows(tmp_path: Path, cache: Path):
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG), GgmlType.Q8_0, llama__vocab_size=96)
    checkpoint = read_checkpoint(tmp_path / "tiny.gguf", torch.float32)
    (converted,) = conversions(cache)
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
        ({"arch": "qwen2moe"}, "general.architecture"),
        ({"llama__expert_count": 8}, "llama.expert_count"),
        ({"llama__attention__sliding_window": 32}, "llama.attention.sliding_window"),
        ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count"),
        ({"llama__attention__value_length": 32}, "llama.attention.value_length"),
        ({"llama__rope__scaling__type": "longrope"}, "llama.rope.scaling.type"),
        ({"llama__attention__head_count": [4, 4]}, "llama.attention.head_count"),
        ({"llama__rope__freq_base": "big"}, "llama.rope.freq_base"),
    ],
)
def test_another_gguf_model_is_refused_by_field(tmp_path: Path, cache: Path, changes: dict, field: str):
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG), **changes)
    with pytest.raises(UnsupportedModel) as error:
        read_checkpoint(tmp_path / "tiny.gguf")
    assert error.value.field == field
    assert conversions(cache) == []


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
        ({"llama__block_count": 2**32 - 1}, r"tiny\.gguf: num_hidden_layers must be an integer .* got 4294967295"),
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
    assert conversions(cache) == []


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
    (TYPE, 15, UnsupportedModel, "is 'Q8_K'; supported: F32, F16, BF16, Q4_0, Q4_1"),
    (TYPE, 24, UnsupportedModel, "is 'I8'; supported"),
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
    with pytest.raises(ValueError, match=r"'blk\.1\.ffn_up\.weight' .* rows of 33, not a multiple of Q4_0's block"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("position", "code", "value", "message"),
    [
        (0, "I", 0x46554746, "not a GGUF file"),
        (4, "I", 1, "GGUF version 1; supported: 2, 3"),
        (4, "I", 3 << 24, "little-endian"),
        (8, "Q", 2**62, "the header of 4611686018427387904 tensors"),
        (16, "Q", 2**62, "4611686018427387904 metadata entries"),
        (16, "Q", 500, "is truncated|damaged|twice"),
        (24, "Q", 2**64 - 1, "the name of metadata key 0 takes 18446744073709551615 bytes"),
        (32, "B", 0xFF, "not UTF-8"),
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
    assert conversions(cache) == []


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    tensors = random_tensors(HF_CONFIG)
    write_gguf(tmp_path / "tiny.gguf", tensors)
    read_checkpoint(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf_convert, "convert_gguf", lambda *args: pytest.fail("converted again"))
    assert_same(read_checkpoint(tmp_path / "tiny.gguf"), tensors)
    (converted,) = conversions(cache)
    assert re.fullmatch(r"tiny-[0-9a-f]{24}-exact", converted.name)
    assert load_file(converted / "model.safetensors").keys() == tensors.keys()


def test_a_gguf_file_of_any_name(tmp_path: Path, cache: Path):
    """Caches name files by their hashes; and a folder of GGUF files is no model, but says what it holds."""
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG), GgmlType.F32)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing; .* the GGUF file in it, such as tiny\.gguf"):
        read_checkpoint(tmp_path)
    expected = read_checkpoint(tmp_path / "tiny.gguf").tensors
    (tmp_path / "tiny.gguf").rename(tmp_path / "sha256-0a1b")
    found = read_checkpoint(tmp_path / "sha256-0a1b")
    assert found.name == "sha256-0a1b"
    assert all(torch.equal(found.tensors.pop(name), expected.pop(name)) for name in list(expected))
