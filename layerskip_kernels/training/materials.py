"""What a training reads: the vocabulary and the tokenised rows, made once and kept in the output folder."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import torch

from layerskip_kernels.model.lora import ADAPTER_CONFIG
from layerskip_kernels.model.sources import locate
from layerskip_kernels.model.tokenizer import Tokenizer
from layerskip_kernels.training.config import TrainingConfig
from layerskip_kernels.training.kept import Origin, keep, origin
from layerskip_kernels.training.text_data import packed_rows, prompt_rows, read_texts, train_tokenizer, write_rows

__all__ = ["load_rows", "load_vocabulary", "origin_of_training", "source_folder"]

TOKENIZER_TEXTS = 20_000  # a vocabulary is learnt from at most this many
TOKENIZER = "tokenizer.json"


def source_folder(config: TrainingConfig) -> Path | None:
    """The folder of the model that a training starts from; None for one from scratch.

    Raises ValueError for adapters, which are no model by themselves, and for a folder without a tokenizer.
    """
    name = "grown_from" if config.model.source is None else "source"
    trained = getattr(config.model, name)
    if trained is None:
        return None
    folder, _ = locate(trained, torch.float32)
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"model.{name}: {trained} holds adapters, not a whole model; name the model that they adapt as "
            "model.source, and to train them further their folder as lora.grown_from"
        )
    if not (folder / TOKENIZER).is_file():
        raise ValueError(f"model.{name}: {trained} has no {TOKENIZER}, which training needs to read the texts")
    return folder


def origin_of_training(config: TrainingConfig) -> Origin:
    """What the checkpoints of a training belong to: its model, its vocabulary and the rows that it learns from."""
    return origin(
        [],
        model={**asdict(config.model), "attention": None},  # another implementation of it is the same model
        lora=None if config.lora is None else asdict(config.lora),
        rows=_origin_of_rows(config, "train"),
    )


def load_vocabulary(config: TrainingConfig) -> tokenizers.Tokenizer:
    """The tokenizer: the model's own, as it is read for decoding, or one learnt from the texts."""
    path = Path(config.output_dir) / TOKENIZER
    folder = source_folder(config)

    def make(unfinished: Path) -> None:
        if folder is not None:
            shutil.copyfile(folder / TOKENIZER, unfinished)
            return
        texts = ("".join(record.values()) for record in read_texts(map(Path, config.data.train)))
        train_tokenizer(islice(texts, TOKENIZER_TEXTS), config.model.vocab_size, unfinished)

    keep(path, _origin_of_vocabulary(config), make)
    own = None if folder is None else Tokenizer.from_directory(folder)
    return tokenizers.Tokenizer.from_file(str(path)) if own is None else own.backend


def load_rows(
    config: TrainingConfig, split: str, tokenizer: tokenizers.Tokenizer, end_of_text: int
) -> datasets.Dataset | None:
    """The rows of ``train`` or ``validation``, mapped into memory; None for a split without files."""
    paths = [Path(path) for path in getattr(config.data, split)]
    if not paths:
        return None
    path = Path(config.output_dir) / "data" / f"{split}.arrow"
    made_from = {**_origin_of_rows(config, split), "end_of_text": end_of_text}
    keep(path, made_from, lambda unfinished: write_rows(_rows(config, split, tokenizer, end_of_text), unfinished))
    dataset = datasets.Dataset.from_file(str(path))
    return dataset.select(range(min(len(dataset), config.data.validation_rows))) if split == "validation" else dataset


def _rows(config: TrainingConfig, split: str, tokenizer: tokenizers.Tokenizer, end_of_text: int) -> Any:
    records = read_texts([Path(path) for path in getattr(config.data, split)])
    first = next(records, None)
    if first is None:
        raise ValueError(f"data.{split} holds no texts")
    records, length = chain([first], records), config.data.sequence_length
    if "prompt" in first:
        return prompt_rows(records, tokenizer, end_of_text, length)
    return packed_rows((record["text"] for record in records), tokenizer, end_of_text, length)


def _origin_of_vocabulary(config: TrainingConfig) -> Origin:
    folder = source_folder(config)
    if folder is not None:
        return origin(path for path in (folder / TOKENIZER, folder / "tokenizer_config.json") if path.exists())
    return origin(map(Path, config.data.train), vocab_size=config.model.vocab_size, texts=TOKENIZER_TEXTS)


def _origin_of_rows(config: TrainingConfig, split: str) -> Origin:
    return origin(
        map(Path, getattr(config.data, split)),
        sequence_length=config.data.sequence_length,
        vocabulary=_origin_of_vocabulary(config),
    )
