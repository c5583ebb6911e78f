"""The one JSON reader: every bad file is refused by name and place, in bounded time and with a short message."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from layerskip_kernels.errors import UnsupportedModel, shown
from layerskip_kernels.model.files import open_regular
from layerskip_kernels.model.json_file import JsonObject, parse_json, read_json, read_json_object


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON: Expecting value at column 1"),
        ('{"a": 1,\n "b" 2}', "not valid JSON: Expecting ':' delimiter at line 2, column 6"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (f'{{"a": 1,\n\n"b": {"9" * 400}}}', "an integer of 400 digits on line 3"),
        (f"[{'9' * 100_000}]", "an integer of 100000 digits"),
        ("[NaN]", "NaN is not a number"),
        ("[\n-Infinity]", "-Infinity is not a number on line 2"),
        ("[1e999]", "the number 1e999 is out of range"),
        ("\ud800".encode("utf-16", "surrogatepass").decode("latin-1"), "not valid JSON"),
    ],
)
def test_a_text_that_is_not_json_is_refused_by_place(tmp_path: Path, text: str, said: str):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        read_json(path)
    assert str(error.value).startswith(str(path)) and said in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 200


def test_bytes_that_are_not_utf8(tmp_path: Path):
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"a\.json is not UTF-8 text: byte 7"):
        read_json(tmp_path / "a.json")


def test_a_byte_order_mark_and_great_numbers_of_transformers(tmp_path: Path):
    (tmp_path / "a.json").write_text('\ufeff{"model_max_length": 1000000000000000019884624838656}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"model_max_length": int(1e30)}


def test_a_file_beyond_the_bound(tmp_path: Path):
    (tmp_path / "a.json").write_text("[1, 2, 3]")
    assert read_json(tmp_path / "a.json", max_bytes=9) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"a\.json has more than 8 bytes"):
        read_json(tmp_path / "a.json", max_bytes=8)


def test_a_name_twice():
    assert parse_json('{"a": 1, "a": 2}', "x") == {"a": 2}
    with pytest.raises(ValueError, match=r"x is not valid .*: the name 'a' occurs twice"):
        parse_json('{"b": 1, "a": 1, "a": 2}', "x", unique=True)


def _socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a directory": Path.mkdir,
    "a pipe": os.mkfifo,
    "cannot be read": _socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "is missing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_opened_and_nothing_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path("x")
    SPECIAL[kind](path)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"x.*{kind}"):
        open_regular(path)


def test_a_null_character_is_in_no_name(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a\\x00b' cannot be the name of a file: embedded null byte"):
        open_regular(tmp_path / "a\0b")


def test_a_pipe_with_a_writer_is_refused_as_well(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").open("wb").close(), daemon=True)
    writer.start()
    with pytest.raises(ValueError, match="pipe is a pipe"):
        while writer.is_alive():
            open_regular(tmp_path / "pipe")
        open_regular(tmp_path / "pipe")


@pytest.mark.parametrize("contents", ["[1]", "3", "null", '"text"'])
def test_an_object_is_required(tmp_path: Path, contents: str):
    (tmp_path / "a.json").write_text(contents)
    with pytest.raises(ValueError, match=r"a\.json must hold a JSON object, got"):
        read_json_object(tmp_path / "a.json")


FIELDS = JsonObject("f.json", {"n": 3, "x": 0.5, "b": True, "s": "text", "o": {"n": [1]}, "l": [1, 2], "null": None})


def test_fields_of_the_right_type_are_taken():
    assert FIELDS.integer("n", 1, 3) == 3 and FIELDS.integer("null", 1, default=7) == 7
    assert FIELDS.positive("n") == 3.0 and FIELDS.positive("x") == 0.5 and FIELDS.positive("gone", 1.5) == 1.5
    assert FIELDS.boolean("b", False) is True and FIELDS.boolean("gone", True) is True
    assert FIELDS.string("s") == "text" and FIELDS.string("gone") is None
    assert FIELDS.integers("l", 0) == (1, 2) and FIELDS.integers("n", 0) == (3,) and FIELDS.integers("gone", 0) == ()
    assert FIELDS.object("o").get("n") == [1] and FIELDS.object("gone").values == {}


@pytest.mark.parametrize(
    ("take", "said"),
    [
        (lambda: FIELDS.integer("gone", 1), "f.json lacks the field 'gone'"),
        (lambda: FIELDS.integer("n", 4, 9), "f.json: n must be an integer in 4..9, got 3"),
        (lambda: FIELDS.integer("b", 0), "f.json: b must be an integer in 0..2147483647, got True"),
        (lambda: FIELDS.integer("x", 0), "x must be an integer"),
        (lambda: FIELDS.positive("b"), "b must be a positive number"),
        (lambda: FIELDS.positive("s"), "s must be a positive number below 1e30, got 'text'"),
        (lambda: FIELDS.boolean("n", False), "n must be true or false, got 3"),
        (lambda: FIELDS.string("n"), "n must be a string, got 3"),
        (lambda: FIELDS.integers("l", 2), "l must be an integer in 2..2147483647, or a list of them, got [1, 2]"),
        (lambda: FIELDS.integers("s", 0), "s must be an integer"),
        (lambda: FIELDS.object("l"), "l must be a JSON object, got [1, 2]"),
        (lambda: FIELDS.object("o").integer("n", 0), "f.json: o: n must be an integer in 0..2147483647, got [1]"),
    ],
)
def test_a_field_of_another_type_is_named(take: Callable[[], object], said: str):
    with pytest.raises(ValueError) as error:
        take()
    assert said in str(error.value)


def test_values_are_shown_short():
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    for value in (
        "a" * 10**7,
        list(range(10**6)),
        {str(i): i for i in range(10**5)},
        10**5000,
        -(10**300),
        deep,
        b"\0" * 999,
    ):
        assert len(shown(value)) <= 140
    assert shown([1, "a", None]) == "[1, 'a', None]" and shown(10**30) == str(10**30)
    assert len(str(UnsupportedModel("field", "a" * 10**6, "b"))) < 200
