"""JSON lines: one reader for every file of prompts, texts and examples.

A line ends at "\\n" (or "\\r\\n") and nowhere else: U+2028, U+0085 and the like may stand inside a JSON string. A byte
order mark and empty lines are skipped; every error is a ValueError that names the file and the line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from layerskip_kernels.model.files import MAX_BYTES, open_regular
from layerskip_kernels.model.json_file import parse_json

__all__ = ["json_lines", "json_lines_of", "require_text"]

BYTE_ORDER_MARK = "\ufeff"


def json_lines_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's value with its place, such as "prompts.jsonl:3"; the file is read line by line.

    Raises as `open_regular`, and ValueError for a line of more than 64 MiB, too.
    """
    with open_regular(path) as file:
        lines = iter(lambda: file.readline(MAX_BYTES + 1), b"")
        yield from json_lines((_decoded(line, f"{path}:{n}") for n, line in enumerate(lines, 1)), str(path))


def json_lines(text: str | Iterable[str], name: str) -> Iterator[tuple[str, Any]]:
    """The same of a whole text, or of its lines; ``name`` is what errors call it."""
    for number, line in enumerate(text.split("\n") if isinstance(text, str) else text, 1):
        where = f"{name}:{number}"
        line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if line.strip(" \t\r\n"):
            yield where, parse_json(line, where)


def require_text(value: Any, where: str, what: str) -> str:
    """A value that must be a string of whole characters. Raises ValueError saying ``where`` and ``what`` is needed."""
    if not isinstance(value, str):
        raise ValueError(f"{where} must be {what}, got {value!r:.80}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has a lone surrogate at character {error.start}, which is not text") from error
    return value


def _decoded(line: bytes, where: str) -> str:
    if len(line) > MAX_BYTES:
        raise ValueError(f"{where} has more than {MAX_BYTES} bytes, which is too long for a line")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error}") from error
