"""How a text appears in a terminal: as it streams, up to a stop string, drafts in colour if asked."""

from __future__ import annotations

from collections.abc import Callable

from layerskip_kernels.decoding.stop_strings import StopStrings
from layerskip_kernels.model.text_stream import TextStream
from layerskip_kernels.model.tokenizer import Tokenizer

__all__ = ["Screen"]

GREEN, RED, PLAIN = "\033[32m", "\033[31m", "\033[0m"


class Screen:
    """Writes one generation's text as its tokens come: hand ``on_tokens`` and ``on_draft`` to generate.

    With ``show_drafts``, accepted drafts are green and the token that corrects a rejected one is red; a token
    without a draft has no colour. ``finish`` writes what was held back.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        write: Callable[[str], object],
        stop: tuple[str, ...] = (),
        min_new_tokens: int = 0,
        show_drafts: bool = False,
    ) -> None:
        self._stream = TextStream(tokenizer)
        self._stops = StopStrings(stop)
        self._write = write
        self._min_new_tokens = min_new_tokens
        self._show_drafts = show_drafts
        self._num_tokens = 0
        self._colours: list[str] = []  # of the cycle's tokens
        self._pieces: list[tuple[str, str]] = []  # text and colour of what StopStrings may hold back

    def on_draft(self, _: int, drafts: list[int], num_accepted: int) -> None:
        self._colours = [GREEN] * num_accepted + [RED] * (num_accepted < len(drafts))

    def on_tokens(self, _: int, tokens: list[int]) -> None:
        colours = self._colours + [""] * len(tokens)
        for token, colour in zip(tokens, colours, strict=False):
            self._num_tokens += 1
            may_end = self._num_tokens >= self._min_new_tokens
            self._push(self._stream.push([token]), colour, may_end)
        self._colours = []

    def finish(self) -> None:
        self._push(self._stream.finish(), "", may_end=True)
        self._release(len(self._stops.finish()))

    def _push(self, text: str, colour: str, may_end: bool) -> None:
        self._pieces.append((text, colour))
        self._release(len(self._stops.push(text, may_end)))

    def _release(self, count: int) -> None:
        """Write the first ``count`` characters of the pieces."""
        while count and self._pieces:
            text, colour = self._pieces.pop(0)
            if len(text) > count:
                self._pieces.insert(0, (text[count:], colour))
                text = text[:count]
            count -= len(text)
            if text:
                self._write(f"{colour}{text}{PLAIN}" if self._show_drafts and colour else text)
