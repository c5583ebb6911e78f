"""Text of token ids as they come, in pieces that add up to the text of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

__all__ = ["TextDecoder", "TextStream"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextDecoder(Protocol):
    """What a stream needs of a tokenizer."""

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        ...

    def is_open(self, token_id: int, skip_special_tokens: bool = True) -> bool:
        """Whether tokens after this one can change how it and those before it are decoded.

        True for a byte of a byte-fallback vocabulary, since a run of bytes is decoded as a whole, and for a token that
        is not decoded at all, since it does not end such a run.
        """
        ...


class TextStream:
    """Text of a growing sequence of token ids; what later ids may change is held back.

    ``push`` new ids as they are generated and show what it returns; ``finish`` returns what was held back, a
    replacement character where it ends within a character. Joined, the pieces are the text of all ids.
    """

    def __init__(self, tokenizer: TextDecoder, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # The ids shown last are decoded again with the new ones: some decoders drop a space at the start.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """The text that became complete with these ids, maybe empty."""
        return "".join(self._push_one(token_id) for token_id in ids)

    def finish(self) -> str:
        """The rest; the stream is then empty."""
        rest = self._new_text() if self._pending else ""
        self._context, self._pending = [], []
        return rest

    def _push_one(self, token_id: int) -> str:
        self._pending.append(token_id)
        if self._tokenizer.is_open(token_id, self._skip_special_tokens):
            return ""
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def _new_text(self) -> str:
        shown = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens)
