"""The ids are those of Transformers on 200 texts (code, emoji, Thai, Arabic, runs of white space, special tokens):
from a tokenizer.json, from a tokenizer.model alone and from GGUF vocabularies of both kinds."""

import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from layerskip_kernels.model.gguf_file import read_gguf
from layerskip_kernels.model.gguf_vocabulary import gguf_tokenizer
from layerskip_kernels.model.tokenizer import Tokenizer
from support.vocabularies import (
    RECORDED,
    SPECIALS,
    USER_DEFINED,
    WORDS,
    bpe_vocabulary,
    random_texts,
    spm_vocabulary,
    write_vocabulary,
)

transformers = pytest.importorskip("transformers", minversion="5.20")


def texts_with(specials: list[str], bos: str) -> list[str]:
    """200 texts; none begins with BOS, which Transformers would put before it a second time."""
    texts = [text for text in random_texts(230, seed=31, specials=specials) if not text.startswith(bos)]
    assert len(texts) >= 200 and all(sum(special in text for text in texts) >= 10 for special in specials)
    return texts[:200]


def assert_same(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]


# ---- tokenizer.json ----


def byte_level(name: str, **settings: Any) -> Any:
    """Transformers' own class of a family, on a small vocabulary."""
    vocabulary = bpe_vocabulary(json.loads(RECORDED.read_text())["bpe"]["merges"], "gpt-2")
    size = len(vocabulary["tokens"]) - len(SPECIALS) - len(USER_DEFINED)
    vocab = {token: index for index, token in enumerate(vocabulary["tokens"][:size])}
    merges = [tuple(merge.split(" ")) for merge in vocabulary["merges"]]
    theirs = getattr(transformers, name)(vocab=vocab, merges=merges, bos_token=SPECIALS[0], eos_token=SPECIALS[1])
    theirs.add_special_tokens({"additional_special_tokens": SPECIALS[2:]})
    theirs.add_tokens(USER_DEFINED)
    return theirs


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_byte_level_tokenizer_json(tmp_path: Path, name: str):
    byte_level(name).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    assert_same(Tokenizer.from_directory(tmp_path), theirs, texts_with(SPECIALS + USER_DEFINED, SPECIALS[0]))


# ---- tokenizer.model alone ----


@cache
def sentencepiece_model(prefix: bool) -> bytes:
    """Trained as the published ones are: BPE, bytes for what is unknown, spaces kept; Gemma's puts none before."""
    import sentencepiece

    model, draw = io.BytesIO(), random.Random(1)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(draw.choices(WORDS, k=20)) for _ in range(400)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=900,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<tool>"],
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()


def of_pieces(name: str, model: bytes, **settings: Any) -> Any:
    """What Transformers makes of a tokenizer.model, which it reads with protobuf: the class from pieces and merges."""
    import sentencepiece
    from transformers.tokenization_utils_base import generate_merges

    judge = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {judge.id_to_piece(index): index for index in range(judge.get_piece_size())}
    theirs = getattr(transformers, name)(vocab=vocab, merges=generate_merges(vocab), **settings)
    theirs.add_special_tokens({"additional_special_tokens": ["<s>", "</s>"]})
    theirs.add_tokens(["<tool>"])
    return theirs


@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"add_bos_token": False, "add_eos_token": True}], ids=str)
def test_tokenizer_model_alone(tmp_path: Path, settings: dict[str, bool]):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(prefix=True))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = of_pieces("LlamaTokenizer", sentencepiece_model(prefix=True), **{"add_bos_token": True} | settings)
    assert_same(Tokenizer.from_directory(tmp_path), theirs, texts_with(["<s>", "</s>", "<tool>"], "<s>"))


# ---- GGUF ----


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2"])
@pytest.mark.parametrize("bos", [True, False])
def test_gguf_vocabularies_of_bytes(tmp_path: Path, pre: str, bos: bool):
    merges = json.loads(RECORDED.read_text())["bpe"]["merges"]
    path = write_vocabulary(tmp_path / "m.gguf", bpe_vocabulary(merges, pre), add_bos_token=bos)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    # Transformers does not find user-defined tokens with spaces, which llama.cpp and we take whole.
    tool, spaces = USER_DEFINED
    texts = [text.replace(spaces, " ") for text in texts_with([*SPECIALS, tool], SPECIALS[0])]
    assert_same(Tokenizer(gguf_tokenizer(read_gguf(path))), theirs, [text for text in texts if spaces not in text])


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_gguf_vocabularies_of_sentencepiece(tmp_path: Path, bos: bool, architecture: str):
    """Of Llama's files Transformers puts a space before a text alone, and none before a space; we put it where
    llama.cpp does, and Transformers for Phi 3: also there and after special tokens."""
    vocabulary = spm_vocabulary(json.loads(RECORDED.read_text())["spm"]["pieces"])
    path = write_vocabulary(tmp_path / "m.gguf", vocabulary, architecture, add_bos_token=bos)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    if architecture == "llama":
        texts = [text.lstrip(" ") for text in random_texts(200, seed=32)]
    else:
        texts = texts_with(["[INST]", "</s>", "<tool>"], "<s>")
    assert_same(Tokenizer(gguf_tokenizer(read_gguf(path))), theirs, texts)
