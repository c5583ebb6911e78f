"""``layerskip train``: from a YAML file to a folder that ``load_model`` reads."""

from __future__ import annotations

import shutil
import sys
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, TrainingArguments, set_seed

from layerskip_kernels.adapter import ADAPTER_WEIGHTS
from layerskip_kernels.config import NUM_SPECULATIONS
from layerskip_kernels.defaults import DraftDefaults, write_defaults
from layerskip_kernels.draft_vocab import read_draft_vocab
from layerskip_kernels.loading import locate, read_checkpoint
from layerskip_kernels.training.config import LoraSettings, TrainingConfig
from layerskip_kernels.training.export import export_adapter, export_model
from layerskip_kernels.training.heads import transplant_heads
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

__all__ = ["build_trainer", "export", "export_checkpoint", "train"]

TOKENIZER_TEXTS = 20_000  # a vocabulary is learnt from at most so many

# What a training that resumes bit for bit needs, and what suits a run in a terminal; the file's ``training`` overrides.
ARGUMENTS: dict[str, Any] = {
    "save_total_limit": 2,
    "logging_steps": 10,
    "report_to": "none",
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": not sys.stderr.isatty(),
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
    if trainer.is_world_process_zero():
        export(trainer.accelerator.unwrap_model(trainer.model), config, folder)
    return folder


def export_checkpoint(config: TrainingConfig, folder: Path) -> Path:
    """Write the newest checkpoint's model to ``folder`` as ``load_model`` reads it; returns the checkpoint's folder."""
    checkpoint = last_checkpoint(Path(config.output_dir))
    if checkpoint is None:
        raise FileNotFoundError(f"{config.output_dir} holds no complete checkpoint yet; save_steps says when it will")
    trainer = build_trainer(config)
    trainer._load_from_checkpoint(str(checkpoint))
    export(trainer.accelerator.unwrap_model(trainer.model), config, folder)
    return checkpoint


def build_trainer(config: TrainingConfig) -> LayerSkipTrainer:
    """The trainer of a config: vocabulary, data sets (both made once, in the output folder) and model."""
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    device = {"use_cpu": not torch.accelerator.is_available()}  # else bf16 is refused where there is no GPU
    arguments = TrainingArguments(output_dir=config.output_dir, **{**ARGUMENTS, **device, **config.training})
    set_seed(arguments.seed)
    with arguments.main_process_first(desc="reading the texts"):
        tokenizer = _tokenizer(config, output / "tokenizer.json")
        model = _model(config, tokenizer)
        end_of_text = _end_of_text(model)
        splits = {name: _dataset(config, name, tokenizer, end_of_text) for name in ("train", "validation")}
    return LayerSkipTrainer(
        model=model if config.lora is None else _with_adapters(model, config.lora),
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=Collator(end_of_text),
        callbacks=[MarkComplete(), MetricsFile()],
        layer_dropout=config.layer_dropout,
        early_exit=config.early_exit,
        eval_exits=tuple(config.eval_exits),
        similar_lengths=config.data.similar_lengths,
    )


def export(model: nn.Module, config: TrainingConfig, folder: Path) -> None:
    """Write what ``load_model`` reads: the model in bf16, or its adapters alone; and the draft vocabulary of its exit,
    where that learnt one."""
    if config.lora is None:
        export_model(model, Path(config.output_dir) / "tokenizer.json", folder)
    else:
        export_adapter(model, config.model.source, folder)
    recipe = config.early_exit
    if recipe is not None and recipe.draft_vocab is not None and recipe.weights is not None:
        exit_layer = min(layer for layer, weight in recipe.weights.items() if weight > 0.0)
        ids = tuple(read_draft_vocab(Path(recipe.draft_vocab)))
        write_defaults(folder, DraftDefaults(exit_layer, NUM_SPECULATIONS, ids))


def _tokenizer(config: TrainingConfig, path: Path) -> tokenizers.Tokenizer:
    """The vocabulary in the output folder: the model's own, or one learnt from the texts."""
    if not path.is_file():
        trained = config.model.source or config.model.grown_from
        if trained is not None:
            shutil.copyfile(locate(trained)[0] / "tokenizer.json", path)
        else:
            texts = ("".join(record.values()) for record in read_texts(map(Path, config.data.train)))
            train_tokenizer(islice(texts, TOKENIZER_TEXTS), config.model.vocab_size, path)
    return tokenizers.Tokenizer.from_file(str(path))


def _model(config: TrainingConfig, tokenizer: tokenizers.Tokenizer) -> LayerSkipLlama:
    if config.model.source is not None:
        directory, _ = locate(config.model.source)
        return LayerSkipLlama.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, attn_implementation=config.model.attention
        )
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    fields: dict[str, Any] = {"tie_word_embeddings": True, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    fields |= {**(config.model.sizes or {}), "vocab_size": tokenizer.get_vocab_size()}
    fields["attn_implementation"] = config.model.attention
    model = LayerSkipLlama(LlamaConfig(**fields))
    if config.model.grown_from is not None:
        _grow(model, Path(config.model.grown_from))
    return model


def _grow(model: LayerSkipLlama, folder: Path) -> None:
    """Start with a shallower model's weights; the layers that it lacks add nothing to the residual until trained."""
    weights = read_checkpoint(folder, torch.float32)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in weights.tensors.items():
        if shapes.get(name) != tuple(tensor.shape):
            raise ValueError(f"model.grown_from: {name} is {list(tensor.shape)} there, {shapes.get(name)} here")
    model.load_state_dict(weights.tensors, strict=False)
    with torch.no_grad():
        for layer in model.model.layers[weights.config.num_layers :]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()


def _end_of_text(model: LayerSkipLlama) -> int:
    end = model.config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    if end is None:
        raise ValueError("model.source must name an end of text (eos_token_id in its config.json): texts end with it")
    return end


def _with_adapters(model: LayerSkipLlama, lora: LoraSettings) -> nn.Module:
    early = rf"layers\.({'|'.join(map(str, range(lora.early_layers)))})\.\w+\.\w+"
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        rank_pattern={early: lora.early_rank} if lora.early_layers else {},
        alpha_pattern={early: lora.early_alpha} if lora.early_layers else {},
        target_modules=lora.targets,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, settings)
    if lora.grown_from is None:
        transplant_heads(adapted, lora.transplants)
    else:
        loaded: Any = set_peft_model_state_dict(adapted, load_file(Path(lora.grown_from) / ADAPTER_WEIGHTS))
        if loaded.unexpected_keys:
            raise ValueError(f"lora.grown_from: the adapters in {lora.grown_from} are for other layers")
    return adapted


def _dataset(
    config: TrainingConfig, name: str, tokenizer: tokenizers.Tokenizer, end_of_text: int
) -> datasets.Dataset | None:
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
