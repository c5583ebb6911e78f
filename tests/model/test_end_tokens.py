"""What ends a text: gathered from all the files that say it, and checked against the vocabulary."""

import json
from pathlib import Path

import pytest

from layerskip_kernels.model.end_tokens import end_token_ids, gguf_end_token_ids
from layerskip_kernels.model.loading import read_checkpoint
from support.checkpoint_files import write_directory


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<unk>": 0, "a": 1, "</s>": 2, "<|im_end|>": 3, "<turn>": 4}
    Tokenizer(WordLevel(words, unk_token="<unk>")).save(str(directory / "tokenizer.json"))


@pytest.mark.parametrize(
    ("generation", "tokenizer", "ends"),
    [
        ({}, {}, (2,)),
        ({"eos_token_id": [4, 2]}, {}, (2, 4)),
        ({"eos_token_id": 4}, {"eos_token": "<|im_end|>"}, (2, 4, 3)),
        ({}, {"eos_token": {"content": "<|im_end|>", "special": True}}, (2, 3)),
        ({}, {"eos_token": "<no such token>"}, (2,)),
        ({}, {"eos_token": None}, (2,)),
    ],
)
def test_all_files_of_a_directory_are_asked(tmp_path: Path, generation: dict, tokenizer: dict, ends: tuple[int, ...]):
    write_directory(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert read_checkpoint(tmp_path).config.eos_token_ids == ends


@pytest.mark.parametrize("value", [96, -1, 10**30, 2.0, "2", True, [2, None], [[2]]], ids=str)
def test_an_id_that_the_vocabulary_does_not_have_is_refused_by_file_and_field(tmp_path: Path, value: object):
    write_directory(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        ValueError, match=r"generation_config\.json has eos_token_id .*; it must be token ids in 0\.\.95"
    ):
        read_checkpoint(tmp_path)


def test_no_file_says_it():
    assert end_token_ids([("config.json", {})], 10, lambda text: None) == ()


@pytest.mark.parametrize("value", [5, -1, "x" * 1000, 2.0])
def test_an_id_of_a_gguf_file_is_checked(value: object):
    with pytest.raises(ValueError, match=r"m\.gguf has tokenizer\.ggml\.eot_token_id .*; it must be") as error:
        gguf_end_token_ids("m.gguf", {"tokenizer.ggml.eot_token_id": value}, ["a", "b", "c"])
    assert len(str(error.value)) < 300


def test_tokens_known_by_their_text():
    tokens = ["a", "<|im_end|>", "<|end|>", "<|eot_id|>"]
    assert gguf_end_token_ids("m.gguf", {"tokenizer.ggml.eos_token_id": 3}, tokens) == [3, 1, 2]
    # With these two, <|end|> ends a message within the turn (gpt-oss).
    assert gguf_end_token_ids("m.gguf", {}, ["<|end|>", "<|return|>", "<|call|>"]) == [1, 2]
    assert gguf_end_token_ids("m.gguf", {"tokenizer.ggml.eos_token_id": 9}, None) == [9]
