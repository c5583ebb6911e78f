"""The vocabulary of a GGUF file as a tokenizer of the `tokenizers` library: the ids are llama.cpp's.

Two kinds (tokenizer.ggml.model): "gpt2", byte-level BPE, cut by `bpe_splits` before it merges; "llama", sentencepiece.
Tokens of the types control and unknown, and those that end a text, are special: found in a text before all else, and
not shown in decoded text; user-defined ones are found so, too, and shown.
"""

import warnings
from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.model.bpe_splits import BPE_SPLITS, BpeSplit
from layerskip_kernels.model.end_tokens import END_TEXTS
from layerskip_kernels.model.gguf_content import GgufFile
from layerskip_kernels.model.spm_tokenizer import spm_bpe, spm_decoder, spm_normalizer

__all__ = ["byte_level_split", "gguf_tokenizer", "gguf_tokenizer_config", "gguf_tokens"]

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
KEY = "tokenizer.ggml."
# What llama.cpp takes where the file does not say: BOS, EOS.
DEFAULT_IDS = {"gpt2": (11, 11), "llama": (1, 2)}


def gguf_tokens(gguf: GgufFile) -> list[str] | None:
    """The tokens by id, or None without a vocabulary. Raises ValueError naming the file for one that is there twice."""
    tokens = gguf.strings(f"{KEY}tokens")
    if tokens is None:
        return None
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        first: dict[str, int] = {}
        index, token = next((i, t) for i, t in enumerate(tokens) if first.setdefault(t, i) != i)
        raise ValueError(f"{gguf.path} has the token {token[:80]!r} twice: ids {first[token]} and {index}")
    return tokens


def gguf_tokenizer(gguf: GgufFile) -> tokenizers.Tokenizer | None:
    """The tokenizer, or None without a vocabulary.

    Raises UnsupportedModel for a kind of vocabulary or a pre-tokenizer that is not known, naming those that are; and
    ValueError naming the file and the key for a vocabulary that contradicts itself.
    """
    tokens = gguf_tokens(gguf)
    if tokens is None:
        return None
    kind = gguf.metadata.get(f"{KEY}model")
    builders: dict[Any, Callable[[GgufFile, list[str]], tuple[tokenizers.Tokenizer, bool]]]
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece}
    if not isinstance(kind, str) or kind not in builders:
        raise UnsupportedModel(f"{KEY}model", kind, ", ".join(builders), gguf.path)
    tokenizer, add_bos = builders[kind](gguf, tokens)
    _add_special_tokens(gguf, tokens, tokenizer)
    _add_bos_and_eos(gguf, tokens, tokenizer, add_bos)
    return tokenizer


def gguf_tokenizer_config(gguf: GgufFile, tokens: list[str]) -> dict[str, Any]:
    """What a tokenizer_config.json says besides tokenizer.json: special tokens by name, and the chat template."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = gguf.metadata.get(f"{KEY}{key}_token_id")
        if type(token_id) is int and 0 <= token_id < len(tokens):
            config[f"{name}_token"] = tokens[token_id]
    if isinstance(template := gguf.metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return config


def _byte_level_bpe(gguf: GgufFile, tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    split = _split(gguf)
    merges = gguf.strings(f"{KEY}merges")
    if merges is None:
        raise ValueError(f"{gguf.path} lacks the metadata key '{KEY}merges', which a gpt2 vocabulary needs")
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = list(dict.fromkeys(_pair(gguf, merge, vocab) for merge in merges))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=split.ignore_merges))
    tokenizer.pre_tokenizer = byte_level_split(split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.add_bos


def byte_level_split(split: BpeSplit) -> pre_tokenizers.PreTokenizer:
    """What cuts a text before it is merged."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _split(gguf: GgufFile) -> BpeSplit:
    name = gguf.metadata.get(f"{KEY}pre")
    if name is None:
        warnings.warn(f"{gguf.path} lacks {KEY}pre: its texts are cut by the default rule", stacklevel=2)
        name = "default"
    if not isinstance(name, str) or name not in BPE_SPLITS:
        raise UnsupportedModel(f"{KEY}pre", name, ", ".join(sorted(BPE_SPLITS)), gguf.path)
    return BPE_SPLITS[name]


