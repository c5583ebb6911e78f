"""The files that a tokenizer is read from, and the `tokenizers` library's errors as sentences that name them."""

import contextlib
import json
import math
import time
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
MAX_GROWTH = 64  # characters that a normalizer or a decoder may make of one; published ones make one of one
MAX_SECONDS = 0.5  # of one thread, for a text of about PROBES[-1] characters; published patterns take milliseconds
PROBES = (16, 32, 64, 128, 256, 512, 1024)
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
            backend = tokenizers.Tokenizer.from_buffer(raw)
        _check_growth(path, backend)
        _check_patterns(path, backend)
        return TokenizerFile(path, backend)
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


def _check_growth(path: Path, backend: tokenizers.Tokenizer) -> None:
    """Raise ValueError when a few replacements after one another would make a text many times as long."""
    for name, part in (("normalizer", backend.normalizer), ("decoder", backend.decoder)):
        state = None if part is None else json.loads(part.__getstate__())
        growth = math.prod(max(1, len(text)) for text in _replacements(state))
        if growth > MAX_GROWTH:
            made = growth if growth < 10**9 else "billions of"
            raise ValueError(
                f"{path} has a {name} that makes up to {made} characters of one, more than {MAX_GROWTH}; "
                "use the tokenizer that the model was published with"
            )


def _replacements(state: Any) -> Iterator[str]:
    """What the steps of a normalizer or a decoder put in the place of a character, or before a text."""
    if isinstance(state, list):
        for step in state:
            yield from _replacements(step)
    elif isinstance(state, dict):
        for name, value in state.items():
            if name in ("content", "prepend") and isinstance(value, str):
                yield value
            elif name in ("normalizers", "decoders"):
                yield from _replacements(value)


def _check_patterns(path: Path, backend: tokenizers.Tokenizer) -> None:
    """Raise ValueError for regular expressions that backtrack without end on short texts of one kind.

    On longer ones the library gives up by itself, after ten million steps a character.
    """
    parts = [part for part in (backend.normalizer, backend.pre_tokenizer) if part is not None]
    if not any(b'"Regex"' in part.__getstate__() for part in parts):
        return
    # What may follow in a pattern is in the text, but not there where it would end the match.
    tail = "\0" + "".join(sorted({chr(byte) for part in parts for byte in part.__getstate__() if 32 < byte < 127}))
    for length in PROBES:
        for unit in ("a", " ", "0", "\n", "!", "a ", "aA0 "):
            text, start = (unit * length)[:length] + tail, time.thread_time()
            with library_errors(f"{path} has a regular expression that cannot be matched with {text[:4]!r}..."):
                text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
                if backend.pre_tokenizer is not None:
                    backend.pre_tokenizer.pre_tokenize_str(text)
            if time.thread_time() - start > MAX_SECONDS:
                raise ValueError(
                    f"{path} has a regular expression that takes more than {MAX_SECONDS:g} s for {len(text)} "
                    "characters; use the tokenizer that the model was published with"
                )


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
