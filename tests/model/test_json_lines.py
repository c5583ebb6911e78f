"""The one reader of JSON lines, and every place that reads them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from layerskip_kernels.evaluation.prompts import read_jsonl_prompts
from layerskip_kernels.model.draft_vocab import texts_written
from layerskip_kernels.model.json_lines import json_lines, json_lines_of, require_text
from layerskip_kernels.recipes.parse_eval import read_examples

SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"]


def of_file(path: Path) -> list[tuple[str, Any]]:
    return list(json_lines_of(path))


def of_text(path: Path) -> list[tuple[str, Any]]:
    return list(json_lines(path.read_bytes().decode(), str(path)))


def training(path: Path) -> list[str]:
    pytest.importorskip("datasets")
    from layerskip_kernels.training.text_data import read_texts

    return [record["completion"] for record in read_texts([path])]


READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    "prompts": lambda path: [text for _, text in read_jsonl_prompts(path.read_text("utf-8"), str(path))],
    "draft vocabulary": lambda path: list(texts_written(str(path), path.read_text("utf-8"))),
    "parse examples": lambda path: [completion for _, completion in read_examples(path)],
    "training": training,
}


@pytest.fixture(params=[of_file, of_text])
def read(request: pytest.FixtureRequest) -> Callable[[Path], list[tuple[str, Any]]]:
    return request.param


def test_values_come_with_their_places(tmp_path, read):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \t\n[2]\n\n"three"')
    assert read(path) == [(f"{path}:1", {"a": 1}), (f"{path}:4", [2]), (f"{path}:6", "three")]


@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
@pytest.mark.parametrize("name", READERS)
def test_a_line_ends_at_a_line_feed_alone(tmp_path, name, separator):
    path, text = tmp_path / "a.jsonl", f"a{separator}b"
    record = json.dumps({"prompt": text, "completion": text}, ensure_ascii=False)
    path.write_text(f"\n{record}\n\n{record}", encoding="utf-8", newline="\n")
    assert READERS[name](path) == [text, text]


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_is_skipped(tmp_path, name):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"prompt": "a", "completion": "a"}\n', encoding="utf-8")
    assert READERS[name](path) == ["a"]


BAD = {
    "broken": ('{"prompt": "x", ', "is not valid JSON"),
    "too deep": ("[" * 100_000, "is nested too deeply"),
    "too long an integer": ("1" * 5000, "is not valid JSON"),
    "a number": ("7", "must be"),
    "a null": ('{"prompt": null, "completion": null, "text": null}', "must be"),
    "a lone surrogate": ('{"prompt": "\\ud800", "completion": "\\ud800"}', "has a lone surrogate at character 0"),
}


@pytest.mark.parametrize(("line", "problem"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", READERS)
def test_errors_name_file_and_line(tmp_path, name, line, problem):
    path = tmp_path / "broken-line.jsonl"
    path.write_text(f'{{"prompt": "a", "completion": "b"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=problem) as raised:
        list(READERS[name](path))
    assert f"{path}:3" in str(raised.value) and len(str(raised.value)) < 400


def test_bytes_that_are_no_text_are_named_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'"a"\n"\xff"\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2 is not UTF-8 text"):
        list(json_lines_of(path))


def test_a_string_of_whole_characters():
    assert require_text("\U0001f600", "a:1", "a string") == "\U0001f600"
    with pytest.raises(ValueError, match="a:1 must be a string, got 5"):
        require_text(5, "a:1", "a string")


def test_a_line_without_an_end_is_read_no_further_than_a_bound(tmp_path):
    path = tmp_path / "hole.jsonl"
    with path.open("wb") as file:
        file.write(b'"a"\n')
        file.truncate(3 << 30)
    lines = json_lines_of(path)
    assert next(lines) == (f"{path}:1", "a")
    with pytest.raises(ValueError, match=r"hole.jsonl:2 has more than 67108864 bytes"):
        next(lines)
