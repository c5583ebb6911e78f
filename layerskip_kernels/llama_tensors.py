"""Which tensors a Llama checkpoint holds, under which names, and what their values must be."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from layerskip_kernels.config import ModelConfig

__all__ = ["check_finite", "expected_shapes", "tensor_shapes"]

# Buffers that older versions of Transformers saved with the weights; they follow from the config.
HARMLESS_NAME = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|original_inv_freq)")


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The Hugging Face name and shape of every tensor; projections are [out, in], as they are stored.

    Per layer two norms [D], q [H*K, D], k and v [G*K, D], o [D, H*K] (with ``attention_bias`` a bias [out]
    each), gate and up [F, D], down [D, F]; outside, embedding [V, D], norm [D] and, unless tied, ``lm_head``
    [V, D].
    """
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer_shapes(config).items()}
    return shapes


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, F = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = {"q_proj": (q_rows, D), "k_proj": (kv_rows, D), "v_proj": (kv_rows, D), "o_proj": (D, q_rows)}
    mlp = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
    }
    shapes |= {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
    shapes |= {f"mlp.{name}.weight": shape for name, shape in mlp.items()}
    if config.attention_bias:
        shapes |= {f"self_attn.{name}.bias": shape[:1] for name, shape in attention.items()}
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
    if missing := sorted(shapes.keys() - found):
        raise ValueError(f"{where} lacks {_listed(missing)}, which the model's config asks for")
    if unknown := sorted(name for name in found - shapes.keys() if not HARMLESS_NAME.fullmatch(name)):
        raise ValueError(f"{where} holds {_listed(unknown)}, which the Llama family does not have")
    return shapes


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"tensor {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_finite(what: object, tensor: Tensor, source: Tensor) -> None:
    """Raise ValueError when ``tensor``, converted from ``source``, holds a NaN or an infinity."""
    if _is_finite(tensor):
        return
    if not _is_finite(source):
        raise ValueError(f"{what} holds a NaN or an infinity; the file is damaged or the training diverged")
    wider = "torch.bfloat16 or torch.float32" if tensor.dtype is torch.float16 else "torch.float32"
    raise ValueError(f"{what} has values beyond the range of {tensor.dtype}; ask for dtype={wider}")


def _is_finite(tensor: Tensor) -> bool:
    # One pass without a temporary: aminmax hands a NaN on.
    return bool(torch.stack(tensor.aminmax()).isfinite().all())
