"""``layerskip train``: from a YAML file to a folder that ``load_model`` reads."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, TrainingArguments, set_seed

from layerskip_kernels.config import NUM_SPECULATIONS
from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.machine import has_bf16_units
from layerskip_kernels.model.defaults import DraftDefaults, write_defaults
from layerskip_kernels.model.draft_vocab import read_draft_vocab
from layerskip_kernels.model.families import FAMILIES
from layerskip_kernels.model.hf_config import read_hf_config
from layerskip_kernels.model.json_file import read_json_object
from layerskip_kernels.model.loading import read_checkpoint
from layerskip_kernels.model.lora import ADAPTER_WEIGHTS
from layerskip_kernels.model.sources import locate
from layerskip_kernels.model.tensor_names import FUSED
from layerskip_kernels.training.config import LoraSettings, TrainingConfig
from layerskip_kernels.training.examples import write_examples
from layerskip_kernels.training.export import export_adapter, export_model
from layerskip_kernels.training.heads import transplant_heads
from layerskip_kernels.training.kept import check_checkpoints, only_one
from layerskip_kernels.training.materials import load_rows, load_vocabulary, origin_of_training, source_folder
from layerskip_kernels.training.model import EarlyExitTraining, trainable_class
from layerskip_kernels.training.progress import Progress, announce
from layerskip_kernels.training.text_data import END_OF_TEXT, Collator
from layerskip_kernels.training.trainer import (
    LayerSkipTrainer,
    MarkComplete,
    MetricsFile,
    SaveOnSignal,
    check_checkpoint,
    last_checkpoint,
)

__all__ = ["build_trainer", "export", "export_checkpoint", "train"]

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
    Raises ValueError while another process trains in the same output folder.
    """
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with only_one(output):
        return _train(config)


def _train(config: TrainingConfig) -> Path | None:
    stop = SaveOnSignal()
    trainer = build_trainer(config)
    trainer.add_callback(stop)
    checkpoint = last_checkpoint(Path(config.output_dir))
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    if trainer.is_world_process_zero():
        announce(trainer, 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]))
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
    check_checkpoint(checkpoint)
    trainer = build_trainer(config)
    trainer._load_from_checkpoint(str(checkpoint))
    export(trainer.accelerator.unwrap_model(trainer.model), config, folder)
    return checkpoint


PRECISION = "ACCELERATE_MIXED_PRECISION"


@contextlib.contextmanager
def _precision_of_its_own() -> Iterator[None]:
    """Transformers 4 leaves a training's precision in the environment, where the next one would take it for its own."""
    before = os.environ.get(PRECISION)
    try:
        yield
    finally:
        os.environ.pop(PRECISION, None)
        if before is not None:
            os.environ[PRECISION] = before


@_precision_of_its_own()
def build_trainer(config: TrainingConfig) -> LayerSkipTrainer:
    """The trainer of a config: vocabulary, data sets (both kept in the output folder) and model.

    Raises ValueError when the folder holds checkpoints of other data or of another model.
    """
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    arguments = _arguments(config)
    set_seed(arguments.seed)
    with arguments.main_process_first(desc="reading the texts"):
        check_checkpoints(output, last_checkpoint(output), origin_of_training(config))
        tokenizer = load_vocabulary(config)
        model = _model(config, tokenizer)
        end_of_text = _end_of_text(model)
        splits = {name: load_rows(config, name, tokenizer, end_of_text) for name in ("train", "validation")}
    return LayerSkipTrainer(
        model=model if config.lora is None else _with_adapters(model, config.lora),
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=Collator(end_of_text),
        callbacks=[MarkComplete(), MetricsFile(), Progress()],
        layer_dropout=config.layer_dropout,
        early_exit=config.early_exit,
        eval_exits=tuple(config.eval_exits),
        similar_lengths=config.data.similar_lengths,
    )


def _arguments(config: TrainingConfig) -> TrainingArguments:
    on_cpu = bool(config.training.get("use_cpu", not torch.accelerator.is_available()))
    given = {**ARGUMENTS, "use_cpu": on_cpu, **config.training}  # without use_cpu, bf16 is refused on a CPU
    if given.get("bf16") and on_cpu and not has_bf16_units():
        given["bf16"] = False
        print(
            "layerskip: bf16 is off: this processor has no instructions for it, and emulating them takes twice the "
            "time of fp32",
            file=sys.stderr,
        )
    return TrainingArguments(output_dir=config.output_dir, **given)


