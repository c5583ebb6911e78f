"""A model's config as the metadata of a GGUF file: the way back from gguf_config.py, which is asked whether it leads to
the same config."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.families import FAMILIES, Family
from layerskip_kernels.model.gguf_config import ROPE_FACTORS, SHORT_FACTORS, hf_config
from layerskip_kernels.model.gguf_file import read_gguf
from layerskip_kernels.model.hf_config import read_hf_config
from layerskip_kernels.model.rope import scaled_frequencies
from layerskip_kernels.model_config import ModelConfig, RopeScaling

__all__ = ["add_metadata", "config_metadata", "rope_factor_tensors"]

TOKENS = ("bos_token_id", "eos_token_ids")  # which the vocabulary says


def config_metadata(checkpoint: Checkpoint, tensor_names: Iterable[str]) -> dict[str, Any]:
    """The metadata of a checkpoint whose file will hold ``tensor_names`` (GGUF's).

    Raises UnsupportedModel naming the switch that would be another one when the file is read.
    """
    config, family = checkpoint.config, FAMILIES[checkpoint.model_type]
    reader = next(other for other in FAMILIES.values() if other.architecture == family.architecture)
    keys = {**_sizes(config), **_rope(config), **_own_keys(config, reader)}
    metadata = {"general.name": checkpoint.name, **{f"{family.architecture}.{k}": v for k, v in keys.items()}}
    found = _read_back(family, metadata, [*tensor_names, *rope_factor_tensors(config)], rope_factor_tensors(config))
    for field in fields(ModelConfig):
        written, read = getattr(config, field.name), getattr(found, field.name)
        if field.name not in TOKENS and not _is_close(written, read):
            supported = f"{read!r} (all that a GGUF file of {family.architecture!r} can say)"
            raise UnsupportedModel(field.name, written, supported, checkpoint.name)
    return metadata


def rope_factor_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """What frequencies are divided by, fp32 [R / 2], where no formula of the metadata says it."""
    if config.rope_scaling.kind == "llama3":
        plain = scaled_frequencies(config.head_dim, config.rope_theta, RopeScaling())
        divisors = plain / scaled_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return {ROPE_FACTORS: divisors.float().numpy()}
    if config.rope_scaling.kind == "longrope":
        return {SHORT_FACTORS: np.array(config.rope_scaling.short_factors, np.float32)}
    return {}


def add_metadata(writer: gguf.GGUFWriter, metadata: dict[str, Any]) -> None:
    """Add each value by its type; lists as arrays."""
    add: dict[type, Callable[[str, Any], None]]
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        add.get(type(value), writer.add_array)(key, value)


def _sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.rotary_dim or config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }


def _rope(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling.kind in ("linear", "yarn"):
        keys: dict[str, Any] = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
        original = {"rope.scaling.original_context_length": scaling.original_max_positions}
        return keys | (original if scaling.kind == "yarn" else {})
    if scaling.kind == "longrope":
        return {
            "rope.scaling.original_context_length": scaling.original_max_positions,
            "rope.scaling.attn_factor": float(scaling.attention_factor),
        }
    return {}


def _own_keys(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Of the fields of config.json that the family has and metadata has a key for (gguf_config.FIELDS)."""
    values = {
        "attention_multiplier": ("attention.scale", config.attention_scale),
        "embedding_multiplier": ("embedding_scale", config.embedding_multiplier),
        "residual_multiplier": ("residual_scale", config.residual_multiplier),
        "logits_scaling": ("logit_scale", 1.0 / config.logits_multiplier),
        "attn_logit_softcapping": ("attn_logit_softcapping", config.score_cap),
        "final_logit_softcapping": ("final_logit_softcapping", config.logits_cap),
        "rope_local_base_freq": ("rope.freq_base_swa", config.local_rope_theta),
    }
    keys: dict[str, Any] = {
        key: float(value) for name, (key, value) in values.items() if name in family.fields and value
    }
    if any(config.layer_windows) and "sliding_window" in family.fields:
        keys["attention.sliding_window"] = max(config.layer_windows)
    return keys


def _read_back(
    family: Family, metadata: dict[str, Any], names: list[str], factors: dict[str, np.ndarray]
) -> ModelConfig:
    """What is read from such a file: one of the same metadata, whose other tensors are of one number."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "header.gguf")
        writer = gguf.GGUFWriter(path, family.architecture)
        add_metadata(writer, metadata)
        for name in names:
            writer.add_tensor(name, factors.get(name, np.zeros(1, np.float32)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return read_hf_config(hf_config(read_gguf(path), []))


def _is_close(written: Any, read: Any) -> bool:
    """Equal, but for floats, which have fp32 in the file."""
    if isinstance(written, RopeScaling):
        return (
            isinstance(read, RopeScaling)
            and written.kind == read.kind
            and all(_is_close(getattr(written, field.name), getattr(read, field.name)) for field in fields(RopeScaling))
        )
    if isinstance(written, tuple) and isinstance(read, tuple):
        return len(written) == len(read) and all(map(_is_close, written, read))
    if type(written) is float and type(read) is float:
        return abs(written - read) <= 1e-6 * abs(written)
    return written == read
