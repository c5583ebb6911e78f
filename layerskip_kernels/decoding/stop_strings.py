"""Where a text ends: at strings that are watched for as it grows."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["StopStrings"]


class StopStrings:
    """Watches a growing text for strings that end it, wherever the borders of tokens lie.

    ``push`` text as it comes and show what it returns: text that may be the start of a stop string is held back.
    Once ``found`` names one, the text is over and ends before it; ``finish`` returns what was held back when it
    ended otherwise. Of strings that end at the same character, the longest counts. Time is linear in the text
    (Knuth, Morris and Pratt 1977).
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._patterns = [_Pattern(string) for string in strings]
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, may_end: bool = True) -> str:
        """The text that is safe to show now. What comes after a stop string is dropped.

        ``may_end``: False lets strings that end in this text pass.
        """
        if self.found is not None:
            return ""
        for n, character in enumerate(text, 1):
            for pattern in self._patterns:
                pattern.push(character)
            ended = [pattern.string for pattern in self._patterns if pattern.complete]
            if ended and may_end:
                self.found = max(ended, key=len)
                return self._release(text[:n], len(self.found))
        return self._release(text, max((pattern.partial for pattern in self._patterns), default=0))

    def finish(self) -> str:
        """What was held back, if no stop string was found."""
        return self._release("", 0) if self.found is None else ""

    def _release(self, text: str, held: int) -> str:
        whole = self._held + text
        self._held = whole[len(whole) - held :]
        return whole[: len(whole) - held]


class _Pattern:
    """How much of one string the end of the text matches."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        # borders[n]: the longest proper prefix of string[:n] that also ends it.
        self._borders = [0, 0]
        for character in string[1:]:
            border = self._longest(self._borders[-1], character)
            self._borders.append(border)

    @property
    def complete(self) -> bool:
        return self.matched == len(self.string)

    @property
    def partial(self) -> int:
        """Length of the longest unfinished match."""
        return self._borders[self.matched] if self.complete else self.matched

    def push(self, character: str) -> None:
        self.matched = self._longest(self.partial, character)

    def _longest(self, matched: int, character: str) -> int:
        while matched and self.string[matched] != character:
            matched = self._borders[matched]
        return matched + (self.string[matched] == character)
