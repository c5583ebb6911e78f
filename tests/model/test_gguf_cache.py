"""Conversions of GGUF files: made once, by one process, of what the file is now, and never read half-made."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.model import gguf_cache, gguf_convert
from layerskip_kernels.model.gguf_cache import converted_directory
from layerskip_kernels.model.gguf_file import read_gguf
from layerskip_kernels.model.loading import read_checkpoint
from support.checkpoint_files import HF_CONFIG, assert_same, random_tensors
from support.gguf_files import write_gguf, write_parts

GgmlType = gguf.GGMLQuantizationType


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of converted files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "layerskip_kernels"


def conversions(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock") if cache.is_dir() else []


def readable_types() -> list[str]:
    """The quantised types that this version of `gguf` can dequantise."""
    names = []
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, size), np.uint8), kind)
        except (NotImplementedError, ValueError):
            continue
        names.append(kind.name)
    return sorted(set(names) - {"F32", "F16", "BF16"})


@pytest.mark.parametrize("name", readable_types())
def test_every_type_that_gguf_can_dequantise(tmp_path: Path, cache: Path, name: str):
    kind, hf_config = GgmlType[name], HF_CONFIG | {"intermediate_size": 256}
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Small bytes: as scales they are finite in every type.
    raw = np.random.default_rng(1).integers(0, 4, (64, 256 // block * size), dtype=np.uint8)
    tensors = random_tensors(hf_config)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tensors, raw={"blk.1.ffn_down.weight": (kind, raw)}, llama__feed_forward_length=256)
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.from_numpy(dequantize(raw, kind))
    assert_same(read_checkpoint(path, torch.float32), tensors)
    own = read_checkpoint(path)
    assert own.dtype == torch.bfloat16
    assert_same(own, {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_the_types_are_those_of_llama_cpps_files():
    assert set("Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split()) <= set(readable_types())


def test_a_q4_0_file_with_a_q6_k_head(tmp_path: Path, cache: Path):
    """As llama.cpp makes them: token_embd in another type than the rest."""
    hf_config = HF_CONFIG | {"hidden_size": 256, "head_dim": 64}
    tensors = random_tensors(hf_config)
    raw = np.random.default_rng(1).integers(0, 4, (96, 210), dtype=np.uint8)
    sizes = {"llama__embedding_length": 256, "llama__rope__dimension_count": 64}
    path = tmp_path / "m.gguf"
    write_gguf(path, tensors, GgmlType.Q4_0, raw={"token_embd.weight": (GgmlType.Q6_K, raw)}, **sizes)
    read = read_checkpoint(path, torch.float32).tensors
    assert torch.equal(read["model.embed_tokens.weight"], torch.from_numpy(dequantize(raw, GgmlType.Q6_K)))
    up = tensors["model.layers.1.mlp.up_proj.weight"].numpy()
    expected = torch.from_numpy(dequantize(quantize(up, GgmlType.Q4_0), GgmlType.Q4_0))
    assert torch.equal(read["model.layers.1.mlp.up_proj.weight"], expected)


def test_no_more_is_written_than_is_loaded(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture):
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG), GgmlType.Q8_0)
    values = sum(tensor.numel() for tensor in random_tensors(HF_CONFIG).values())
    for dtype, width, label in ((None, 2, "bfloat16"), (torch.float16, 2, "float16"), (torch.float32, 4, "exact")):
        directory = converted_directory(tmp_path / "tiny.gguf", dtype)
        assert directory.name.endswith(f"-{label}")
        assert 0 < (directory / "model.safetensors").stat().st_size - width * values < 8192
        named = "float32" if label == "exact" else label
        assert f"tiny.gguf: its Q8_0 tensors are read as {named}" in capsys.readouterr().err
    assert len(conversions(cache)) == 3


def test_a_16_bit_file_is_converted_once_for_all_dtypes(tmp_path: Path, cache: Path):
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG), GgmlType.F16)
    for dtype in (None, torch.float16, torch.bfloat16, torch.float32):
        read_checkpoint(tmp_path / "tiny.gguf", dtype)
    assert len(conversions(cache)) == 1


def test_a_value_beyond_the_range_of_16_bits_is_named(tmp_path: Path, cache: Path):
    tensors = random_tensors(HF_CONFIG)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e30
    write_gguf(tmp_path / "tiny.gguf", tensors)
    with pytest.raises(ValueError, match=r"'blk\.1\.ffn_up\.weight' in .*tiny\.gguf has values beyond the range of"):
        read_checkpoint(tmp_path / "tiny.gguf", torch.float16)
    assert conversions(cache) == []


# ---- what a conversion was made from ----


def test_a_changed_file_is_converted_again_and_its_old_conversion_removed(tmp_path: Path, cache: Path):
    path, first, second = tmp_path / "tiny.gguf", random_tensors(HF_CONFIG), random_tensors(HF_CONFIG)
    write_gguf(path, first)
    assert_same(read_checkpoint(path), first)
    [before] = conversions(cache)
    second["model.norm.weight"] += 1.0
    status = path.stat()
    write_gguf(path, second)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # even when its time is put back
    assert_same(read_checkpoint(path), second)
    [after] = conversions(cache)
    assert before != after


@pytest.mark.parametrize("what", ["the conversion", "gguf", "tokenizers"])
def test_an_upgrade_converts_again(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, what: str):
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG))
    read_checkpoint(tmp_path / "tiny.gguf")
    [before] = conversions(cache)
    (cache / ("0" * 64 + "-v1")).mkdir()  # as the first version of this package named them
    if what == "the conversion":
        monkeypatch.setattr(gguf_cache, "CONVERSION", gguf_cache.CONVERSION + 1)
    else:
        monkeypatch.setattr(gguf_cache, "_library_versions", lambda: {"gguf": "1", "tokenizers": "1", what: "2"})
    read_checkpoint(tmp_path / "tiny.gguf")
    [after] = conversions(cache)
    assert before != after


def test_another_files_conversion_stays(tmp_path: Path, cache: Path):
    for name in ("a", "b"):
        write_gguf(tmp_path / f"{name}.gguf", random_tensors(HF_CONFIG))
        read_checkpoint(tmp_path / f"{name}.gguf")
    assert [name[0] for name in conversions(cache)] == ["a", "b"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "manifest", "deep"])
def test_a_damaged_conversion_is_made_again(tmp_path: Path, cache: Path, damage: str):
    tensors = random_tensors(HF_CONFIG)
    write_gguf(tmp_path / "tiny.gguf", tensors)
    weights = converted_directory(tmp_path / "tiny.gguf") / "model.safetensors"
    if damage == "cut":
        os.truncate(weights, 100)
    elif damage == "flipped":
        weights.write_bytes(weights.read_bytes().replace(b"F32", b"X32", 1))
    elif damage == "gone":
        weights.unlink()
    else:
        weights.with_name("conversion.json").write_text("{" if damage == "manifest" else "[" * 100_000)
    assert_same(read_checkpoint(tmp_path / "tiny.gguf"), tensors)


# ---- other processes, and kills ----

SLOW = """
import sys, time
from pathlib import Path
from layerskip_kernels.model import gguf_cache, gguf_convert
read, marker = gguf_convert.read_gguf_tensor, Path(sys.argv[2])
def slowly(tensor):
    marker.touch()
    time.sleep(float(sys.argv[3]))
    return read(tensor)
