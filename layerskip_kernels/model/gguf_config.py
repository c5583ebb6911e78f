"""The metadata of a GGUF file as the contents of a Hugging Face config.json."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.model.families import FAMILIES, Family
from layerskip_kernels.model.gguf_content import GgufFile, read_gguf_tensor
from layerskip_kernels.model.rope import scaled_frequencies
from layerskip_kernels.model_config import RopeScaling

__all__ = ["LONG_FACTORS", "ROPE_FACTORS", "SHORT_FACTORS", "family_of", "hf_config", "own_dtype"]

ROPE_FACTORS = "rope_freqs.weight"

# Factors of LongRoPE, one for each frequency: up to the original length, and beyond.
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"

# Keys, after the architecture's name, and the field of config.json that says the same.
FIELDS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base_swa": "rope_local_base_freq",
}
# Each of them changes the arithmetic of a layer when it is set.
REFUSED_KEYS = ("expert_count", "attention.clamp_kqv", "attention.key_length_mla", "rope.dimension_sections")
# The models of Gemma 2 and 3 whose scores are divided by another square root than that of a head's length.
LARGE_GEMMAS = {("gemma2", 46), ("gemma3", 62)}


@dataclass(frozen=True)
class Metadata:
    """A file's metadata, read by the names that keys have after the architecture's."""

    gguf: GgufFile
    architecture: str

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def get(self, name: str) -> Any:
        return self.gguf.metadata.get(self.key(name))

    def count(self, name: str, default: int | None = None) -> int:
        return _count(self.gguf, self.key(name), default)

    def number(self, name: str, default: float | None = None) -> float:
        return _number(self.gguf, self.key(name), default)


def family_of(gguf: GgufFile) -> tuple[str, Family]:
    """The ``model_type`` and the family of ``general.architecture``; raises UnsupportedModel for another one."""
    architecture = gguf.metadata.get("general.architecture")
    for model_type, family in FAMILIES.items():
        if family.architecture == architecture:
            return model_type, family
    supported = ", ".join(repr(name) for name in dict.fromkeys(family.architecture for family in FAMILIES.values()))
    raise UnsupportedModel("general.architecture", architecture, supported, gguf.path)


def hf_config(gguf: GgufFile, end_ids: list[int]) -> dict[str, Any]:
    """The metadata as the contents of a config.json; ``end_ids``: the tokens that end a text.

    Raises UnsupportedModel naming the key, or ValueError naming the file and the key or tensor.
    """
    model_type, family = family_of(gguf)
    metadata = Metadata(gguf, family.architecture)
    num_heads = metadata.count("attention.head_count")
    head_dim = _head_dim(metadata, num_heads)
    scaling = _rope_scaling(metadata, head_dim)
    fields = {
        "architectures": [family.class_name],
        "model_type": model_type,
        "dtype": str(own_dtype(gguf)).removeprefix("torch."),
        "vocab_size": _vocab_size(metadata),
        "hidden_size": metadata.count("embedding_length"),
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": metadata.count("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.count("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
        "rope_scaling": scaling,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": gguf.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_ids,
    }
    if scaling is not None and scaling["rope_type"] == "longrope":  # a default beside the scaling would go first
        fields["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return fields | _own_fields(metadata, family, num_heads, head_dim)


def _own_fields(metadata: Metadata, family: Family, num_heads: int, head_dim: int) -> dict[str, Any]:
    """Those of the family, of keys and of tensors that are there."""
    fields: dict[str, Any] = {}
    for key in REFUSED_KEYS:
        if metadata.get(key):
            raise UnsupportedModel(metadata.key(key), metadata.get(key), "a file without it", metadata.gguf.path)
    for key, field in FIELDS.items():
        if (value := metadata.get(key)) is None:
            continue
        if field in family.fields:
            fields[field] = value or None
        elif value:
            raise UnsupportedModel(metadata.key(key), value, "a file without it", metadata.gguf.path)
    for field, tensor in (("attention_bias", "attn_q.bias"), ("mlp_bias", "ffn_gate.bias")):
        if field in family.fields:
            fields[field] = f"blk.0.{tensor}" in metadata.gguf.tensors
    if "attention_multiplier" in family.fields:
        fields["attention_multiplier"] = fields.get("attention_multiplier") or head_dim**-0.5
    if "query_pre_attn_scalar" in family.fields:
        large = (family.architecture, metadata.count("block_count")) in LARGE_GEMMAS
        fields["query_pre_attn_scalar"] = metadata.count("embedding_length") // num_heads if large else head_dim
    rotary_dim = metadata.count("rope.dimension_count", head_dim)
    if "partial_rotary_factor" in family.fields and rotary_dim != head_dim:
        # Read back as int(head_dim * factor), which must not fall to the number below.
        fields["partial_rotary_factor"] = min(1.0, (rotary_dim + 0.25) / head_dim)
    return fields


def _count(gguf: GgufFile, key: str, default: int | None = None) -> int:
    value = gguf.metadata.get(key, default)
    if value is None:
        raise ValueError(f"{gguf.path} lacks the metadata key {key!r}")
    if type(value) is not int or value < 1:
        raise UnsupportedModel(key, value, "one positive integer for the whole model", gguf.path)
    return value


def _number(gguf: GgufFile, key: str, default: float | None = None) -> float:
    value = gguf.metadata.get(key, default)
    if value is None:
        raise ValueError(f"{gguf.path} lacks the metadata key {key!r}")
    if type(value) is not float:
        raise UnsupportedModel(key, value, "one floating-point number", gguf.path)
    return value


def own_dtype(gguf: GgufFile) -> torch.dtype:
    """The dtype that the model is run in where nothing else is asked for: bfloat16 when anything is quantised."""
    if any(tensor.is_quantised for tensor in gguf.tensors.values()):
        return torch.bfloat16
    embedding = gguf.tensors.get("token_embd.weight")
    return embedding.dtype if embedding else torch.float32


def _vocab_size(metadata: Metadata) -> int:
    embedding = metadata.gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{metadata.gguf.path} lacks tensor 'token_embd.weight'")
    return metadata.count("vocab_size", embedding.shape[0])


def _head_dim(metadata: Metadata, num_heads: int) -> int:
    head_dim = metadata.count("attention.key_length", max(1, metadata.count("embedding_length") // num_heads))
    _, family = family_of(metadata.gguf)
    partial = "partial_rotary_factor" in family.fields
    for name in ("attention.value_length",) if partial else ("attention.value_length", "rope.dimension_count"):
        if (value := metadata.count(name, head_dim)) != head_dim:
            raise UnsupportedModel(metadata.key(name), value, f"the length of a head, {head_dim}", metadata.gguf.path)
    return head_dim


def _rope_scaling(metadata: Metadata, head_dim: int) -> dict[str, Any] | None:
    if ROPE_FACTORS in metadata.gguf.tensors:
        return _llama3_scaling(metadata, head_dim)
    if SHORT_FACTORS in metadata.gguf.tensors:
        return _longrope_scaling(metadata)
    # The older key has no type beside it.
    linear_factor = metadata.number("rope.scale_linear", 1.0)
    name = "rope.scaling.type"
    kind = metadata.get(name) or ("none" if linear_factor == 1.0 else "linear")
    if kind == "none":
        return None
    factor = metadata.number("rope.scaling.factor", linear_factor)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = metadata.count("rope.scaling.original_context_length", metadata.count("context_length"))
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UnsupportedModel(metadata.key(name), kind, "'none', 'linear', 'yarn'", metadata.gguf.path)


def _longrope_scaling(metadata: Metadata) -> dict[str, Any]:
    tensors = metadata.gguf.tensors
    scaling = {
        "rope_type": "longrope",
        "original_max_position_embeddings": metadata.count("rope.scaling.original_context_length"),
        "short_factor": read_gguf_tensor(tensors[SHORT_FACTORS]).flatten().tolist(),
    }
    if metadata.get("rope.scaling.attn_factor") is not None:
        scaling["attention_factor"] = metadata.number("rope.scaling.attn_factor")
    return scaling


def _llama3_scaling(metadata: Metadata, head_dim: int) -> dict[str, Any]:
    """Recover the scaling of Llama 3 from its table of divisors, one per frequency, fp32 [K/2].

    The largest divisor is the factor; the other constants are those of every Llama 3.1 to 3.3, and the table
    is computed from them to see whether that is so.
    """
    divisors = read_gguf_tensor(metadata.gguf.tensors[ROPE_FACTORS]).double()
    theta = metadata.number("rope.freq_base", 10000.0)
    factor = float(divisors.max()) if tuple(divisors.shape) == (head_dim // 2,) else 0.0
    if not 0 < factor < 1e30 or not _are_llama3(divisors, head_dim, theta, RopeScaling("llama3", factor)):
        shown, supported = divisors.flatten()[:4].tolist(), "the scaling of Llama 3.1 to 3.3"
        raise UnsupportedModel(f"tensor {ROPE_FACTORS!r}", shown, supported, metadata.gguf.path)
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _are_llama3(divisors: Tensor, head_dim: int, theta: float, scaling: RopeScaling) -> bool:
    plain = scaled_frequencies(head_dim, theta, RopeScaling())
    return torch.allclose(divisors, plain / scaled_frequencies(head_dim, theta, scaling), rtol=1e-4, atol=0.0)
