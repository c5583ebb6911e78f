"""A tokenizer as the vocabulary of a GGUF file: the way back from gguf_vocabulary.py, of both its kinds."""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

from layerskip_kernels.model.bpe_splits import BPE_SPLITS
from layerskip_kernels.model.gguf_vocabulary import byte_level_split
from layerskip_kernels.model.spm_tokenizer import SPACE, spm_pairs
from layerskip_kernels.model.tokenizer import Tokenizer
from layerskip_kernels.model.tokenizer_files import special_tokens_around
from layerskip_kernels.model_config import ModelConfig

__all__ = ["vocabulary_metadata"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # of tokenizer.ggml.token_type
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
# How a vocabulary cuts texts is known by what it does to this one.
PROBE = (
    "It's THEY'LL 12345 x1y2, \n\n  def f(a_b):\n\t return a+b\t \r\n...!?"
    " \u00e9t\u00e9 \u4f60\u597d \u3042\u30a2 \u0e44\u0e17\u0e22 $100 3.14 #/A/b [Zz] \U0001f600  "
)


def vocabulary_metadata(own: Tokenizer, name: str, config: ModelConfig) -> dict[str, Any]:
    """tokenizer.ggml.* and the chat template of a tokenizer; ``name``: of the model, for errors.

    Raises ValueError for a tokenizer that is neither byte-level BPE cut by a rule of `BPE_SPLITS` nor sentencepiece's
    BPE.
    """
    tokenizer = own.backend
    fields = json.loads(tokenizer.to_str())
    if fields["model"]["type"] == "BPE" and (fields["decoder"] or {}).get("type") == "ByteLevel":
        kind = _byte_level(fields, name, tokenizer)
    elif fields["model"]["type"] == "BPE" and fields["model"].get("byte_fallback"):
        kind = _sentencepiece(fields, name, tokenizer, config)
    else:
        raise ValueError(f"{name} has neither a byte-level BPE vocabulary nor sentencepiece's BPE: no other is written")
    kind |= {"tokens": _tokens(tokenizer, config), "token_type": _types(tokenizer, fields, config)}
    before, after = special_tokens_around(tokenizer)
    first, last = next(iter(before), None), next(reversed(after), None)
    kind |= {"add_bos_token": first is not None, "add_eos_token": last is not None}
    end = last if last is not None else next(iter(config.eos_token_ids), None)
    kind |= {f"{key}_token_id": token for key, token in (("bos", first), ("eos", end)) if token is not None}
    vocabulary = {f"tokenizer.ggml.{key}": value for key, value in kind.items()}
    if own.chat_template is not None:
        vocabulary["tokenizer.chat_template"] = own.chat_template.text
    return vocabulary


def _tokens(tokenizer: tokenizers.Tokenizer, config: ModelConfig) -> list[str]:
    ids = {index: token for token, index in tokenizer.get_vocab().items()}
    return [ids.get(index, f"[UNUSED_{index}]") for index in range(config.vocab_size)]


def _types(tokenizer: tokenizers.Tokenizer, fields: dict[str, Any], config: ModelConfig) -> list[int]:
    added, tokens = tokenizer.get_added_tokens_decoder(), _tokens(tokenizer, config)
    has_bytes, unknown = fields["model"].get("byte_fallback"), fields["model"].get("unk_token")

    def kind(index: int, token: str) -> int:
        if has_bytes and token == unknown:
            return UNKNOWN
        if index in added:
            return CONTROL if added[index].special else USER_DEFINED
        return BYTE if has_bytes and BYTE_TOKEN.fullmatch(token) else NORMAL

    return [kind(index, token) for index, token in enumerate(tokens)]


# ---- byte-level BPE ----


def _byte_level(fields: dict[str, Any], name: str, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    merges = [" ".join(pair) for pair in _pairs(fields)]
    return {"model": "gpt2", "pre": _split_name(name, tokenizer, fields), "merges": merges}


def _pairs(fields: dict[str, Any]) -> list[tuple[str, str]]:
    merges = fields["model"]["merges"]
    split = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in split]


def _split_name(model: str, tokenizer: tokenizers.Tokenizer, fields: dict[str, Any]) -> str:
    """The name of the rule that cuts PROBE as this tokenizer does, and takes whole pieces as tokens if it does."""
    found = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(PROBE)]
    ignores = bool(fields["model"].get("ignore_merges"))
    names = [
        name
        for name, split in BPE_SPLITS.items()
        if [piece for piece, _ in byte_level_split(split).pre_tokenize_str(PROBE)] == found
    ]
    exact = [name for name in names if BPE_SPLITS[name].ignore_merges == ignores]
    if not exact and names and _merges_make_all(tokenizer, fields):
        exact = names  # where merges lead to every token, it makes no difference
    if not exact:
        raise ValueError(f"{model} cuts texts by a rule that no GGUF file has a name for")
    return exact[0]


def _merges_make_all(tokenizer: tokenizers.Tokenizer, fields: dict[str, Any]) -> bool:
    merging = tokenizers.Tokenizer.from_str(
        json.dumps({**fields, "model": {**fields["model"], "ignore_merges": False}})
    )
    added = tokenizer.get_added_tokens_decoder()
    return all(
        len(merging.model.tokenize(token)) == 1 for token, index in tokenizer.get_vocab().items() if index not in added
    )


# ---- sentencepiece ----


def _sentencepiece(
    fields: dict[str, Any], name: str, tokenizer: tokenizers.Tokenizer, config: ModelConfig
) -> dict[str, Any]:
    """The scores that lead to the same merges: of a token, minus the rank of the first merge that makes it."""
    tokens, merges = _tokens(tokenizer, config), _pairs(fields)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    pairs = spm_pairs(tokens, scores)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}  # found before all merges
    others = {left + right for left, right in set(pairs) - set(merges)} - added
    if others or _made(pairs, ranks) != _made(merges, ranks):
        raise ValueError(f"{name} has merges that no scores of a sentencepiece vocabulary lead to")
    prefix = tokenizer.encode("a", add_special_tokens=False).tokens[:1]
    unknown = fields["model"].get("unk_token")
    return {
        "model": "llama",
        "scores": scores,
        "add_space_prefix": bool(prefix and prefix[0].startswith(SPACE)),
        **({} if unknown is None else {"unknown_token_id": tokenizer.token_to_id(unknown)}),
    }


def _made(pairs: list[tuple[str, str]], ranks: dict[str, int]) -> list[str]:
    """What the pairs make that have a rank, in their order."""
    made = [left + right for left, right in pairs if left + right in ranks]
    return [token for i, token in enumerate(made) if i == 0 or token != made[i - 1]]