gguf_convert.read_gguf_tensor = slowly
print(gguf_cache.converted_directory(Path(sys.argv[1])))
"""


def start(path: Path, marker: Path, seconds: float) -> subprocess.Popen:
    """A process that converts, waiting before each tensor; returns when it has begun."""
    command = [sys.executable, "-c", SLOW, str(path), str(marker), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not marker.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return process


def test_two_processes_convert_one_file_once(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture):
    tensors = random_tensors(HF_CONFIG)
    write_gguf(tmp_path / "tiny.gguf", tensors)
    process = start(tmp_path / "tiny.gguf", tmp_path / "begun", 0.02)
    directory = converted_directory(tmp_path / "tiny.gguf")
    assert "Waiting for another process that converts a GGUF file" in capsys.readouterr().err
    assert process.communicate(timeout=60)[0].strip() == str(directory)
    assert_same(read_checkpoint(tmp_path / "tiny.gguf"), tensors)
    assert len(conversions(cache)) == 1


def test_what_a_killed_conversion_left_is_cleared_and_never_read(tmp_path: Path, cache: Path):
    tensors = random_tensors(HF_CONFIG)
    write_gguf(tmp_path / "tiny.gguf", tensors)
    process = start(tmp_path / "tiny.gguf", tmp_path / "begun", 60)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert [name for name in conversions(cache) if name.startswith(".converting-")]
    assert_same(read_checkpoint(tmp_path / "tiny.gguf"), tensors)
    [name] = conversions(cache)
    assert name.startswith("tiny-")


def test_without_locks_the_first_to_finish_wins(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    tensors = random_tensors(HF_CONFIG)
    write_gguf(tmp_path / "tiny.gguf", tensors)
    monkeypatch.setattr(gguf_cache, "_lock", lambda descriptor, cache: False)
    convert = gguf_convert.convert_gguf

    def convert_after_another(*arguments) -> None:
        monkeypatch.setattr(gguf_convert, "convert_gguf", convert)
        read_checkpoint(tmp_path / "tiny.gguf")
        convert(*arguments)

    monkeypatch.setattr(gguf_convert, "convert_gguf", convert_after_another)
    assert_same(read_checkpoint(tmp_path / "tiny.gguf"), tensors)
    assert len(conversions(cache)) == 1


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG))
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(gguf_cache.shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match=r"converting .*tiny\.gguf takes \d+ MB in .*; free some, or set XDG_CACHE_HOME"):
        read_checkpoint(tmp_path / "tiny.gguf")
    assert conversions(cache) == []


# ---- split files ----


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    write_gguf(tmp_path / "whole.gguf", random_tensors(HF_CONFIG))
    return write_parts(tmp_path / "whole.gguf", 3)


def test_a_split_model_is_read_from_any_part(cache: Path, parts: list[Path]):
    for part in parts:
        assert_same(read_checkpoint(part), random_tensors(HF_CONFIG))


def test_a_missing_part_is_named(cache: Path, parts: list[Path]):
    parts[1].unlink()
    for part in (parts[0], parts[2]):
        with pytest.raises(FileNotFoundError, match=r"00002-of-00003\.gguf is missing: .* is a part of 3"):
            read_checkpoint(part)


def test_swapped_parts_are_named(cache: Path, parts: list[Path]):
    middle = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    parts[2].write_bytes(middle)
    with pytest.raises(ValueError, match=r"00002-of-00003\.gguf says that it is part 2 of 3, .* the parts are swapped"):
        read_checkpoint(parts[0])


def test_a_part_under_another_name_says_what_to_do(cache: Path, parts: list[Path]):
    renamed = parts[0].rename(parts[0].with_name("first.gguf"))
    with pytest.raises(ValueError, match=r"first\.gguf is one part of 3 .*`llama-gguf-split --merge"):
        read_checkpoint(renamed)


def test_a_part_of_another_model_is_found(tmp_path: Path, cache: Path, parts: list[Path]):
    parts[2].write_bytes(write_parts(tmp_path / "whole.gguf", 3, "other", drop=1)[2].read_bytes())
    with pytest.raises(ValueError, match=r"hold 19 tensors, but split\.tensors\.count is 20"):
        read_checkpoint(parts[0])


# ---- hostile files, in bounded time and memory ----


def hostile(path: Path, head: bytes, size: int) -> Path:
    path.write_bytes(head)
    os.truncate(path, size)
    return path


def header(tensors: int, entries: int) -> bytes:
    return b"GGUF" + (3).to_bytes(4, "little") + tensors.to_bytes(8, "little") + entries.to_bytes(8, "little")


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return len(key).to_bytes(8, "little") + key + kind.to_bytes(4, "little") + value


GB = 1 << 30
STRINGS = (8).to_bytes(4, "little")
HOSTILE = {
    "a hole": (b"\0", 40 * GB),
    "empty strings in a hole": (header(0, 1) + entry(b"a", 9, STRINGS + (25_000_000).to_bytes(8, "little")), GB),
    "empty strings, fewer": (header(0, 1) + entry(b"a", 9, STRINGS + (2**21).to_bytes(8, "little")), GB),
    "a string as long as the hole": (header(0, 1) + entry(b"a", 8, (39 * GB).to_bytes(8, "little")), 40 * GB),
    "a long key": (header(0, 1) + (1 << 26).to_bytes(8, "little"), GB),
    "a numeric array in a hole": (header(0, 1) + entry(b"a", 9, b"\4\0\0\0" + (9 * GB).to_bytes(8, "little")), 40 * GB),
    "many entries": (header(0, GB), 40 * GB),
    "many tensors": (header(GB, 0), 40 * GB),
    "nested arrays": (header(0, 1) + entry(b"a", 9, b"\x09\0\0\0" + (2**30).to_bytes(8, "little")), 40 * GB),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_sparse_file_is_refused_at_once(tmp_path: Path, name: str):
    path = hostile(tmp_path / "hole.gguf", *HOSTILE[name])
    began = time.process_time()
    with pytest.raises(ValueError, match=r"hole\.gguf") as error:
        if name == "empty strings, fewer":  # readable; then there is no model in it
            converted_directory(path)
        else:
            read_gguf(path)
    assert time.process_time() - began < 5.0
    assert len(str(error.value)) < 500


def test_a_large_sparse_model_has_a_fingerprint_at_once(tmp_path: Path, cache: Path):
    """Its conversion would take as long as its size says; its name does not."""
    path = tmp_path / "sparse.gguf"
    write_gguf(path, random_tensors(HF_CONFIG))
    os.truncate(path, 40 * GB)
    began = time.process_time()
    assert_same(read_checkpoint(path), random_tensors(HF_CONFIG))
    assert time.process_time() - began < 5.0


def test_messages_are_short(tmp_path: Path, cache: Path):
    tensors = random_tensors(HF_CONFIG)
    write_gguf(tmp_path / "tiny.gguf", tensors, general__alignment="x" * 100_000)
    with pytest.raises(ValueError) as error:
        read_checkpoint(tmp_path / "tiny.gguf")
    assert len(str(error.value)) < 500
    write_gguf(tmp_path / "tiny.gguf", tensors, arch="x" * 100_000)
    with pytest.raises(UnsupportedModel) as unsupported:
        read_checkpoint(tmp_path / "tiny.gguf")
    assert len(str(unsupported.value)) < 500


def test_the_manifest_says_what_the_conversion_was_made_from(tmp_path: Path, cache: Path):
    write_gguf(tmp_path / "tiny.gguf", random_tensors(HF_CONFIG))
    fields = json.loads((converted_directory(tmp_path / "tiny.gguf") / "conversion.json").read_text())
    assert fields["source"] == str(tmp_path / "tiny.gguf") and fields["gguf"] and fields["tokenizers"]
    assert set(fields["files"]) == {"config.json", "model.safetensors"}
