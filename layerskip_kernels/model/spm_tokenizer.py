"""Sentencepiece vocabularies, from a GGUF file or from tokenizer.model, as tokenizers of the `tokenizers` library."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import decoders, models, normalizers

__all__ = ["SPACE", "spm_bpe", "spm_decoder", "spm_normalizer", "spm_pairs"]

SPACE = "▁"


@dataclass(frozen=True)
class _Merge:
    """Two tokens next to each other that become one; the best score first."""

    left: str
    right: str
    score: float


def spm_bpe(tokens: Sequence[str], scores: Sequence[float], unknown: str | None) -> models.BPE:
    """The model that joins the neighbours whose union has the best score, as sentencepiece's BPE does.

    Characters that are not tokens become the tokens of their bytes ("<0x0A>"), where the vocabulary has them.
    """
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = spm_pairs(tokens, scores)
    return models.BPE(vocab=vocab, merges=pairs, byte_fallback=True, fuse_unk=True, unk_token=unknown)


def spm_pairs(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Each two tokens whose union is a token: the union with the best score first."""
    vocab = set(tokens)
    merges = [
        _Merge(token[:cut], token[cut:], scores[index])
        for index, token in enumerate(tokens)
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    # Of the same union the longer left part first: in a run of equal characters the left ones are joined first.
    merges.sort(key=lambda merge: -merge.score)
    return [(merge.left, merge.right) for merge in merges]


def spm_normalizer(add_space_prefix: bool) -> normalizers.Normalizer:
    """Spaces as "▁", one before the text where the vocabulary was trained so."""
    replace = normalizers.Replace(" ", SPACE)
    return normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if add_space_prefix else replace


def spm_decoder(add_space_prefix: bool) -> decoders.Decoder:
    """The way back; the space that was put before the text is taken away."""
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if add_space_prefix else []))
