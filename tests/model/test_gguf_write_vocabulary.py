"""Vocabularies written into GGUF files: read back, and by llama.cpp, they give the ids of the tokenizer they were."""

import base64
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers.models import BPE

from layerskip_kernels.model.gguf_file import read_gguf
from layerskip_kernels.model.gguf_vocabulary import gguf_tokenizer
from layerskip_kernels.model.gguf_write_vocabulary import vocabulary_metadata
from layerskip_kernels.model.tokenizer import Tokenizer
from support.llama_cpp import LIVE
from support.models import config
from support.vocabularies import (
    RECORDED,
    SPACE,
    SPECIALS,
    USER_DEFINED,
    LlamaCpp,
    bpe_vocabulary,
    random_texts,
    spm_vocabulary,
    write_vocabulary,
)


def published_vocabularies() -> list[Path]:
    """Mistral's, of the package mistral-common."""
    found = importlib.util.find_spec("mistral_common")
    folder = Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else Path("none")
    return sorted(folder.glob("data/*tokenizer*.model.*"))[-1:]


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


def rewritten(tokenizer: Tokenizer, folder: Path) -> Path:
    sizes = config(vocab_size=tokenizer.vocab_size + 3, eos_token_ids=(2,))  # an embedding may have more rows
    metadata = vocabulary_metadata(tokenizer, "tiny", sizes)
    return write_vocabulary(
        folder / "written.gguf", {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    )


def ids_of(path: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = gguf_tokenizer(read_gguf(path))
    return [tokenizer.encode(text).ids for text in texts]


@pytest.mark.parametrize("flags", [{}, {"add_space_prefix": False}, {"add_bos_token": False, "add_eos_token": True}])
def test_sentencepiece_from_a_gguf_file(tmp_path: Path, recorded: dict[str, Any], flags: dict[str, bool]):
    path = write_vocabulary(tmp_path / "m.gguf", spm_vocabulary(recorded["spm"]["pieces"]), **flags)
    texts = recorded["spm"]["texts"]
    assert ids_of(rewritten(Tokenizer(gguf_tokenizer(read_gguf(path))), tmp_path), texts) == ids_of(path, texts)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_byte_level_from_a_gguf_file(tmp_path: Path, recorded: dict[str, Any], pre: str):
    path = write_vocabulary(tmp_path / "m.gguf", bpe_vocabulary(recorded["bpe"]["merges"], pre))
    texts = recorded["bpe"]["texts"]
    assert ids_of(rewritten(Tokenizer(gguf_tokenizer(read_gguf(path))), tmp_path), texts) == ids_of(path, texts)


def test_tokenizer_model(tmp_path: Path, recorded: dict[str, Any]):
    recording = recorded["sentencepiece"]
    (tmp_path / "tokenizer.model").write_bytes(base64.b64decode(recording["models"]["bpe"]["model"]))
    written = ids_of(rewritten(Tokenizer.from_directory(tmp_path), tmp_path), recording["texts"])
    assert written == [[1, *ids] for ids in recording["models"]["bpe"]["ids"]]
    (tmp_path / "tokenizer.model").write_bytes(base64.b64decode(recording["models"]["unigram"]["model"]))
    with pytest.raises(ValueError, match=r"tiny has neither a byte-level BPE vocabulary nor sentencepiece's BPE"):
        rewritten(Tokenizer.from_directory(tmp_path), tmp_path)


@pytest.mark.parametrize(
    "merges",
    [
        [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")],  # "abc" is made early and late, with another between
        [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")],  # nothing makes "ba", though its halves are tokens
    ],
)
def test_merges_that_no_scores_lead_to_are_refused(tmp_path: Path, merges: list[tuple[str, str]]):
    tokens = ["<unk>", "a", "b", "c", "ab", "bc", "abc"] + ["ba"] * (merges[1] == ("b", "c"))
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    with pytest.raises(ValueError, match="tiny has merges that no scores of a sentencepiece vocabulary lead to"):
        rewritten(Tokenizer(backend), tmp_path)


@LIVE
@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_llama_cpp_gives_the_ids_of_what_was_written(tmp_path: Path, recorded: dict[str, Any], kind: str):
    made = {
        "bpe": lambda part: bpe_vocabulary(part["merges"], "llama-bpe"),
        "spm": lambda p: spm_vocabulary(p["pieces"]),
    }
    original = write_vocabulary(tmp_path / "m.gguf", made[kind](recorded[kind]))
    tokenizer = Tokenizer(gguf_tokenizer(read_gguf(original)))
    specials = [*SPECIALS, *USER_DEFINED] if kind == "bpe" else ["<tool>", "[INST]", "</s>"]
    texts, judge = random_texts(200, seed=31, specials=specials), LlamaCpp(rewritten(tokenizer, tmp_path))
    assert [judge.encode(text) for text in texts] == ids_of(original, texts)


@pytest.mark.parametrize("published", published_vocabularies(), ids=lambda path: path.name)
def test_a_published_vocabulary(tmp_path: Path, published: Path):
    """The ids are those of sentencepiece, which the model was trained with, and of llama.cpp, where these are there.

    Not of texts that begin with a space: before these, Transformers puts no other one, as the others do, and a
    ``tokenizer.model`` by itself is read as Transformers reads it.
    """
    shutil.copy(published, tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.from_directory(tmp_path)
    texts = [text for text in random_texts(200, seed=21) if not text.startswith(" ")]
    assert len(texts) > 150
    expected, path = [tokenizer.encode(text) for text in texts], rewritten(tokenizer, tmp_path)
    assert ids_of(path, texts) == expected
    assert [tokenizer.decode(ids) for ids in expected] == [text.replace(SPACE, " ") for text in texts]
    if importlib.util.find_spec("sentencepiece"):
        from sentencepiece import SentencePieceProcessor

        judge = SentencePieceProcessor(model_file=str(published))
        assert [[1, *judge.encode(text)] for text in texts] == expected
    if importlib.util.find_spec("xllamacpp"):
        llama_cpp = LlamaCpp(path)
        assert [llama_cpp.encode(text) for text in texts] == expected
