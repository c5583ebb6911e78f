"""``layerskip train``: from a YAML file to a folder that ``load_model`` reads."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import nn
from transformers import LlamaConfig, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from layerskip_kernels.training.config import TrainingConfig
from layerskip_kernels.training.export import export_model
from layerskip_kernels.training.model import LayerSkipLlama
from layerskip_kernels.training.text_data import (
    END_OF_TEXT,
    Collator,
    as_dataset,
    packed_rows,
    prompt_rows,
    read_texts,
    train_tokenizer,
)
from layerskip_kernels.training.trainer import (
    LayerSkipTrainer,
    MarkComplete,
    MetricsFile,
    SaveOnSignal,
    last_checkpoint,
)

__all__ = ["build_trainer", "train"]

TOKENIZER_TEXTS = 20_000  # a vocabulary is learnt from at most so many

# What a training that resumes bit for bit needs, and what suits a run in a terminal; the file's ``training`` overrides.
ARGUMENTS: dict[str, Any] = {
    "save_total_limit": 2,
    "logging_steps": 10,
    "report_to": "none",
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": None,
    "seed": 0,
}


def train(config: TrainingConfig) -> Path | None:
    """Train, or go on with the training that the output folder holds; returns the trained model's folder.

    Ended by SIGTERM it saves a checkpoint and returns None; the same call then goes on as if nothing had happened.
    """
    stop = SaveOnSignal()
    trainer = build_trainer(config)
    trainer.add_callback(stop)
    checkpoint = last_checkpoint(Path(config.output_dir))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.received is not None:
        return None
    folder = Path(config.output_dir) / config.name
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_world_process_zero():
        export_model(model, Path(config.output_dir) / "tokenizer.json", folder)
    return folder


def build_trainer(config: TrainingConfig) -> LayerSkipTrainer:
    """The trainer of a config: vocabulary, data sets (both made once, in the output folder) and model."""
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    device = {"use_cpu": not torch.accelerator.is_available()}  # else bf16 is refused where there is no GPU
    arguments = TrainingArguments(output_dir=config.output_dir, **{**ARGUMENTS, **device, **config.training})
    set_seed(arguments.seed)
    with arguments.main_process_first(desc="reading the texts"):
        tokenizer = _tokenizer(config, output)
        end_of_text = _end_of_text(config, tokenizer)
        splits = {name: _dataset(config, name, tokenizer, end_of_text) for name in ("train", "validation")}
    model = _model(config, end_of_text, len(tokenizer.get_vocab()))
    return LayerSkipTrainer(
        model=model,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=Collator(end_of_text),
        callbacks=[MarkComplete(), MetricsFile()],
        layer_dropout=config.layer_dropout,
        early_exit=config.early_exit,
        eval_exits=tuple(config.eval_exits),
    )


def _tokenizer(config: TrainingConfig, output: Path) -> tokenizers.Tokenizer:
    """The vocabulary in the output folder: the model's own, or one learnt from the texts."""
    path = output / "tokenizer.json"
    if not path.is_file() and config.model.source is None:
        texts = ("".join(record.values()) for record in read_texts(map(Path, config.data.train)))
        train_tokenizer((text for text, _ in zip(texts, range(TOKENIZER_TEXTS))), config.model.vocab_size, path)
    return tokenizers.Tokenizer.from_file(str(path))


def _end_of_text(config: TrainingConfig, tokenizer: tokenizers.Tokenizer) -> int:
    return tokenizer.token_to_id(END_OF_TEXT)


def _dataset(config: TrainingConfig, name: str, tokenizer: tokenizers.Tokenizer, end_of_text: int) -> Any:
    paths = [Path(path) for path in getattr(config.data, name)]
    if not paths:
        return None
    records = read_texts(paths)
    first = next(records, None)
    if first is None:
        raise ValueError(f"data.{name} holds no texts")
    records, length = chain([first], records), config.data.sequence_length
    if "prompt" in first:
        rows = prompt_rows(records, tokenizer, end_of_text, length)
    else:
        rows = packed_rows((record["text"] for record in records), tokenizer, end_of_text, length)
    dataset = as_dataset(rows, Path(config.output_dir) / "data" / f"{name}.arrow")
    return dataset.select(range(min(len(dataset), config.data.validation_rows))) if name == "validation" else dataset


def _model(config: TrainingConfig, end_of_text: int, vocab_size: int) -> nn.Module:
    sizes = {"tie_word_embeddings": True, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    return LayerSkipLlama(LlamaConfig(**{**sizes, **(config.model.sizes or {}), "vocab_size": vocab_size}))
