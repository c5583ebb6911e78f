"""What a Hugging Face ``config.json`` says of rotary embeddings (RoPE), and how far this package follows it."""

import math
from collections.abc import Mapping
from typing import Any

from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.model.families import Family
from layerskip_kernels.model.json_file import JsonObject
from layerskip_kernels.model_config import RopeScaling

__all__ = ["LAYER_TYPES", "read_rope_scaling", "rope_objects", "rotary_dim_of"]

LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_FIELDS = {
    *("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"),
    *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("truncate", "finetuned"),
}
LONGROPE_FIELDS = {"short_factor", "long_factor", "short_mscale", "long_mscale"}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")


def rope_objects(fields: JsonObject, family: Family) -> tuple[JsonObject, JsonObject]:
    """The settings of RoPE, of most layers and of those with a window where theirs are others.

    As in Transformers, ``rope_scaling`` counts alone where a file has ``rope_parameters``, too.
    """
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = _rope_object(fields, name)
    local = JsonObject(rope.where, {})
    if family.local_rope and name == "rope_parameters":
        rope, local = _rope_object(rope, "full_attention", rope.values), _rope_object(rope, "sliding_attention")
        if local.get("rope_type", local.get("type", "default")) != "default":
            raise UnsupportedModel("rope_type", local.values, "'default' in layers with a window", local.where)
    for settings in (rope, local):
        for field, value in settings.values.items():
            known = ROPE_FIELDS | LONGROPE_FIELDS if _is_longrope(settings) else ROPE_FIELDS
            if field not in known and value is not None:
                raise UnsupportedModel(f"{name}[{field[:100]!r}]", value, "no such field", fields.where)
    return rope, local


def _rope_object(fields: JsonObject, name: str, siblings: Mapping[str, Any] | None = None) -> JsonObject:
    if not isinstance(fields.get(name, {}), dict):
        raise UnsupportedModel(name, fields.get(name), "an object with 'rope_type', or null", fields.where)
    for other in siblings or ():
        if other not in LAYER_TYPES:
            raise UnsupportedModel(f"rope_parameters[{other[:100]!r}]", siblings, "one for each type", fields.where)
    return fields.object(name)


def rotary_dim_of(fields: JsonObject, rope: JsonObject, family: Family, head_dim: int) -> int | None:
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if partial == 1:
        return None
    allowed = "partial_rotary_factor" in family.fields
    if not allowed or type(partial) not in (int, float) or not 0 < partial < 1:
        supported = "a number above 0 and up to 1" if allowed else "1.0"
        raise UnsupportedModel("partial_rotary_factor", partial, supported, fields.where)
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        supported = f"one that turns an even number of the {head_dim} of a head, not {rotary_dim}"
        raise UnsupportedModel("partial_rotary_factor", partial, supported, fields.where)
    return rotary_dim


def read_rope_scaling(fields: JsonObject, rope: JsonObject, theta: float, rotary_dim: int) -> RopeScaling:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        name = f"{rope.where.removeprefix(f'{fields.where}: ')}['rope_type']"
        raise UnsupportedModel(name, kind, ", ".join(map(repr, ROPE_TYPES)), fields.where)
    if kind == "default":
        return RopeScaling()
    if _is_longrope(rope):
        return _read_longrope(fields, rope, rotary_dim)
    if kind == "yarn":
        return _read_yarn(fields, rope, theta)
    factor = rope.positive("factor")
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "dynamic":
        return RopeScaling("dynamic", factor)
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if low >= high:
        rope.refuse("high_freq_factor", f"above low_freq_factor ({low})")
    return RopeScaling("llama3", factor, low, high, _original_max_positions(fields, rope))


def _is_longrope(rope: JsonObject) -> bool:
    """Under its name, or an older one of Phi-3's."""
    kind = rope.get("rope_type", rope.get("type"))
    return kind in ("longrope", "su") or (kind == "yarn" and rope.get("short_factor") is not None)


def _read_longrope(fields: JsonObject, rope: JsonObject, rotary_dim: int) -> RopeScaling:
    """Up to its original length, which is as far as this package goes with it."""
    original = _original_max_positions(fields, rope)
    factor = rope.positive("factor", fields.integer("max_position_embeddings", 1, default=2048) / original)
    stretch = 1.0 if factor <= 1 or original < 2 else math.sqrt(1 + math.log(factor) / math.log(original))
    short = rope.required("short_factor")
    positive = isinstance(short, list) and all(type(value) in (int, float) and 0 < value < 1e30 for value in short)
    if not positive or len(short) != rotary_dim // 2:
        rope.refuse("short_factor", f"a list of {rotary_dim // 2} positive numbers")
    return RopeScaling(
        "longrope",
        original_max_positions=original,
        attention_factor=rope.positive("attention_factor", stretch),
        short_factors=tuple(map(float, short)),
    )


def _read_yarn(fields: JsonObject, rope: JsonObject, theta: float) -> RopeScaling:
    if theta <= 1:
        raise UnsupportedModel("rope_theta", theta, "above 1 with yarn, which divides by its logarithm", fields.where)
    original = _original_max_positions(fields, rope)
    factor = rope.positive("factor", fields.integer("max_position_embeddings", 1, default=2048) / original)
    return RopeScaling(
        "yarn",
        factor,
        original_max_positions=original,
        beta_fast=rope.positive("beta_fast", 32.0),
        beta_slow=rope.positive("beta_slow", 1.0),
        truncate=rope.boolean("truncate", True),
        attention_factor=_yarn_attention_factor(rope, factor),
    )


def _yarn_attention_factor(rope: JsonObject, factor: float) -> float:
    """What cosines and sines are multiplied by; the paper's 0.1 ln(factor) + 1 unless the file says otherwise."""

    def magnitude(scale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return rope.positive("attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return magnitude(rope.positive("mscale")) / magnitude(rope.positive("mscale_all_dim"))
    return magnitude()


def _original_max_positions(fields: JsonObject, rope: JsonObject) -> int:
    """As in Transformers, the field beside the scaling goes before the one inside it."""
    name = "original_max_position_embeddings"
    own = fields.integer("max_position_embeddings", 1, default=2048)
    inside = rope.integer(name, 1, default=own)
    return fields.integer(name, 1, default=inside)
