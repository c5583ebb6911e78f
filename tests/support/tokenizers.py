"""Tokenizers for the tiny models."""

from typing import ClassVar

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from layerskip_kernels.model.text_stream import TextStream
from layerskip_kernels.model.tokenizer import Tokenizer


def streamed(tokenizer, ids) -> list[str]:
    """The pieces of a text whose tokens come one by one."""
    stream = TextStream(tokenizer)
    return [piece for piece in [*(stream.push([token_id]) for token_id in ids), stream.finish()] if piece]


class PlainTokenizer:
    """No special tokens, and tokens that no other token changes."""

    special_tokens: ClassVar[dict[str, int]] = {}
    longest_token = 1000
    chat_template = None

    def is_open(self, token_id: int, skip_special_tokens: bool = True) -> bool:
        return False


class Words(PlainTokenizer):
    """A tokenizer for the tiny model: a token per word; and every token is a letter."""

    def encode(self, text: str) -> list[int]:
        return [sum(map(ord, word)) % 101 for word in text.split()]

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + token % 26) for token in ids)


class Letters(PlainTokenizer):
    """A tokenizer of which token n is one letter, or two."""

    longest_token = 1

    def encode(self, text: str) -> list[int]:
        return [ord(character) % 101 for character in text]

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + token % 26) * (1 + token % 2) for token in ids)


def byte_fallback() -> Tokenizer:
    """As of Llama 2: a token for each byte that no other token spells."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    vocab |= {"\u2581": 259, "a": 260, "\u2581a": 261, "b": 262, "\u2581\u4e16": 263}
    model = models.BPE(vocab=vocab, merges=[("\u2581", "a")], byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    return Tokenizer(backend)


def byte_level() -> Tokenizer:
    """As of GPT-2 and Llama 3: tokens are runs of bytes."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return Tokenizer(backend)


def ids_of(tokenizer: Tokenizer, values) -> list[int]:
    """The tokens of single bytes in a byte-level vocabulary."""
    alphabet = {b: c for c, b in zip(byte_characters(), range(256), strict=True)}
    return [tokenizer._backend.token_to_id(alphabet[value]) for value in values]


def byte_characters() -> list[str]:
    """The characters that stand for bytes 0 to 255 in a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(b) if b in shown else chr(next(hidden)) for b in range(256)]
