"""Vocabularies of GGUF files and tokenizer.model: the ids are those that llama.cpp and sentencepiece gave (recorded by
``support.vocabularies``), and with xllamacpp installed, those that it gives for hundreds of other texts."""

import base64
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.model.bpe_splits import BPE_SPLITS
from layerskip_kernels.model.gguf_file import read_gguf
from layerskip_kernels.model.gguf_vocabulary import gguf_tokenizer
from layerskip_kernels.model.loading import read_checkpoint
from layerskip_kernels.model.sentencepiece_file import sentencepiece_tokenizer
from layerskip_kernels.model.sources import default_model_path
from layerskip_kernels.model.tokenizer import Tokenizer
from support.vocabularies import (
    PRE_NAMES,
    RECORDED,
    SPECIALS,
    SPM_FLAGS,
    USER_DEFINED,
    LlamaCpp,
    bpe_vocabulary,
    random_texts,
    spm_vocabulary,
    write_vocabulary,
)

LIVE = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


@pytest.fixture
def merges(recorded: dict[str, Any]) -> list[str]:
    return recorded["bpe"]["merges"]


def encode_all(path: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = gguf_tokenizer(read_gguf(path))
    return [tokenizer.encode(text).ids for text in texts]


@pytest.mark.parametrize("pre", PRE_NAMES)
def test_byte_level_vocabularies_are_cut_as_llama_cpp_cuts(tmp_path: Path, recorded: dict[str, Any], pre: str):
    bpe = recorded["bpe"]
    path = write_vocabulary(tmp_path / "m.gguf", bpe_vocabulary(bpe["merges"], pre))
    assert encode_all(path, bpe["texts"]) == bpe["ids"][pre]


def test_the_recorded_ids_tell_the_ways_to_cut_apart(recorded: dict[str, Any]):
    ids = list(recorded["bpe"]["ids"].values())
    assert all(ids[i] != ids[j] for i in range(len(ids)) for j in range(i))
    assert {split for split in BPE_SPLITS.values()} == {BPE_SPLITS[pre] for pre in PRE_NAMES}


@pytest.mark.parametrize("flags", SPM_FLAGS)
def test_sentencepiece_vocabularies_merge_as_llama_cpp_merges(tmp_path: Path, recorded: dict[str, Any], flags: str):
    spm = recorded["spm"]
    path = write_vocabulary(tmp_path / "m.gguf", spm_vocabulary(spm["pieces"]), **SPM_FLAGS[flags])
    assert encode_all(path, spm["texts"]) == spm["ids"][flags]


def test_the_default_models_ids_are_llama_cpps(recorded: dict[str, Any]):
    smollm2 = recorded["smollm2"]
    assert encode_all(default_model_path(), smollm2["texts"]) == smollm2["ids"]


@LIVE
@pytest.mark.parametrize("pre", PRE_NAMES)
def test_llama_cpp_gives_the_same_ids_now(tmp_path: Path, merges: list[str], pre: str):
    path = write_vocabulary(tmp_path / "m.gguf", bpe_vocabulary(merges, pre))
    texts, judge = random_texts(300, seed=11, specials=SPECIALS + USER_DEFINED), LlamaCpp(path)
    assert encode_all(path, texts) == [judge.encode(text) for text in texts]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tokenizer_model_alone(tmp_path: Path, recorded: dict[str, Any], kind: str):
    recording = recorded["sentencepiece"]
    (tmp_path / "tokenizer.model").write_bytes(base64.b64decode(recording["models"][kind]["model"]))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer is not None
    for text, ids in zip(recording["texts"], recording["models"][kind]["ids"], strict=True):
        if kind == "bpe" and text.startswith(" "):  # Transformers puts no space before it, sentencepiece does
            continue
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        if kind == "bpe":
            assert tokenizer.decode([1, *ids]) == text
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "add_eos_token": true}')
    assert Tokenizer.from_directory(tmp_path).encode("the fox") == [*tokenizer.encode("the fox")[1:], 2]


def test_tokens_added_beside_tokenizer_model(tmp_path: Path, recorded: dict[str, Any]):
    (tmp_path / "tokenizer.model").write_bytes(base64.b64decode(recorded["sentencepiece"]["models"]["bpe"]["model"]))
    size = Tokenizer.from_directory(tmp_path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": size}))
    assert Tokenizer.from_directory(tmp_path).encode("<extra>") == [1, size]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": size + 5}))
    with pytest.raises(ValueError, match=r"tokenizer\.model cannot be read.*added_tokens\.json gives '<extra>' the id"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "has bos_id 1, but 1 pieces"),
        (b"", "has unk_id 0, but 0 pieces"),
        (b"\x0a\xff\xff\xff\xff\x0f", "a field of 4294967295 bytes at 6, beyond the end"),
        (b"\x0b", "wire type 3"),
        (b"\x80" * 20, "a number of more than 10 bytes"),
        (b"\x0a\x02\x0a\x05", "beyond the end"),
        (b"\x08\x01", "a number stands where text"),
        (b"\x0a\x04\x0a\x02\xff\xfe", "not a sentencepiece model"),
    ],
)
def test_a_damaged_tokenizer_model_is_named(tmp_path: Path, raw: bytes, problem: str):
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(ValueError, match=r"tokenizer\.model cannot be read, and there is no tokenizer\.json") as error:
        Tokenizer.from_directory(tmp_path)
    assert problem in str(error.value) and len(str(error.value)) < 600


def test_every_truncation_of_tokenizer_model_is_refused_or_read(tmp_path: Path, recorded: dict[str, Any]):
    raw = base64.b64decode(recorded["sentencepiece"]["models"]["bpe"]["model"])
    for end in range(0, len(raw), 37):
        (tmp_path / "tokenizer.model").write_bytes(raw[:end])
        try:
            assert sentencepiece_tokenizer(tmp_path / "tokenizer.model").encode("the fox").ids
        except ValueError as error:
            assert "tokenizer.model" in str(error)


