"""The one reader of JSON: whatever is wrong with a file, the error names the file and where in it, in bounded time."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from layerskip_kernels.checks import MAX_INT
from layerskip_kernels.errors import shown
from layerskip_kernels.model.files import read_bytes

__all__ = ["JsonObject", "are_integers", "json_object", "parse_json", "read_json", "read_json_object"]

MAX_BYTES = 16 << 20  # the largest index there is has 9 MB
MAX_DIGITS = 40  # Transformers writes 10**30 for "no limit"


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a file of UTF-8 JSON, with or without a byte order mark.

    Raises FileNotFoundError when the file is missing, and ValueError naming it and the place for anything else: not a
    regular file, more than ``max_bytes``, not UTF-8, not JSON, nested too deeply, an integer of more than 40 digits, a
    NaN or an infinity.
    """
    return parse_json(read_bytes(path, max_bytes), str(path))


def read_json_object(path: Path) -> "JsonObject":
    """The object in a file; raises as `read_json`, and ValueError when it holds another value."""
    return json_object(read_json(path), str(path))


def json_object(value: Any, where: str) -> "JsonObject":
    """A value that must be an object, or ValueError; ``where`` names it in errors."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got {shown(value)}")
    return JsonObject(where, value)


def parse_json(raw: bytes | str, where: str, unique: bool = False) -> Any:
    """The value of a JSON text; ``where`` names it in errors. ``unique``: a name that occurs twice is an error, too."""
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: byte {error.start} is not valid") from error
    try:
        return json.loads(
            text,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_refuse_constant,
            object_pairs_hook=_without_duplicates if unique else None,
        )
    except json.JSONDecodeError as error:
        place = (f"line {error.lineno}, " if "\n" in text else "") + f"column {error.colno}"
        raise ValueError(f"{where} is not valid JSON: {error.msg} at {place}") from error
    except _BadValueError as error:
        line = text.count("\n", 0, max(0, text.find(error.literal))) + 1
        place = f" on line {line}" if "\n" in text else ""
        raise ValueError(f"{where} is not valid JSON for this use: {error}{place}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply") from error


class _BadValueError(Exception):
    """A value that JSON, or Python's reader of it, lets pass; ``literal``: as it is written."""

    def __init__(self, problem: str, literal: str) -> None:
        super().__init__(problem)
        self.literal = literal


def _integer(literal: str) -> int:
    if len(literal) > MAX_DIGITS:
        raise _BadValueError(f"an integer of {len(literal)} digits", literal)
    return int(literal)


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise _BadValueError(f"the number {literal[:20]} is out of range", literal)
    return value


def _refuse_constant(literal: str) -> NoReturn:
    raise _BadValueError(f"{literal} is not a number", literal)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _BadValueError(f"the name {shown(twice)} occurs twice", json.dumps(twice))
    return names


@dataclass(frozen=True)
class JsonObject:
    """The fields of a JSON object, each checked as it is taken; ``where`` names the object in errors.

    A field that is null counts as absent and gets ``default``. Every method raises ValueError naming ``where``, the
    field, what it must be and what it is.
    """

    where: str
    values: dict[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or ``default`` when it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def required(self, name: str) -> Any:
        if (value := self.get(name)) is None:
            raise ValueError(f"{self.where} lacks the field {name!r}")
        return value

    def integer(self, name: str, low: int, high: int = MAX_INT, default: int | None = None) -> int:
        """An integer in low..high. Without a ``default`` the field is required."""
        value = self.required(name) if default is None else self.get(name, default)
        if type(value) is not int or not low <= value <= high:
            self.refuse(name, f"an integer in {low}..{high}")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """A positive, finite number. Without a ``default`` the field is required."""
        value = self.required(name) if default is None else self.get(name, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            self.refuse(name, "a positive number below 1e30")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            self.refuse(name, "true or false")
        return value

    def string(self, name: str) -> str | None:
        """A string that is not empty; None when the field is absent, null or empty."""
        value = self.get(name) or None
        if value is not None and not isinstance(value, str):
            self.refuse(name, "a string")
        return value

    def object(self, name: str) -> "JsonObject":
        """An object, empty when the field is absent."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            self.refuse(name, "a JSON object")
        return JsonObject(f"{self.where}: {name}", value)

    def integers(self, name: str, low: int, high: int = MAX_INT) -> tuple[int, ...]:
        """One integer in low..high or a list of them; empty when the field is absent."""
        value = self.get(name, [])
        many = value if isinstance(value, list) else [value]
        if not are_integers(many, low, high):
            self.refuse(name, f"an integer in {low}..{high}, or a list of them")
        return tuple(many)

    def refuse(self, name: str, expected: str) -> NoReturn:
        raise ValueError(f"{self.where}: {name[:100]} must be {expected}, got {shown(self.values.get(name))}")


def are_integers(values: Iterable[object], low: int, high: int) -> bool:
    return all(type(value) is int and low <= value <= high for value in values)
