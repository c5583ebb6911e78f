"""Sentencepiece's tokenizer.model, for folders that have no tokenizer.json: a protocol buffer, read as far as needed.

Fields are those of sentencepiece_model.proto: ModelProto {pieces = 1, trainer_spec = 2, normalizer_spec = 3}.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from layerskip_kernels.model.files import read_bytes
from layerskip_kernels.model.spm_tokenizer import spm_bpe, spm_decoder, spm_normalizer

__all__ = ["sentencepiece_tokenizer"]

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # SentencePiece.Type

Fields = dict[int, list[int | bytes]]


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class _Model:
    """``charsmap``: the compiled normalisation rules, empty for none."""

    path: Path
    pieces: list[_Piece]
    kind: int
    unk_id: int
    bos_id: int
    eos_id: int
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def sentencepiece_tokenizer(
    path: Path, add_bos: bool = True, add_eos: bool = False, legacy: bool = False
) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.model (BPE or unigram) with BOS and EOS around a text as asked.

    BPE puts a space where Transformers 5 does, for a model that wants one: before a text that does not begin with one,
    and with ``legacy`` also after each special token in it. (Sentencepiece itself would put one before a space, too.)
    Raises ValueError naming the file for what is not such a model.
    """
    model = _read_model(path)
    texts, scores = [piece.text for piece in model.pieces], [piece.score for piece in model.pieces]
    if model.kind == BPE:
        tokenizer = tokenizers.Tokenizer(spm_bpe(texts, scores, texts[model.unk_id]))
    else:
        has_bytes = any(piece.text == "<0x00>" for piece in model.pieces)
        tokenizer = tokenizers.Tokenizer(Unigram(list(zip(texts, scores, strict=True)), model.unk_id, has_bytes))
    steps = _normalizers(model)
    if model.kind == UNIGRAM:
        tokenizer.normalizer = normalizers.Sequence([*steps, spm_normalizer(model.add_dummy_prefix)])
        scheme = "never"
    else:
        tokenizer.normalizer = normalizers.Sequence(steps)
        scheme = "never" if not model.add_dummy_prefix else "always" if legacy else "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = spm_decoder(model.add_dummy_prefix)
    kinds = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
    tokenizer.add_tokens(
        [AddedToken(p.text, special=kinds[p.kind], normalized=False) for p in model.pieces if p.kind in kinds]
    )
    before = [(texts[model.bos_id], model.bos_id)] if add_bos else []
    after = [(texts[model.eos_id], model.eos_id)] if add_eos else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(text for text, _ in before), "$A", *(text for text, _ in after)], special_tokens=before + after
        )
    return tokenizer


def _normalizers(model: _Model) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    return steps


def _read_model(path: Path) -> _Model:
    raw = read_bytes(path)
    try:
        fields = _fields(raw)
        pieces = [_piece(_fields(_bytes(piece))) for piece in fields.get(1, [])]
        trainer, normalizer = (_fields(_bytes(fields.get(number, [b""])[-1])) for number in (2, 3))
        model = _Model(
            path,
            pieces,
            kind=_integer(trainer, 3, UNIGRAM),
            unk_id=_integer(trainer, 40, 0),
            bos_id=_integer(trainer, 41, 1),
            eos_id=_integer(trainer, 42, 2),
            charsmap=_bytes(normalizer.get(2, [b""])[-1]),
            add_dummy_prefix=bool(_integer(normalizer, 3, 1)),
            remove_extra_whitespaces=bool(_integer(normalizer, 4, 1)),
        )
    except (_DamagedError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
    _check(model)
    return model


def _check(model: _Model) -> None:
    if model.kind not in (UNIGRAM, BPE):
        raise ValueError(f"{model.path} has model_type {model.kind}; supported: 1 (unigram), 2 (BPE)")
    if len({piece.text for piece in model.pieces}) != len(model.pieces):
        raise ValueError(f"{model.path} is damaged: it has a piece twice")
    for name in ("unk_id", "bos_id", "eos_id"):
        if not 0 <= (value := getattr(model, name)) < len(model.pieces):
            raise ValueError(f"{model.path} has {name} {value}, but {len(model.pieces)} pieces")


def _piece(fields: Fields) -> _Piece:
    (score,) = struct.unpack("<f", _bytes(fields.get(2, [bytes(4)])[-1]))
    return _Piece(_bytes(fields.get(1, [b""])[-1]).decode(), score, _integer(fields, 3, NORMAL))


class _DamagedError(Exception):
    """Bytes that are not a protocol buffer of this form."""


def _integer(fields: Fields, number: int, default: int) -> int:
    value = fields.get(number, [default])[-1]
    if isinstance(value, bytes):
        raise _DamagedError(f"field {number} is not a number")
    return value - (1 << 64) if value >> 63 else value  # negative ones are written as 64 bits


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _DamagedError("a number stands where text or a message must be")
    return value


def _fields(raw: bytes) -> Fields:
    """The values of a message by field number: integers, and bytes for all else."""
    fields: Fields = {}
    for number, value in _items(raw):
        fields.setdefault(number, []).append(value)
    return fields


def _items(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0
    while position < len(raw):
        key, position = _varint(raw, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(raw, position)
            yield key >> 3, value
            continue
        if kind == 2:
            length, position = _varint(raw, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise _DamagedError(f"wire type {kind} at byte {position}")
        if length > len(raw) - position:
            raise _DamagedError(f"a field of {length} bytes at {position}, beyond the end")
        yield key >> 3, raw[position : position + length]
        position += length


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(raw):
            raise _DamagedError("it ends within a number")
        byte = raw[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise _DamagedError(f"a number of more than 10 bytes at {position}")