def export(model: Any, config: TrainingConfig, folder: Path) -> None:
    """Write what ``load_model`` reads: the model in bf16, or its adapters alone; with the exit that it was trained
    for, the draft vocabulary of that where it learnt one, and prompts to show and measure it with."""
    if config.lora is None:
        export_model(model, Path(config.output_dir) / "tokenizer.json", folder, source=source_folder(config))
    else:
        export_adapter(model, config.model.source, folder)
    recipe = config.early_exit
    ids = None if recipe is None or recipe.draft_vocab is None else tuple(read_draft_vocab(Path(recipe.draft_vocab)))
    exit_layer = trained_exit(config, int(model.config.num_hidden_layers))
    if exit_layer is not None:
        write_examples(config.data, folder)  # write_defaults keeps them
        write_defaults(folder, DraftDefaults(exit_layer, NUM_SPECULATIONS, ids))


def trained_exit(config: TrainingConfig, num_layers: int) -> int | None:
    """The exit that a model was trained to draft with: the first one that has a weight, else the first one evaluated,
    else a third of the layers; None for a model of one layer, which has none."""
    weights = (config.early_exit.weights if config.early_exit is not None else None) or {}
    if num_layers < 2:
        return None
    for named in ([layer for layer, weight in weights.items() if weight > 0.0], config.eval_exits):
        if below := [layer for layer in named if layer < num_layers]:
            return min(below)
    return num_layers // 3 or 1


def _model(config: TrainingConfig, tokenizer: tokenizers.Tokenizer) -> Any:
    if config.model.source is not None:
        directory, _ = locate(config.model.source, torch.float32)
        given = read_json_object(directory / "config.json")
        read_hf_config(given.values, given.where)  # what load_model would refuse is refused before it is trained
        theirs = trainable_class(given.values["model_type"])
        attention = _attention(config, theirs)
        return theirs.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, attn_implementation=attention
        )
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    fields: dict[str, Any] = {"tie_word_embeddings": True, "bos_token_id": end_of_text, "eos_token_id": end_of_text}
    fields |= {"pad_token_id": None, **(config.model.sizes or {}), "vocab_size": tokenizer.get_vocab_size()}
    family = fields.pop("model_type", "llama")
    if family not in FAMILIES:
        raise UnsupportedModel("model.sizes: model_type", family, ", ".join(map(repr, FAMILIES)))
    theirs = trainable_class(family)
    model = theirs(AutoConfig.for_model(family, **fields, attn_implementation=_attention(config, theirs)))
    if config.model.grown_from is not None:
        _grow(model, Path(config.model.grown_from))
    return model


def _attention(config: TrainingConfig, theirs: Any) -> str:
    """The config's, or "eager" in place of "sdpa" for a family that Transformers has no other for."""
    wanted = config.model.attention
    return "eager" if wanted == "sdpa" and not theirs._supports_sdpa else wanted


def _grow(model: Any, folder: Path) -> None:
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


def _end_of_text(model: EarlyExitTraining) -> int:
    end = model.config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    if end is None:
        raise ValueError("model.source must name an end of text (eos_token_id in its config.json): texts end with it")
    return end


def _with_adapters(model: EarlyExitTraining, lora: LoraSettings) -> nn.Module:
    early = rf"layers\.({'|'.join(map(str, range(lora.early_layers)))})\.\w+\.\w+"
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        rank_pattern={early: lora.early_rank} if lora.early_layers else {},
        alpha_pattern={early: lora.early_alpha} if lora.early_layers else {},
        target_modules=_adapted_modules(model, lora.targets),
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(model, settings)  # type: ignore[arg-type]
    if lora.grown_from is None:
        transplant_heads(adapted, lora.transplants)
    else:
        loaded: Any = set_peft_model_state_dict(adapted, load_file(Path(lora.grown_from) / ADAPTER_WEIGHTS))
        if loaded.unexpected_keys:
            raise ValueError(f"lora.grown_from: the adapters in {lora.grown_from} are for other layers")
    return adapted


def _adapted_modules(model: EarlyExitTraining, targets: list[str]) -> list[str]:
    """The linear layers that ``lora.targets`` names, or those that they are fused into."""
    present = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    fused = {part.split(".")[1]: name.split(".")[1] for name, parts in FUSED.items() for part in parts}
    modules = [target if target in present else fused.get(target, target) for target in targets]
    if unknown := [target for target, module in zip(targets, modules, strict=True) if module not in present]:
        raise ValueError(f"lora.targets: the model has no linear layer {unknown[0]!r}; it has {sorted(present)}")
    return list(dict.fromkeys(modules))
