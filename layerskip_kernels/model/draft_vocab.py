"""Draft vocabularies (`Model.with_draft_vocab`): counted from text, kept as a JSON list of token ids."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from layerskip_kernels.checks import MAX_INT
from layerskip_kernels.model.files import write_whole
from layerskip_kernels.model.json_file import are_integers, read_json
from layerskip_kernels.model.json_lines import json_lines, require_text
from layerskip_kernels.model.tokenizer import Tokenizer

__all__ = ["most_frequent_tokens", "read_draft_vocab", "texts_written", "write_draft_vocab"]


def most_frequent_tokens(tokenizer: Tokenizer, texts: Iterable[str], size: int, ends: Iterable[int] = ()) -> list[int]:
    """The ``size`` most frequent token ids of some texts, ascending; among equals the lower id.

    ``ends``: what ends a text, in the list whatever the texts hold. Where these have fewer different tokens, the
    lowest other ids follow: a byte-pair vocabulary numbers its tokens by how early, and so how often, they were
    merged. Raises ValueError for a size outside the vocabulary.
    """
    if not 1 <= size <= tokenizer.vocab_size:
        raise ValueError(f"size must be in 1..{tokenizer.vocab_size}, the tokenizer's vocabulary, got {size}")
    counts = Counter(token for text in texts for token in tokenizer.encode(text))
    last = set(ends)
    by_frequency = sorted(range(tokenizer.vocab_size), key=lambda token: (token not in last, -counts[token], token))
    return sorted(by_frequency[:size])


def texts_written(name: str, contents: str) -> Iterator[str]:
    """What a model writes according to a file: each line's "completion" or "text" of one named .jsonl, else all of it.

    Raises ValueError naming the line that has neither.
    """
    if not name.endswith(".jsonl"):
        yield contents
        return
    for where, record in json_lines(contents, name):
        record = record if isinstance(record, dict) else {}
        text = record.get("completion", record.get("text"))
        yield require_text(text, where, 'an object with a string "completion" or "text"')


def write_draft_vocab(path: Path, token_ids: Iterable[int]) -> None:
    write_whole(path, json.dumps(list(token_ids)) + "\n")


def read_draft_vocab(path: Path) -> list[int]:
    """The token ids of a file. Raises ValueError naming the file if it is not a JSON list of integers."""
    ids = read_json(path)
    if not isinstance(ids, list) or not are_integers(ids, 0, MAX_INT):
        raise ValueError(f"{path} must hold a JSON list of token ids; `layerskip draft-vocab` writes such files")
    return ids
