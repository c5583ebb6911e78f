"""PEFT's patterns of module names, matched in bounded time: a downloaded file must not choose how long a load takes.

A pattern is a regular expression that must be the module's name, or its end after a dot. Read here are characters,
``.``, ``\\d``, ``\\w`` and ``[...]``, each perhaps with ``*``, ``+`` or ``?``, groups of alternatives, ``^`` and ``$``.
Repeated groups and the rest are refused: Python's ``re`` could backtrack over them for ever.
"""

import re
from typing import NoReturn

from layerskip_kernels.errors import shown
from layerskip_kernels.model.json_file import JsonObject

__all__ = ["check_patterns", "first_pattern"]

MAX_LENGTH = 500
MAX_WORK = 5_000_000  # characters of patterns times modules: seconds
CHARACTER = re.compile(r"\\[.\-_dw]|\[\^?[\w.\-]+\]|[\w.\-]")
# Without choices there is nothing to backtrack over.
PLAIN = re.compile(r"\^?(?:[\w.\-]|\\[.\-_dw])*\$?")


def check_patterns(patterns: JsonObject, num_modules: int) -> None:
    """Raise ValueError naming the file and the pattern for one that is not read, or for too many of them."""
    work = sum(1 if PLAIN.fullmatch(pattern) else len(pattern) for pattern in patterns.values)
    if work * num_modules > MAX_WORK:
        raise ValueError(f"{patterns.where} has too many patterns ({len(patterns.values)}) for {num_modules} modules")
    for pattern in patterns.values:
        if len(pattern) > MAX_LENGTH:
            raise _refused(patterns, pattern, f"has more than {MAX_LENGTH} characters")
        try:
            _matches(pattern, "")
        except (ValueError, RecursionError, re.error) as error:
            raise _refused(patterns, pattern, f"is not read here ({str(error)[:80]})") from error


def first_pattern(patterns: JsonObject, module: str) -> str | None:
    """The first of the (checked) patterns that gives the module a value, as in PEFT; None: none does."""
    return next((pattern for pattern in patterns.values if _matches(pattern, module)), None)


def _refused(patterns: JsonObject, pattern: str, problem: str) -> ValueError:
    return ValueError(f"{patterns.where}: the pattern {shown(pattern)} {problem}; name the modules one by one")


def _matches(pattern: str, module: str) -> bool:
    if PLAIN.fullmatch(pattern):
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    return _Matcher(pattern, module).matches()


class _Matcher:
    """Reads a pattern once, from left to right, with the set of all positions in the text that it can have reached."""

    def __init__(self, pattern: str, text: str) -> None:
        self._pattern, self._text, self._at = pattern, text, 0

    def matches(self) -> bool:
        starts = {0} | {i + 1 for i, character in enumerate(self._text) if character == "."}
        ends = self._alternatives(starts)
        if self._at < len(self._pattern):
            self._refuse()
        return len(self._text) in ends

    def _alternatives(self, starts: set[int]) -> set[int]:
        ends = self._sequence(starts)
        while self._take("|"):
            ends = ends | self._sequence(starts)
        return ends

    def _sequence(self, reached: set[int]) -> set[int]:
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            reached = self._piece(reached)
        return reached

    def _piece(self, reached: set[int]) -> set[int]:
        if self._take("("):
            self._take("?:")
            ends = self._alternatives(reached)
            if not self._take(")"):
                self._refuse()
            return reached | ends if self._take("?") else ends
        if self._take("^"):
            return reached & {0}
        if self._take("$"):
            return reached & {len(self._text)}
        return self._character(reached)

    def _character(self, reached: set[int]) -> set[int]:
        token = CHARACTER.match(self._pattern, self._at) or self._refuse()
        self._at = token.end()
        is_one = re.compile(token[0]).fullmatch
        ends = {i + 1 for i in reached if i < len(self._text) and is_one(self._text[i])}
        if self._take("?"):
            return reached | ends
        if not (optional := self._take("*")) and not self._take("+"):
            return ends
        front = ends
        while front:
            front = {i + 1 for i in front if i < len(self._text) and is_one(self._text[i])} - ends
            ends = ends | front
        return reached | ends if optional else ends

    def _take(self, literal: str) -> bool:
        found = self._pattern.startswith(literal, self._at)
        self._at += len(literal) if found else 0
        return found

    def _refuse(self) -> NoReturn:
        raise ValueError(f"at character {self._at + 1}")
