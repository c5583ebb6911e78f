"""Text to token ids and back, on the ``tokenizers`` library alone: Transformers takes seconds to import."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from layerskip_kernels.model.chat_template import ChatTemplate, read_chat_template
from layerskip_kernels.model.tokenizer_files import library_errors, read_tokenizer, special_tokens_around

__all__ = ["Tokenizer"]


class Tokenizer:
    """Encodes and decodes as the Transformers tokenizer of the same directory does by default.

    ``byte_ids``: the tokens of single bytes, which only their neighbours make characters (byte fallback).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: ChatTemplate | None = None,
        name: str = "the tokenizer",
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend, self._name = backend, name
        self.chat_template = chat_template
        self._prefix = self._special_tokens_before()
        self.byte_ids = self._byte_tokens()

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer | None:
        """Read tokenizer.json or else tokenizer.model; None when there is neither.

        Which special tokens stand around a text is said in tokenizer.json, and by add_bos_token and add_eos_token in
        tokenizer_config.json for the classes that listen to them (Llama's, Gemma's), as Transformers 4 does it.
        Raises ValueError naming the file if it is damaged.
        """
        found = read_tokenizer(directory)
        return None if found is None else cls(found.backend, read_chat_template(directory), str(found.path))

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizer of the ``tokenizers`` library underneath."""
        return self._backend

    @property
    def vocab_size(self) -> int:
        """The number of token ids, added tokens included."""
        return self._backend.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        """The id of a token given as the vocabulary spells it, such as "<|im_end|>"; None where there is none."""
        try:
            return self._backend.token_to_id(token)
        except UnicodeEncodeError:  # a lone surrogate, which no vocabulary holds
            return None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, with the special tokens (such as BOS) that the model expects around it.

        A text that begins with BOS already, as a chat template writes it, gets no second one.
        ``add_special_tokens=False``: those in the text only. Raises ValueError for a lone surrogate, which no Unicode
        text holds.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds a lone surrogate at character {error.start}: it is not Unicode"
            ) from error
        with library_errors(f"{self._name} cannot encode this text"):
            ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        doubled = add_special_tokens and self._prefix and ids[len(self._prefix) :][: len(self._prefix)] == self._prefix
        return ids[len(self._prefix) :] if doubled else ids

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The token ids of a conversation, as `chat_text` writes it: special tokens are the template's own."""
        return self.encode(self.chat_text(messages, add_generation_prompt, **variables), add_special_tokens=False)

    def chat_text(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """A conversation as text. Raises ValueError without a template, and what ChatTemplate.render raises."""
        if self.chat_template is None:
            raise ValueError(f"{self._name} came without a chat template; give a text instead of messages")
        return self.chat_template.render(messages, add_generation_prompt, **variables)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, without special tokens unless they are asked for."""
        with library_errors(f"{self._name} cannot decode these ids"):
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def is_open(self, token_id: int, skip_special_tokens: bool = True) -> bool:
        """Whether tokens after this one can change how it and those before it are decoded (see TextDecoder)."""
        return token_id in self.byte_ids or (skip_special_tokens and token_id in self._special_ids)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the special tokens, by their text."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text has at least len(text) / longest_token tokens."""
        return max(map(len, self._backend.get_vocab()))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    def _special_tokens_before(self) -> list[int]:
        """What is put before every text, such as BOS."""
        with contextlib.suppress(ValueError), library_errors(self._name):
            return special_tokens_around(self._backend)[0]
        return []

    def _byte_tokens(self) -> frozenset[int]:
        decoder = self._backend.decoder
        if decoder is None or b"ByteFallback" not in decoder.__getstate__():
            return frozenset()
        ids = (self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(token_id for token_id in ids if token_id is not None)
