"""A GGUF file written out as the Hugging Face directory that it was made from: config, weights, tokenizer."""

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from layerskip_kernels.config import ModelConfig
from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.gguf_file import GgufFile, read_gguf, read_gguf_tensor
from layerskip_kernels.llama_tensors import check_finite, expected_shapes
from layerskip_kernels.safetensors_file import write_safetensors

__all__ = ["convert_gguf"]

OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"

# Each of them changes the arithmetic of a layer when it is set.
REFUSED_KEYS = (
    "llama.expert_count",
    "llama.attention.sliding_window",
    "llama.attention.clamp_kqv",
    "llama.attention.scale",
    "llama.embedding_scale",
    "llama.residual_scale",
    "llama.logit_scale",
)
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def convert_gguf(path: Path, directory: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files of a Llama GGUF file into ``directory``.

    Quantised tensors become the fp32 values they stand for, the others keep their type. Everything that the
    header says is checked before a weight is read. Raises ValueError naming file and tensor, or
    UnsupportedModel naming the field.
    """
    gguf = read_gguf(path)
    hf_config = _hf_config(gguf)
    config = ModelConfig.from_hf(hf_config)
    names = {name: _hf_name(name) for name in gguf.tensors if name != ROPE_FACTORS}
    _check_shapes(gguf, names, expected_shapes(path, names.values(), config))
    layout = {
        hf_name: (SAFETENSORS_DTYPES[gguf.tensors[name].dtype], gguf.tensors[name].shape)
        for name, hf_name in names.items()
    }
    write_safetensors(directory / "model.safetensors", layout, _hf_tensors(gguf, names, config))
    (directory / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
    if "tokenizer.ggml.tokens" in gguf.metadata:
        _convert_tokenizer(path, directory)


def _check_shapes(gguf: GgufFile, names: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> None:
    for name, hf_name in names.items():
        tensor = gguf.tensors[name]
        if tensor.shape != shapes[hf_name]:
            raise ValueError(f"{tensor} has shape {list(tensor.shape)}, expected {list(shapes[hf_name])}")


def _hf_name(name: str) -> str:
    """The Hugging Face name of a tensor; an unknown name stays as it is, for check_names to report."""
    if match := LAYER_NAME.fullmatch(name):
        layer, part, suffix = match.groups()
        if part in LAYER_NAMES:
            return f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"
    return OUTER_NAMES.get(name, name)


def _hf_tensors(gguf: GgufFile, names: dict[str, str], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    progress = tqdm(names.items(), desc=f"Converting {gguf.path.name} (once)", unit="tensor", file=sys.stderr)
    for name, hf_name in progress:
        tensor = read_gguf_tensor(gguf.tensors[name])
        check_finite(gguf.tensors[name], tensor, tensor)
        if ".attn_q." in name:
            tensor = _halves_from_pairs(tensor, config.num_heads)
        elif ".attn_k." in name:
            tensor = _halves_from_pairs(tensor, config.num_kv_heads)
        yield hf_name, tensor


def _halves_from_pairs(tensor: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a q or k projection [heads * K, ...].

    llama.cpp rotates neighbouring rows of a head together, and interleaves the rows for it; Hugging Face
    rotates row i with row i + K/2.
    """
    return tensor.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def _hf_config(gguf: GgufFile) -> dict[str, Any]:
    """The metadata as the contents of a Llama config.json."""
    metadata = gguf.metadata
    if metadata.get("general.architecture") != "llama":
        raise UnsupportedModel("general.architecture", metadata.get("general.architecture"), "'llama'")
    for key in REFUSED_KEYS:
        if metadata.get(key):
            raise UnsupportedModel(key, metadata[key], "a file without it")
    num_heads = _count(gguf, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": _dtype_name(gguf),
        "vocab_size": _vocab_size(gguf),
        "hidden_size": _count(gguf, "llama.embedding_length"),
        "intermediate_size": _count(gguf, "llama.feed_forward_length"),
        "num_hidden_layers": _count(gguf, "llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _count(gguf, "llama.attention.head_count_kv", num_heads),
        "head_dim": _head_dim(gguf, num_heads),
        "hidden_act": "silu",
        "max_position_embeddings": _count(gguf, "llama.context_length"),
        "rms_norm_eps": _number(gguf, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _number(gguf, "llama.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(gguf),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }


def _count(gguf: GgufFile, key: str, default: int | None = None) -> int:
    value = gguf.metadata.get(key, default)
    if value is None:
        raise ValueError(f"{gguf.path} lacks the metadata key {key!r}")
    if type(value) is not int or value < 1:
        raise UnsupportedModel(key, value, "one positive integer for the whole model")
    return value


def _number(gguf: GgufFile, key: str, default: float | None = None) -> float:
    value = gguf.metadata.get(key, default)
    if value is None:
        raise ValueError(f"{gguf.path} lacks the metadata key {key!r}")
    if type(value) is not float:
        raise UnsupportedModel(key, value, "one floating-point number")
    return value


def _dtype_name(gguf: GgufFile) -> str:
    if any(tensor.is_quantised for tensor in gguf.tensors.values()):
        return "bfloat16"
    embedding = gguf.tensors.get("token_embd.weight")
    return str(embedding.dtype).removeprefix("torch.") if embedding else "float32"


def _vocab_size(gguf: GgufFile) -> int:
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{gguf.path} lacks tensor 'token_embd.weight'")
    return _count(gguf, "llama.vocab_size", embedding.shape[0])


def _head_dim(gguf: GgufFile, num_heads: int) -> int:
    head_dim = _count(gguf, "llama.attention.key_length", max(1, _count(gguf, "llama.embedding_length") // num_heads))
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if (value := _count(gguf, key, head_dim)) != head_dim:
            raise UnsupportedModel(key, value, f"the length of a head, {head_dim}")
    return head_dim


def _rope_scaling(gguf: GgufFile) -> dict[str, Any] | None:
    if ROPE_FACTORS in gguf.tensors:
        return _llama3_scaling(gguf)
    # The older key has no type beside it.
    linear_factor = _number(gguf, "llama.rope.scale_linear", 1.0)
    kind = gguf.metadata.get("llama.rope.scaling.type", "none" if linear_factor == 1.0 else "linear")
    if kind == "none":
        return None
    if kind != "linear":
        raise UnsupportedModel("llama.rope.scaling.type", kind, "'none', 'linear'")
    return {"rope_type": "linear", "factor": _number(gguf, "llama.rope.scaling.factor", linear_factor)}


def _llama3_scaling(gguf: GgufFile) -> dict[str, Any] | None:
    """Recover the scaling of Llama 3 from its table of divisors, one per frequency, fp32 [K/2].

    The largest divisor is the factor; the other constants are those of every Llama 3.1 to 3.3, and the table
    is computed from them to see whether that is so.
    """
    divisors = read_gguf_tensor(gguf.tensors[ROPE_FACTORS]).double()
    head_dim = _head_dim(gguf, _count(gguf, "llama.attention.head_count"))
    factor = float(divisors.max())
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta = _number(gguf, "llama.rope.freq_base", 10000.0)
    is_llama3 = tuple(divisors.shape) == (head_dim // 2,) and torch.allclose(
        divisors, _llama3_divisors(head_dim, theta, factor), rtol=1e-4, atol=0.0
    )
    if not is_llama3:
        raise UnsupportedModel(f"tensor {ROPE_FACTORS!r}", divisors.tolist(), "the scaling of Llama 3.1 to 3.3")
    return scaling


def _llama3_divisors(head_dim: int, theta: float, factor: float) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = 8192 * theta**-exponents / (2 * torch.pi)
    keep = ((turns - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)
    return 1.0 / (keep + (1.0 - keep) / factor)


def _convert_tokenizer(path: Path, directory: Path) -> None:
    from transformers import AutoTokenizer

    print(f"Converting the tokenizer of {path.name} (once, up to half a minute)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        # Alone in its folder, so that files beside the original cannot take part.
        Path(folder, "model.gguf").symlink_to(path.resolve())
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf", local_files_only=True)
    tokenizer.save_pretrained(directory)
