"""The files that a tokenizer is read from, and the `tokenizers` library's errors as sentences that name them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from layerskip_kernels.model.files import read_bytes
from layerskip_kernels.model.json_file import read_json_object
from layerskip_kernels.model.sentencepiece_file import sentencepiece_tokenizer

__all__ = ["TokenizerFile", "library_errors", "read_tokenizer"]

MAX_TOKENIZER_BYTES = 256 << 20  # the largest there are have some 30 MB
CONVERT = "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` of Transformers writes a tokenizer.json"


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer, and the file that it was read from."""

    path: Path
    backend: tokenizers.Tokenizer


def read_tokenizer(directory: Path) -> TokenizerFile | None:
    """tokenizer.json, or else sentencepiece's tokenizer.model, of a directory; None when there is neither.

    Raises ValueError naming the file when it is damaged, or of a kind that is not read.
    """
    path = directory / "tokenizer.json"
    if path.exists():
        raw = read_bytes(path, MAX_TOKENIZER_BYTES)
        with library_errors(f"{path} is not a tokenizer that this version of tokenizers reads"):
            return TokenizerFile(path, tokenizers.Tokenizer.from_buffer(raw))
    path = directory / "tokenizer.model"
    if path.exists():
        with library_errors(f"{path} cannot be read, and there is no tokenizer.json ({CONVERT})"):
            return TokenizerFile(path, _read_sentencepiece(path))
    return None


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Whatever the `tokenizers` library raises as a ValueError of ``what``: it has plain Exceptions, and panics."""
    try:
        yield
    except BaseException as error:
        # Rust's panics are no Exception in Python, and their class cannot be imported.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{what}: {str(error)[:200]}") from error
        raise


def _read_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """As Transformers does it: BOS first unless tokenizer_config.json says no, and the tokens of added_tokens.json."""
    config = _read_object(path.with_name("tokenizer_config.json"))
    backend = sentencepiece_tokenizer(
        path,
        add_bos=config.get("add_bos_token") is not False,
        add_eos=config.get("add_eos_token") is True,
        legacy=config.get("legacy") is True,
    )
    added = _read_object(path.with_name("added_tokens.json"))
    for token, wanted in sorted(added.items(), key=lambda item: item[1]):
        backend.add_tokens([AddedToken(token, normalized=False)])
        if backend.token_to_id(token) != wanted:
            raise ValueError(f"added_tokens.json gives {token[:80]!r} the id {str(wanted)[:20]}, which it cannot have")
    return backend


def _read_object(path: Path) -> dict[str, Any]:
    return read_json_object(path).values if path.exists() else {}