def _pair(gguf: GgufFile, merge: str, vocab: dict[str, int]) -> tuple[str, str]:
    # A token may itself begin with the space that separates the two.
    left, space, right = merge[:1] + merge[1:].partition(" ")[0], *merge[1:].partition(" ")[1:]
    if not space or not {left, right, left + right} <= vocab.keys():
        raise ValueError(f"{gguf.path} has the merge {merge[:80]!r}, which is not of two tokens that make a third")
    return left, right


def _sentencepiece(gguf: GgufFile, tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    scores = gguf.numbers(f"{KEY}scores")
    if scores is None or len(scores) < len(tokens):
        raise ValueError(f"{gguf.path} needs a number in '{KEY}scores' for each of its {len(tokens)} tokens")
    unknown = gguf.metadata.get(f"{KEY}unknown_token_id", 0)
    unknown = tokens[_checked_id(gguf, f"{KEY}unknown_token_id", unknown, tokens)]
    prefix = _flag(gguf, f"{KEY}add_space_prefix", True)
    tokenizer = tokenizers.Tokenizer(spm_bpe(tokens, scores.tolist(), unknown))
    tokenizer.normalizer = spm_normalizer(prefix)
    tokenizer.decoder = spm_decoder(prefix)
    return tokenizer, True


def _add_special_tokens(gguf: GgufFile, tokens: list[str], tokenizer: tokenizers.Tokenizer) -> None:
    types = gguf.numbers(f"{KEY}token_type")
    if types is not None and len(types) < len(tokens):
        raise ValueError(f"{gguf.path} has {len(types)} numbers in '{KEY}token_type' for {len(tokens)} tokens")
    kinds = [] if types is None else types.tolist()
    special = {index for index, kind in enumerate(kinds[: len(tokens)]) if kind in (CONTROL, UNKNOWN)}
    special |= {index for index, token in enumerate(tokens) if token in END_TEXTS}
    added = sorted(special | {index for index, kind in enumerate(kinds[: len(tokens)]) if kind == USER_DEFINED})
    tokenizer.add_tokens([AddedToken(tokens[index], special=index in special, normalized=False) for index in added])


def _add_bos_and_eos(gguf: GgufFile, tokens: list[str], tokenizer: tokenizers.Tokenizer, add_bos: bool) -> None:
    default_bos, default_eos = DEFAULT_IDS[gguf.metadata[f"{KEY}model"]]
    before = _flag(gguf, f"{KEY}add_bos_token", add_bos)
    after = _flag(gguf, f"{KEY}add_eos_token", False)
    around = []
    for wanted, name, default in ((before, "bos", default_bos), (after, "eos", default_eos)):
        key = f"{KEY}{name}_token_id"
        index = _checked_id(gguf, key, gguf.metadata.get(key, default), tokens) if wanted else 0
        around.append((tokens[index], index) if wanted else None)
    bos, eos = around
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(bos[:1] if bos else ()), "$A", *(eos[:1] if eos else ())],
            special_tokens=list({token for token in around if token}),
        )


def _checked_id(gguf: GgufFile, key: str, value: Any, tokens: list[str]) -> int:
    if type(value) is not int or not 0 <= value < len(tokens):
        raise ValueError(f"{gguf.path} has {key} {str(value)[:80]}; it must be a token id in 0..{len(tokens) - 1}")
    return value


def _flag(gguf: GgufFile, key: str, default: bool) -> bool:
    value = gguf.metadata.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"{gguf.path} has {key} {str(value)[:80]}; it must be true or false")
    return value
