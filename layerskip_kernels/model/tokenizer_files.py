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
from tokenizers import AddedToken, processors

from layerskip_kernels.model.files import read_bytes
from layerskip_kernels.model.json_file import JsonObject, read_json_object
from layerskip_kernels.model.sentencepiece_file import sentencepiece_tokenizer

__all__ = ["TokenizerFile", "library_errors", "read_tokenizer", "special_tokens_around", "token_text"]

MAX_TOKENIZER_BYTES = 256 << 20  # the largest there are have some 30 MB
MAX_GROWTH = 64  # characters that a normalizer or a decoder may make of one; published ones make one of one
MAX_SECONDS = 0.5  # of one thread, for a text of about PROBES[-1] characters; published patterns take milliseconds
PROBES = (16, 32, 64, 128, 256, 512, 1024)
# The classes that take add_bos_token and add_eos_token by their word, whatever tokenizer.json says; others never look.
OBEDIENT = tuple(
    f"{name}Tokenizer{kind}" for name in ("Llama", "CodeLlama", "Gemma", "Cohere") for kind in ("", "Fast")
)
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
        _obey(_settings(directory), path, backend)
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
    config = _settings(path.parent).values
    backend = sentencepiece_tokenizer(
        path,
        add_bos=config.get("add_bos_token") is not False,
        add_eos=config.get("add_eos_token") is True,
        legacy=config.get("legacy") is True,
    )
    added = _read_object(path.with_name("added_tokens.json")).values
    for token, wanted in sorted(added.items(), key=lambda item: item[1]):
        backend.add_tokens([AddedToken(token, normalized=False)])
        if backend.token_to_id(token) != wanted:
            raise ValueError(f"added_tokens.json gives {token[:80]!r} the id {str(wanted)[:20]}, which it cannot have")
    return backend


def _settings(directory: Path) -> JsonObject:
    return _read_object(directory / "tokenizer_config.json")


def _read_object(path: Path) -> JsonObject:
    return read_json_object(path) if path.exists() else JsonObject(str(path), {})


# ---- special tokens around a text ----


def special_tokens_around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids of the special tokens that are put before and after every text, such as BOS."""
    alone, around = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    before = next((i for i in range(len(around)) if alone and around[i:][: len(alone)] == alone), None)
    return ([], []) if before is None else (around[:before], around[before + len(alone) :])


def token_text(value: Any) -> str | None:
    """A special token's text, given as itself or as an object with its content."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _obey(settings: JsonObject, path: Path, backend: tokenizers.Tokenizer) -> None:
    """BOS and EOS as tokenizer_config.json asks for them, where its class is one that listens to it.

    DeepSeek's distilled Qwen and Llama have their BOS from there alone: Transformers 4 and llama.cpp put it,
    Transformers 5 does not look any more. What is not said there is as tokenizer.json has it.
    """
    if settings.get("tokenizer_class") not in OBEDIENT:
        return
    with library_errors(f"{path} cannot encode a text"):
        there = special_tokens_around(backend)
    around = [_as_asked(settings, name, ids, backend) for name, ids in zip(("bos", "eos"), there, strict=True)]
    if around == [*there]:
        return
    with library_errors(f"{path} cannot have the special tokens that {settings.where} asks for"):
        before, after = ([(backend.id_to_token(index), index) for index in ids] for ids in around)
        backend.post_processor = processors.TemplateProcessing(
            single=[*(text for text, _ in before), "$A", *(text for text, _ in after)], special_tokens=before + after
        )


def _as_asked(settings: JsonObject, name: str, ids: list[int], backend: tokenizers.Tokenizer) -> list[int]:
    """What stands at one end of a text, ``ids`` by tokenizer.json."""
    if settings.get(f"add_{name}_token") is None or settings.boolean(f"add_{name}_token", False) == bool(ids):
        return ids
    if ids:
        return []
    text = token_text(settings.get(f"{name}_token"))
    index = None if text is None else backend.token_to_id(text)
    if index is None:
        settings.refuse(f"{name}_token", f"a token of the vocabulary, since add_{name}_token is true")
    return [index]
