"""The families of models: what sets each apart from Llama, as data. Nothing else in the package knows their names.

A family is the fields of config.json that it reads beside the shared ones (hf_config.SETTERS says which switches of
ModelConfig they set), the switches that all its models have, and what Transformers takes for a field that a file leaves
out. ``FAMILIES`` is keyed by ``model_type``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerskip_kernels.model.json_file import JsonObject

__all__ = ["FAMILIES", "Family"]

LLAMA_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """One family; the values that are not given are Llama's.

    - ``class_name``: of its causal language model in Transformers;
    - ``architecture``: ``general.architecture`` of its GGUF files;
    - ``fields``: of config.json, beside those that all families read;
    - ``switches``: of ModelConfig, the same in all its models;
    - ``defaults``: of fields that config.json may leave out;
    - ``activation_field``: where config.json names the activation; ``activations``: names for it besides Transformers';
    - ``has_window``: whether a layer has the window of ``sliding_window`` where ``layer_types`` does not say
      (None: the family has no windows);
    - ``local_rope``: whether layers with a window turn by ``rope_local_base_freq``;
    - ``scaled_embedding``: whether embeddings are multiplied by sqrt(hidden_size);
    - ``paired_rows``: whether GGUF files hold q's and k's rows as llama.cpp's older RoPE wants them (gguf_convert.py);
    - ``fused``: whether its files hold q, k and v as one tensor, and gate and up.
    """

    class_name: str
    architecture: str
    fields: tuple[str, ...] = ()
    switches: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    activation_field: str = "hidden_act"
    activations: Mapping[str, str] = field(default_factory=dict)
    has_window: Callable[[JsonObject, int], bool] | None = None
    local_rope: bool = False
    scaled_embedding: bool = False
    paired_rows: bool = True
    fused: bool = False

    def with_defaults(self, fields: JsonObject) -> JsonObject:
        """The fields of a config.json, with those that it leaves out."""
        return JsonObject(fields.where, {**LLAMA_DEFAULTS, **self.defaults, **fields.values})


def _beyond_max_window_layers(fields: JsonObject, layer: int) -> bool:
    return layer >= fields.integer("max_window_layers", 0, default=28)


def _unless_each(pattern: int) -> Callable[[JsonObject, int], bool]:
    """All layers but each ``pattern``-th, or each ``sliding_window_pattern``-th."""
    return lambda fields, layer: (layer + 1) % fields.integer("sliding_window_pattern", 1, default=pattern) != 0


QWEN_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}
GEMMA_SWITCHES = {"norm_offset": 1.0, "activation": "gelu_tanh"}
GEMMA_DEFAULTS = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA_FIELDS = (
    "attention_bias",
    "hidden_activation",
    "query_pre_attn_scalar",
    "sliding_window",
    "sliding_window_size",
    "layer_types",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "llama", fields=("attention_bias", "mlp_bias")),
    "mistral": Family(
        "MistralForCausalLM",
        "llama",  # llama.cpp makes no difference
        fields=("sliding_window",),
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        has_window=lambda fields, layer: True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "qwen2",
        fields=QWEN_WINDOWS,
        switches={"qkv_bias": True},
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, **NO_TOKENS},
        has_window=_beyond_max_window_layers,
        paired_rows=False,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "qwen3",
        fields=("attention_bias", *QWEN_WINDOWS),
        switches={"qk_norm": "head"},
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "head_dim": 128,
            **NO_TOKENS,
        },
        has_window=_beyond_max_window_layers,
        paired_rows=False,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        fields=("attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", *QWEN_WINDOWS),
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "no_rope_layer_interval": 4,
        },
        has_window=lambda fields, layer: not fields.values["no_rope_layers"][layer],
    ),
    "granite": Family(
        "GraniteForCausalLM",
        "granite",
        fields=(
            "attention_bias",
            "mlp_bias",
            "embedding_multiplier",
            "residual_multiplier",
            "attention_multiplier",
            "logits_scaling",
        ),
        defaults={"attention_multiplier": 1.0},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        "olmo2",
        fields=("attention_bias",),
        switches={"qk_norm": "whole", "norm_placement": "after"},
        defaults={"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279},
        paired_rows=False,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        "phi3",
        fields=("sliding_window", "partial_rotary_factor"),
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 32000,
        },
        has_window=lambda fields, layer: True,
        paired_rows=False,
        fused=True,
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        "gemma",
        fields=("attention_bias", "hidden_activation"),
        switches=GEMMA_SWITCHES,
        defaults={**GEMMA_DEFAULTS, "num_key_value_heads": 16},
        activations={"gelu": "gelu_tanh"},  # of the first releases, which meant this one
        scaled_embedding=True,
        paired_rows=False,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "gemma2",
        fields=GEMMA_FIELDS,
        switches={**GEMMA_SWITCHES, "norm_placement": "both"},
        defaults={
            **GEMMA_DEFAULTS,
            "num_key_value_heads": 4,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        activation_field="hidden_activation",
        has_window=_unless_each(2),
        scaled_embedding=True,
        paired_rows=False,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "gemma3",
        fields=(*GEMMA_FIELDS, "sliding_window_pattern", "rope_local_base_freq"),
        switches={**GEMMA_SWITCHES, "norm_placement": "both", "qk_norm": "head"},
        defaults={
            **GEMMA_DEFAULTS,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
        },
        activation_field="hidden_activation",
        has_window=_unless_each(6),
        local_rope=True,
        scaled_embedding=True,
        paired_rows=False,
    ),
}
