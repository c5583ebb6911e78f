"""A Hugging Face ``config.json`` of one of the families (families.py) -> `ModelConfig`.

Every field is either read, listed as harmless, or refused by name: a field that nobody reads may change the
arithmetic, as Granite's multipliers do in a Llama, which has none.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.model.families import FAMILIES, Family
from layerskip_kernels.model.hf_rope import LAYER_TYPES, read_rope_scaling, rope_objects, rotary_dim_of
from layerskip_kernels.model.json_file import JsonObject
from layerskip_kernels.model_config import LayerRope, ModelConfig

__all__ = ["read_hf_config"]

READ = {  # of every family
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "hidden_act", "quantization_config"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings"),
    *("layer_types", "auto_map", "dtype", "torch_dtype"),
}
# What Transformers and common tools write that changes no logits of a causal language model in evaluation.
HARMLESS = {
    # of every model
    *("architectures", "transformers_version", "name_or_path", "task_specific_params", "problem_type", "id2label"),
    *("label2id", "num_labels", "finetuning_task", "tokenizer_class", "use_cache", "return_dict"),
    *("output_hidden_states", "output_attentions", "output_scores", "output_router_logits", "is_encoder_decoder"),
    *("is_decoder", "torchscript"),
    *("tf_legacy_loss", "use_bfloat16", "chunk_size_feed_forward", "pruned_heads", "prefix", "attn_implementation"),
    *("tie_encoder_decoder", "cross_attention_hidden_size", "add_cross_attention", "gradient_checkpointing"),
    *("cache_implementation", "compile_config", "tie_last_hidden_states", "generation_config", "custom_pipelines"),
    *("decoder_start_token_id", "sep_token_id", "bos_token", "eos_token", "pad_token", "unk_token"),
    *("unk_token_id", "mask_token_id", "pad_token_id", "keys_to_ignore_at_inference", "model_max_length"),
    # of training: dropout does nothing in evaluation
    *("initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "pretraining_tp", "neftune_noise_alpha"),
    *("max_sequence_length", "max_seq_len", "training_args", "seed", "use_flash_attention", "use_flash_attn"),
    # of tools
    *("unsloth_fixed", "unsloth_version", "transformers.js_config", "is_llama_config", "rope_interleaved"),
    *("license", "model_name", "base_model", "adapters", "end_token_id", "has_no_defaults_at_init"),
    # of generation, where config.json still holds it
    *("assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens"),
    *("diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "target_lookbehind"),
    *("encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty"),
    *("forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length", "max_new_tokens"),
    *("no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups"),
    *("num_beams", "num_return_sequences", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate"),
    *("suppress_tokens", "temperature", "top_k", "top_p", "typical_p", "min_p", "stop_strings"),
}
# The values with which a field that is neither changes nothing; of multipliers, others than of switches.
OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_emb")
OFF_OF: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(MULTIPLIERS, (None, 1)),
    **dict.fromkeys(("full_attn_mod", "interpolate_factor"), (None, 1)),  # of Phi-4-mini
    "attention_multiplier": (None,),
    "is_causal": (None, True),  # False: of models that embed texts, whose rows see those after them
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
MAX_LISTED_LAYERS = 4096  # of which a list is made: a damaged file may ask for more than there is memory


def _number(fields: JsonObject, name: str) -> float:
    return fields.positive(name, default=1.0)


def _cap(fields: JsonObject, name: str) -> float:
    return 0.0 if fields.get(name) is None else fields.positive(name)


# What a field of config.json sets, in the families that read it.
SETTERS: dict[str, Callable[[JsonObject, str], dict[str, Any]]] = {
    "attention_bias": lambda fields, name: dict.fromkeys(("qkv_bias", "out_bias"), fields.boolean(name, False)),
    "mlp_bias": lambda fields, name: {"mlp_bias": fields.boolean(name, False)},
    "embedding_multiplier": lambda fields, name: {"embedding_multiplier": _number(fields, name)},
    "residual_multiplier": lambda fields, name: {"residual_multiplier": _number(fields, name)},
    "attention_multiplier": lambda fields, name: {"attention_scale": _number(fields, name)},
    "logits_scaling": lambda fields, name: {"logits_multiplier": 1.0 / _number(fields, name)},
    "query_pre_attn_scalar": lambda fields, name: {"attention_scale": fields.positive(name) ** -0.5},
    "attn_logit_softcapping": lambda fields, name: {"score_cap": _cap(fields, name)},
    "final_logit_softcapping": lambda fields, name: {"logits_cap": _cap(fields, name)},
}


def read_hf_config(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Read the contents of a Hugging Face ``config.json`` of one of the `FAMILIES`.

    A field that Transformers lets a file omit gets the value that Transformers gives it. Raises ValueError naming
    ``where`` and the field for one that is missing or of the wrong type or range, and UnsupportedModel naming them for
    one that asks for another model.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be the dict of a config.json, got {type(config).__name__}")
    fields = JsonObject(where, dict(config))
    family = _family(fields)
    _refuse_others(fields, family)
    _refuse_unknown(fields, family)
    given, fields = fields, family.with_defaults(fields)
    hidden_size, num_heads = fields.integer("hidden_size", 1), fields.integer("num_attention_heads", 1)
    num_kv_heads = fields.integer("num_key_value_heads", 1, default=num_heads)
    if num_heads % num_kv_heads:
        raise UnsupportedModel("num_key_value_heads", num_kv_heads, f"a divisor of {num_heads} heads", where)
    head_dim = _read_head_dim(fields, hidden_size, num_heads)
    vocab_size = fields.integer("vocab_size", 1)
    plain = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1),
        num_layers=fields.integer("num_hidden_layers", 1),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=fields.integer("max_position_embeddings", 1, default=2048),
        rms_norm_eps=fields.positive("rms_norm_eps", default=1e-6),
        rope_theta=10000.0,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        bos_token_id=None if fields.get("bos_token_id") is None else fields.integer("bos_token_id", 0),
        eos_token_ids=_read_eos(given, fields, vocab_size),
    )
    return _with_positions(_with_switches(plain, fields, family), fields, family)


def _family(fields: JsonObject) -> Family:
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        supported = ", ".join(map(repr, FAMILIES))
        raise UnsupportedModel("model_type", fields.values.get("model_type"), supported, fields.where)
    return FAMILIES[name]


def _refuse_others(fields: JsonObject, family: Family) -> None:
    def require(name: str, is_supported: bool, supported: str) -> None:
        if not is_supported:
            raise UnsupportedModel(name, fields.values.get(name), supported, fields.where)

    quantised = fields.get("quantization_config")
    require("quantization_config", not quantised, "no quantisation except inside a GGUF file")
    code = fields.get("auto_map", {})
    model_code = code.get("AutoModelForCausalLM", family.class_name) if isinstance(code, dict) else None
    own = isinstance(model_code, str) and model_code.split(".")[-1] == family.class_name
    require("auto_map", own, "no model code of its own")
    if "layer_types" not in family.fields:
        layers = fields.get("layer_types", [])
        full = isinstance(layers, list) and all(layer == "full_attention" for layer in layers)
        windowed = family.has_window is not None and layers != []
        require("layer_types", full and not windowed, "'full_attention' in every layer")


def _with_switches(config: ModelConfig, fields: JsonObject, family: Family) -> ModelConfig:
    """With all that is the same in every layer."""
    switches: dict[str, Any] = {"activation": _activation(fields, family)}
    for name in family.fields:
        if name in SETTERS:
            switches |= SETTERS[name](fields, name)
    if family.scaled_embedding:
        switches["embedding_multiplier"] = config.hidden_size**0.5
    return replace(config, **{**family.switches, **switches})


def _activation(fields: JsonObject, family: Family) -> str:
    name, known = family.activation_field, {**ACTIVATIONS, **family.activations}
    default = family.switches.get("activation", "silu")
    value = fields.get(name)
    if value is not None and (not isinstance(value, str) or value not in known):
        raise UnsupportedModel(name, value, ", ".join(map(repr, known)), fields.where)
    return default if value is None else known[value]


def _with_positions(config: ModelConfig, fields: JsonObject, family: Family) -> ModelConfig:
    """With RoPE and windows, which may differ from layer to layer."""
    layer_ropes: tuple[LayerRope, ...] = ()
    if "no_rope_layers" in family.fields:
        turned = _rope_layers(fields, config.num_layers)
        layer_ropes = tuple("main" if turn else "none" for turn in turned)
        fields = JsonObject(fields.where, {**fields.values, "no_rope_layers": turned})
    slides = _sliding_layers(fields, family, config.num_layers)
    if family.local_rope:
        layer_ropes = tuple("local" if slide else "main" for slide in slides)
    window = _window(fields, family)
    windows = tuple(window if slide else 0 for slide in slides) if window and any(slides) else ()
    main, local = rope_objects(fields, family)
    rotary_dim = rotary_dim_of(fields, main, family, config.head_dim)
    theta = main.positive("rope_theta", default=fields.positive("rope_theta", default=10000.0))
    scaling = read_rope_scaling(fields, main, theta, rotary_dim or config.head_dim)
    max_positions = config.max_positions
    if scaling.kind == "longrope":
        max_positions = min(max_positions, scaling.original_max_positions)
    return replace(
        config,
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=local.positive("rope_theta", default=fields.positive("rope_local_base_freq", default=10000.0)),
        layer_ropes=() if set(layer_ropes) == {"main"} else layer_ropes,
        layer_windows=windows,
        rotary_dim=rotary_dim,
        max_positions=max_positions,
    )


def _refuse_unknown(fields: JsonObject, family: Family) -> None:
    """Refuse by name what is neither read nor harmless, unless it is switched off."""
    for name, value in fields.values.items():
        known = name in READ or name in family.fields or name in HARMLESS or name.startswith("_")
        if known or value in OFF_OF.get(name, OFF):
            continue
        supported = "a file without it (a field that this package does not know may change the model's arithmetic)"
        raise UnsupportedModel(name[:100], value, supported, fields.where)


def _read_head_dim(fields: JsonObject, hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is None:
        if hidden_size % num_heads:
            supported = f"a multiple of num_attention_heads ({num_heads}), or give head_dim"
            raise UnsupportedModel("hidden_size", hidden_size, supported, fields.where)
        head_dim = hidden_size // num_heads
    else:
        head_dim = fields.integer("head_dim", 1)
    if head_dim % 2:
        raise UnsupportedModel("head_dim", head_dim, "an even number: RoPE rotates pairs", fields.where)
    return head_dim


def _read_eos(given: JsonObject, fields: JsonObject, vocab_size: int) -> tuple[int, ...]:
    if "eos_token_id" in given.values:
        return given.integers("eos_token_id", 0, vocab_size - 1)
    default = fields.get("eos_token_id")
    return () if default is None or default >= vocab_size else (default,)


# ---- what differs from layer to layer ----


def _listed_layers(fields: JsonObject, num_layers: int) -> range:
    if num_layers > MAX_LISTED_LAYERS:
        raise UnsupportedModel("num_hidden_layers", num_layers, f"1..{MAX_LISTED_LAYERS}", fields.where)
    return range(num_layers)


def _rope_layers(fields: JsonObject, num_layers: int) -> list[bool]:
    """For each layer, whether it has RoPE: the 1s of ``no_rope_layers``, or all but each N-th layer."""
    layers = _listed_layers(fields, num_layers)
    marks = fields.get("no_rope_layers")
    if marks is None:
        interval = fields.integer("no_rope_layer_interval", 1, default=4)
        return [(layer + 1) % interval != 0 for layer in layers]
    if not isinstance(marks, list) or len(marks) < num_layers or any(mark not in (0, 1) for mark in marks):
        fields.refuse("no_rope_layers", f"a list of {num_layers} numbers, 1 for RoPE and 0 for none")
    return [bool(marks[layer]) for layer in layers]


def _sliding_layers(fields: JsonObject, family: Family, num_layers: int) -> list[bool]:
    """For each layer, whether it is one with a window; empty in a family without."""
    if family.has_window is None:
        return []
    layers = _listed_layers(fields, num_layers)
    types = fields.get("layer_types")
    if types is None:
        return [family.has_window(fields, layer) for layer in layers]
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in LAYER_TYPES for kind in types):
        supported = f"a list of {num_layers} of {', '.join(map(repr, LAYER_TYPES))}"
        raise UnsupportedModel("layer_types", types, supported, fields.where)
    return [kind == "sliding_attention" for kind in types]


def _window(fields: JsonObject, family: Family) -> int:
    """How many positions a row of such a layer sees; 0: all."""
    switched_off = "use_sliding_window" in family.fields and not fields.boolean("use_sliding_window", False)
    if family.has_window is None or switched_off or fields.get("sliding_window") is None:
        return 0
    return fields.integer("sliding_window", 1)
