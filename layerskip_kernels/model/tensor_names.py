"""Which tensors a checkpoint holds, and under which names."""

import math
import re
from collections.abc import Iterable

from layerskip_kernels.model_config import ModelConfig, NormPlacement

__all__ = [
    "FUSED",
    "NORMS",
    "check_names",
    "expected_shapes",
    "fused_parts",
    "fused_rows",
    "layer_parameters",
    "layer_products",
    "layer_shapes",
    "num_parameters",
    "tensor_shapes",
]

# Buffers that older versions of Transformers saved with the weights; they follow from the config.
HARMLESS_NAME = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|original_inv_freq)")

# Projections that some checkpoints keep as one tensor, by their names within a layer.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
FUSED_NAME = re.compile(r"(.*\.)((?:self_attn|mlp)\.\w+)\.weight")

# The norms of a layer (LayerWeights) by where they stand, and their Hugging Face names.
NORMS: dict[NormPlacement, dict[str, str]] = {
    "before": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "both": {
        "attn_norm": "input_layernorm",
        "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The Hugging Face name and shape of every tensor; projections are [out, in], as they are stored.

    Per layer two or four norms [D], q [H*K, D], k and v [G*K, D], o [D, H*K], gate and up [F, D], down [D, F], a bias
    [out] where the config says so, norms of q and k [K] or [out]; outside, embedding [V, D], norm [D] and, unless tied,
    ``lm_head`` [V, D].
    """
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(config).items()}
    return shapes


def fused_rows(config: ModelConfig) -> dict[str, dict[str, int]]:
    """How many rows of each fused tensor are each projection's, by name within a layer, without ``.weight``."""
    shapes = layer_shapes(config)
    return {name: {part: shapes[f"{part}.weight"][0] for part in parts} for name, parts in FUSED.items()}


def fused_parts(name: str, config: ModelConfig) -> dict[str, int]:
    """The tensors that a fused one is made of, by name, and their rows; empty for any other name."""
    match = FUSED_NAME.fullmatch(name)
    rows = fused_rows(config).get(match[2], {}) if match else {}
    return {f"{match[1]}{part}.weight": count for part, count in rows.items()} if match else {}


def num_parameters(config: ModelConfig) -> int:
    """Numbers in all tensors of a model."""
    return sum(map(math.prod, tensor_shapes(config).values()))


def layer_parameters(config: ModelConfig) -> int:
    """Numbers in the tensors of one layer: what a pass through it reads."""
    return sum(map(math.prod, layer_shapes(config).values()))


def layer_products(config: ModelConfig, attends: bool = True) -> int:
    """Multiplications in one layer's projections, for each row: the numbers in its matrices."""
    return sum(math.prod(shape) for shape in layer_shapes(config, attends).values() if len(shape) == 2)


def layer_shapes(config: ModelConfig, attends: bool = True) -> dict[str, tuple[int, ...]]:
    """The Hugging Face name within a layer, and the shape, of each of its tensors.

    ``attends``: False: of its MLP and the norms around it alone, which is all that some exit adapters have.
    """
    D, F = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = {"q_proj": (q_rows, D), "k_proj": (kv_rows, D), "v_proj": (kv_rows, D), "o_proj": (D, q_rows)}
    mlp = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    norms = NORMS[config.norm_placement].items()
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (D,) for place, name in norms if attends or place.startswith("mlp")
    }
    if attends:
        shapes |= {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
    shapes |= {f"mlp.{name}.weight": shape for name, shape in mlp.items()}
    biased = {
        "q_proj": config.qkv_bias,
        "k_proj": config.qkv_bias,
        "v_proj": config.qkv_bias,
        "o_proj": config.out_bias,
    }
    shapes |= {f"self_attn.{name}.bias": shape[:1] for name, shape in attention.items() if attends and biased[name]}
    if config.mlp_bias:
        shapes |= {f"mlp.{name}.bias": shape[:1] for name, shape in mlp.items()}
    if attends and config.qk_norm != "none":
        whole = config.qk_norm == "whole"
        shapes["self_attn.q_norm.weight"] = (q_rows if whole else config.head_dim,)
        shapes["self_attn.k_norm.weight"] = (kv_rows if whole else config.head_dim,)
    return shapes


def expected_shapes(where: object, names: Iterable[str], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """``tensor_shapes``, when these are the names that ``where`` holds.

    Raises ValueError naming ``where`` and the tensors that are missing, or unknown and not harmless.
    """
    found = set(names)
    # Before a list is made of as many names as a damaged config may ask for.
    if config.num_layers > len(found):
        raise ValueError(f"{where} holds {len(found)} tensors, too few for num_layers {config.num_layers}")
    shapes = tensor_shapes(config)
    check_names(where, {name for name in found if name in shapes or not HARMLESS_NAME.fullmatch(name)}, shapes)
    return shapes


def check_names(where: object, found: set[str], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError naming ``where`` and the tensors that are missing or unknown, unless all of ``shapes`` are."""
    if missing := sorted(shapes.keys() - found):
        raise ValueError(f"{where} lacks {_listed(missing)}, which the model's config asks for")
    if unknown := sorted(found - shapes.keys()):
        raise ValueError(f"{where} holds {_listed(unknown)}, which the model's config does not ask for")


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"tensor {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
