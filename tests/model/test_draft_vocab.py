"""Counting, writing and reading draft vocabularies; how they draft is tested in test_steps.py."""

import json

import pytest

from layerskip_kernels.cli.main import main
from layerskip_kernels.model.draft_vocab import most_frequent_tokens, read_draft_vocab, texts_written, write_draft_vocab


class Words:
    """A tokenizer of single digits."""

    vocab_size = 10

    def encode(self, text: str) -> list[int]:
        return [int(character) for character in text]


def test_the_most_frequent_come_first_and_the_lower_of_equals():
    assert most_frequent_tokens(Words(), ["9", "95", "3377"], 1) == [3]
    assert most_frequent_tokens(Words(), ["9", "95", "3377"], 3) == [3, 7, 9]
    assert most_frequent_tokens(Words(), ["9", "95", "3377"], 6) == [0, 1, 3, 5, 7, 9]


def test_what_ends_a_text_is_always_there():
    assert most_frequent_tokens(Words(), ["9", "95", "3377"], 2, ends=[8]) == [3, 8]


def test_what_is_written_to_jsonl_is_counted():
    lines = '{"prompt": "12", "completion": "34"}\n{"text": "5"}\n'
    assert list(texts_written("a.jsonl", lines)) == ["34", "5"]
    assert list(texts_written("a.txt", lines)) == [lines]
    for line in ('{"prompt": "12"}', "[]", "{"):
        with pytest.raises(ValueError, match=r"a\.jsonl:1 (must be|is not valid JSON)"):
            list(texts_written("a.jsonl", line))


@pytest.mark.parametrize("size", [0, 11])
def test_a_size_outside_the_vocabulary(size):
    with pytest.raises(ValueError, match=r"size must be in 1\.\.10"):
        most_frequent_tokens(Words(), ["1"], size)


def test_files(tmp_path):
    path = tmp_path / "vocab.json"
    write_draft_vocab(path, [1, 5, 9])
    assert read_draft_vocab(path) == [1, 5, 9]
    for damaged in ("[1, 5", "[-1]", '{"a": 1}', "[1, true]", "[1.5]"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"vocab\.json"):
            read_draft_vocab(path)


def test_the_command_line(tmp_path, capsys):
    corpus, path = tmp_path / "corpus.txt", tmp_path / "vocab.json"
    corpus.write_text("def f(x):\n    return x\n" * 20)
    assert main(["draft-vocab", str(corpus), "--size", "64", "--output", str(path)]) == 0
    assert len(json.loads(path.read_text())) == 64
    options = ["--prompt", "def f(x):", "--max-new-tokens", "6", "--exit-layer", "20", "--draft-vocab", str(path)]
    assert main(["verify", *options]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens_equal"] is True
    assert main(["generate", *options[:-1], str(tmp_path / "missing.json")]) == 2
