"""Which tokens end a text: end of text, end of turn and end of message, of every kind of file."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["END_TEXTS", "end_token_ids", "gguf_end_token_ids"]

# Tokens that end a text or a turn, by their text, as llama.cpp knows them: many GGUF files name the end of text alone.
END_TEXTS = frozenset(
    """<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
    <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response>
    [e~[""".split()
) | {"<\uff5cend▁of▁sentence\uff5c>"}
GGUF_END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def end_token_ids(
    sources: Iterable[tuple[object, Mapping[str, Any]]], vocab_size: int, token_id: Callable[[str], int | None]
) -> tuple[int, ...]:
    """The ids that end a text, of all sources together, in their order.

    ``sources``: (the file's path, its contents) of config.json, generation_config.json and tokenizer_config.json; each
    may have ``eos_token_id`` (an id or a list of ids) and ``eos_token`` (a token's text, or an object with it as
    ``content``). ``token_id``: the id of a token's text, None for one that the vocabulary does not have.
    Raises ValueError naming the file and the field for what is not a token id of the vocabulary.
    """
    ids: dict[int, None] = {}
    for where, fields in sources:
        value = fields.get("eos_token_id")
        for end in value if isinstance(value, list) else [] if value is None else [value]:
            if type(end) is not int or not 0 <= end < vocab_size:
                shown = repr(end)[:80]
                raise ValueError(f"{where} has eos_token_id {shown}; it must be token ids in 0..{vocab_size - 1}")
            ids[end] = None
        text = fields.get("eos_token")
        text = text.get("content") if isinstance(text, dict) else text
        named = token_id(text) if isinstance(text, str) else None
        if named is not None and named < vocab_size:
            ids[named] = None
    return tuple(ids)


def gguf_end_token_ids(where: object, metadata: Mapping[str, Any], tokens: list[str] | None) -> list[int]:
    """The ids that end a text of a GGUF file: eos, eot and eom of its metadata, and those known by their text.

    ``tokens``: the vocabulary; None where the file has none. Raises ValueError naming the file and the key.
    """
    ids: dict[int, None] = {}
    for key in GGUF_END_KEYS:
        value = metadata.get(key)
        if value is None:
            continue
        if type(value) is not int or value < 0 or (tokens is not None and value >= len(tokens)):
            raise ValueError(f"{where} has {key} {str(value)[:80]}; it must be a token id of the vocabulary")
        ids[value] = None
    texts = set(tokens or []) & END_TEXTS
    if {"<|call|>", "<|calls|>"} & texts and {"<|return|>", "<|flush|>"} & texts:
        texts.discard("<|end|>")  # there it ends a message within the turn
    ids |= dict.fromkeys(index for index, token in enumerate(tokens or []) if token in texts)
    return list(ids)
