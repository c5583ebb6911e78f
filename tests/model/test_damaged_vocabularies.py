"""Hundreds of damaged GGUF files, tokenizer.json and tokenizer.model: read, or an error that names the file, soon."""

import base64
import json
import random
import time
from pathlib import Path

import pytest

from layerskip_kernels.model.gguf_file import read_gguf
from layerskip_kernels.model.gguf_vocabulary import gguf_tokenizer
from layerskip_kernels.model.loading import read_checkpoint
from layerskip_kernels.model.tokenizer import Tokenizer
from support.vocabularies import RECORDED, bpe_vocabulary, spm_vocabulary, write_vocabulary

TRIES = 500
SECONDS = 60.0  # of CPU for all of them; they take under 15


def damaged(raw: bytes, draw: random.Random, upto: int) -> bytes:
    """Bytes changed, a run overwritten with zeros or ones, a piece doubled or left out, or the end cut off."""
    position, kind = draw.randrange(upto), draw.randrange(5)
    length = draw.choice([1, 4, 8, 64])
    if kind == 0:
        return raw[:position] + draw.randbytes(1) + raw[position + 1 :]
    if kind == 1:
        return raw[:position] + draw.choice([b"\0", b"\xff"]) * length + raw[position + length :]
    if kind == 2:
        return raw[:position] + raw[position : position + length] * 2 + raw[position + length :]
    return raw[:position] + raw[position + length :] if kind == 3 else raw[:position]


def outcomes(path: Path, raw: bytes, upto: int, use) -> tuple[int, int]:
    """How many damaged files were read, and how many refused by name in a short message."""
    draw, read, refused, began = random.Random(3), 0, 0, time.process_time()
    for _ in range(TRIES):
        path.write_bytes(damaged(raw, draw, upto))
        try:
            use(path)
            read += 1
        except ValueError as error:  # UnsupportedModel too
            assert path.name in str(error) and len(str(error)) < 1500, str(error)[:300]
            refused += 1
    assert time.process_time() - began < SECONDS
    return read, refused


@pytest.mark.parametrize("kind", ["bpe", "spm"])
@pytest.mark.filterwarnings("ignore:.*lacks tokenizer.ggml.pre")
def test_damaged_gguf_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    recorded = json.loads(RECORDED.read_text())
    merges, pieces = recorded["bpe"]["merges"][:100], recorded["spm"]["pieces"][:100]
    vocabulary = bpe_vocabulary(merges, "llama-bpe") if kind == "bpe" else spm_vocabulary(pieces)
    path = write_vocabulary(tmp_path / "damaged.gguf", vocabulary)
    raw = path.read_bytes()

    def use(path: Path) -> None:
        gguf = read_gguf(path)
        if tokenizer := gguf_tokenizer(gguf):
            tokenizer.decode(tokenizer.encode("the fox").ids)

    read, refused = outcomes(path, raw, len(read_gguf(path).header), use)
    assert read > 20 and refused > 100
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(f"{__name__}.TRIES", 60)
    read, refused = outcomes(path, raw, len(raw), read_checkpoint)
    assert read and refused


def test_damaged_tokenizer_json(tmp_path: Path):
    recorded = json.loads(RECORDED.read_text())
    path = write_vocabulary(tmp_path / "m.gguf", bpe_vocabulary(recorded["bpe"]["merges"][:100], "llama-bpe"))
    raw = gguf_tokenizer(read_gguf(path)).to_str().encode()
    read, refused = outcomes(tmp_path / "tokenizer.json", raw, len(raw), use_tokenizer)
    assert read and refused > 100


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_damaged_tokenizer_model(tmp_path: Path, kind: str):
    raw = base64.b64decode(json.loads(RECORDED.read_text())["sentencepiece"]["models"][kind]["model"])
    read, refused = outcomes(tmp_path / "tokenizer.model", raw, len(raw), use_tokenizer)
    assert read and refused > 100


def use_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer.from_directory(path.parent)
    assert tokenizer is not None
    tokenizer.decode(tokenizer.encode("the fox é"))