# ---- BOS, EOS, special tokens ----


@pytest.mark.parametrize(
    ("pre", "flags", "before", "after"),
    [
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
        ("tekken", {}, True, False),
        ("smollm", {}, False, False),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
def test_bos_and_eos(tmp_path: Path, merges: list[str], pre: str, flags: dict, before: bool, after: bool):
    vocabulary = bpe_vocabulary(merges, pre)
    tokenizer = Tokenizer(gguf_tokenizer(read_gguf(write_vocabulary(tmp_path / "m.gguf", vocabulary, **flags))))
    ids, plain = tokenizer.encode("the fox"), tokenizer.encode("the fox", add_special_tokens=False)
    bos, eos = vocabulary["bos_token_id"], vocabulary["eos_token_id"]
    assert ids == [bos] * before + plain + [eos] * after
    # BOS once, also for a text that begins with it, as a chat template writes it.
    assert tokenizer.encode("<|begin|>the fox") == [bos] + plain + [eos] * after
    assert tokenizer.encode("") == [bos] * before + [eos] * after


def test_control_tokens_are_not_shown_and_user_defined_ones_are(tmp_path: Path, merges: list[str]):
    path = write_vocabulary(tmp_path / "m.gguf", bpe_vocabulary(merges, "gpt-2"))
    tokenizer = Tokenizer(gguf_tokenizer(read_gguf(path)))
    ids = tokenizer.encode("<|begin|>a<tool>b<|end_of_text|>")
    assert tokenizer.decode(ids) == "a<tool>b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|begin|>a<tool>b<|end_of_text|>"


@pytest.mark.parametrize(
    ("keys", "ends"),
    [
        ({}, ["<|end_of_text|>"]),
        ({"eot_token_id": "<tool>"}, ["<|end_of_text|>", "<tool>"]),
        ({"eom_token_id": "<|begin|>"}, ["<|end_of_text|>", "<|begin|>"]),
        ({"eos_token_id": "<tool>"}, ["<tool>", "<|end_of_text|>"]),
    ],
)
def test_end_of_turn_ends_a_text(tmp_path: Path, monkeypatch, merges: list[str], keys: dict, ends: list[str]):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    vocabulary = bpe_vocabulary(merges, "gpt-2")
    ids = {key: vocabulary["tokens"].index(token) for key, token in keys.items()}
    config = read_checkpoint(write_vocabulary(tmp_path / "m.gguf", vocabulary, **ids)).config
    assert [vocabulary["tokens"][i] for i in config.eos_token_ids] == ends


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"pre": "poro-chat"},
            UnsupportedModel,
            r"m\.gguf: tokenizer\.ggml\.pre is 'poro-chat'; supported: .*qwen2",
        ),
        ({"model": "bert"}, UnsupportedModel, r"m\.gguf: tokenizer\.ggml\.model is 'bert'; supported: gpt2, llama"),
        ({"merges": ["q q"]}, ValueError, r"m\.gguf has the merge 'q q', which is not of two tokens that make a third"),
        ({"merges": ["qq"]}, ValueError, r"m\.gguf has the merge 'qq'"),
        ({"merges": [1, 2]}, ValueError, r"m\.gguf has metadata key 'tokenizer\.ggml\.merges' of type 5"),
        ({"token_type": [1, 1]}, ValueError, r"m\.gguf has 2 numbers in 'tokenizer\.ggml\.token_type' for \d+ tokens"),
        ({"add_bos_token": True, "bos_token_id": 10**6}, ValueError, r"m\.gguf has .*bos_token_id 1000000; it must be"),
        ({"add_bos_token": "yes"}, ValueError, r"m\.gguf has tokenizer\.ggml\.add_bos_token yes; it must be true or"),
        ({"tokens": ["a", "b", "a"]}, ValueError, r"m\.gguf has the token 'a' twice: ids 0 and 2"),
        ({"model": "llama"}, ValueError, r"m\.gguf needs a number in 'tokenizer\.ggml\.scores' for each of its \d+"),
    ],
)
def test_a_vocabulary_that_does_not_convert_is_named(
    tmp_path: Path, merges: list[str], changes: dict, error: type[Exception], message: str
):
    path = write_vocabulary(tmp_path / "m.gguf", bpe_vocabulary(merges, "gpt-2") | changes)
    with pytest.raises(error, match=message) as raised:
        gguf_tokenizer(read_gguf(path))
    assert len(str(raised.value)) < 1200


def test_a_file_without_a_pre_tokenizer_gets_the_default_and_a_warning(tmp_path: Path, recorded: dict[str, Any]):
    bpe = recorded["bpe"]
    vocabulary = bpe_vocabulary(bpe["merges"], "default")
    del vocabulary["pre"]
    with pytest.warns(UserWarning, match=r"lacks tokenizer\.ggml\.pre"):
        assert encode_all(write_vocabulary(tmp_path / "m.gguf", vocabulary), bpe["texts"]) == bpe["ids"]["default"]


def test_transformers_is_not_needed(tmp_path: Path, merges: list[str]):
    path = write_vocabulary(tmp_path / "m.gguf", bpe_vocabulary(merges, "llama-bpe"))
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from layerskip_kernels.model.loading import read_checkpoint\n"
        "print(len(read_checkpoint(sys.argv[1]).tokenizer.encode('the fox')))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 1


def test_a_panic_of_the_library_is_an_error_with_the_files_name(tmp_path: Path):
    state = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None}
    model = {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state | {"post_processor": None, "model": model}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot encode this text"):
        tokenizer.encode("zzz")
