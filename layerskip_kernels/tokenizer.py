"""Text to token ids and back, on the ``tokenizers`` library alone: Transformers takes seconds to import."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers

__all__ = ["TextStream", "Tokenizer"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """Encodes and decodes as the Transformers tokenizer of the same directory does by default."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend

    @classmethod
    def from_directory(cls, directory: Path) -> "Tokenizer | None":
        """Read tokenizer.json; None when there is none. Raises ValueError naming the file if it is damaged.

        Which special tokens stand around a text is said there, too: like Transformers, this does not look for
        add_bos_token in tokenizer_config.json.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} is no tokenizer that this version of tokenizers reads: {error}") from error
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """The number of token ids, added tokens included."""
        return self._backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with the special tokens (such as BOS) that the model expects around it.

        Raises ValueError for a lone surrogate, which no Unicode text holds.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds a lone surrogate at character {error.start}: it is no Unicode") from error
        return self._backend.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text in pieces, each once its characters are complete; joined, they are ``decode(ids)``."""
        stream = TextStream(self)
        for token_id in ids:
            if piece := stream.push([token_id]):
                yield piece
        if rest := stream.finish():
            yield rest


class TextStream:
    """Text of a growing sequence of token ids, held back while the last character is incomplete.

    ``push`` new ids as they are generated and show what it returns; ``finish`` returns what was held back, a
    replacement character where it ends within a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The ids shown last are decoded again with the new ones: some decoders drop a space at the start.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """The text that became complete with these ids, maybe empty."""
        return "".join(self._push_one(token_id) for token_id in ids)

    def finish(self) -> str:
        """The rest; the stream is then empty."""
        rest = self._new_text()
        self._context, self._pending = [], []
        return rest

    def _push_one(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def _new_text(self) -> str:
        shown = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(shown) :]
