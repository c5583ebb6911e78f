"""A GGUF file written out as the Hugging Face directory that it was made from: config, weights, tokenizer."""

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from layerskip_kernels.model.end_tokens import gguf_end_token_ids
from layerskip_kernels.model.finite import check_finite
from layerskip_kernels.model.gguf_config import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, family_of, hf_config
from layerskip_kernels.model.gguf_content import GgufFile, GgufTensor, read_gguf_blocks, read_gguf_tensor
from layerskip_kernels.model.gguf_vocabulary import gguf_tokenizer, gguf_tokenizer_config, gguf_tokens
from layerskip_kernels.model.hf_config import read_hf_config
from layerskip_kernels.model.safetensors_file import DTYPE_CODES, write_safetensors
from layerskip_kernels.model.tensor_names import NORMS, expected_shapes, fused_rows
from layerskip_kernels.model_config import ModelConfig

__all__ = ["FUSED_NAMES", "OUTER_NAMES", "convert_gguf", "converted_bytes", "layer_names"]

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
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
# Norms by their names in NORMS. The two that Llama has are in LAYER_NAMES, too.
NORM_NAMES = {
    "attn_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attn_post_norm": "post_attention_norm",
    "mlp_post_norm": "post_ffw_norm",
}
FUSED_NAMES = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
NO_WEIGHTS = (ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS)  # tensors that the config says
LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def convert_gguf(
    gguf: GgufFile, directory: Path, dtype: torch.dtype | None = None, keep_quantised: bool = False
) -> None:
    """Write config.json, model.safetensors and the tokenizer's files of a GGUF file into ``directory``.

    Quantised tensors become the fp32 values they stand for (with ``keep_quantised``, matrices of the types of rule 8
    stay as they are, uint8 [N, blocks, bytes]), the others keep their type; with a 16-bit ``dtype``, all that is wider
    is rounded to it. One tensor at a time is in memory. Everything that the header says is checked
    before a weight is read. Raises ValueError naming file and tensor, or UnsupportedModel naming the field.
    """
    tokens = gguf_tokens(gguf)
    fields = hf_config(gguf, gguf_end_token_ids(gguf.path, gguf.metadata, tokens))
    config = read_hf_config(fields, str(gguf.path))
    parts = {name: _hf_parts(gguf, name, config) for name in gguf.tensors if name not in NO_WEIGHTS}
    hf_names = [hf_name for part in parts.values() for hf_name in part]
    _check_shapes(gguf, parts, expected_shapes(gguf.path, hf_names, config))
    if tokens is not None and len(tokens) > config.vocab_size:
        raise ValueError(f"{gguf.path} has {len(tokens)} tokens, but an embedding of {config.vocab_size}")
    _write_tokenizer(gguf, tokens, directory)
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, part in parts.items():
        code, shape = _stored_as(gguf.tensors[name], dtype, keep_quantised)
        layout |= {hf_name: (code, (rows, *shape[1:])) for hf_name, rows in part.items()}
    write_safetensors(directory / "model.safetensors", layout, _hf_tensors(gguf, parts, config, dtype, keep_quantised))
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def converted_bytes(gguf: GgufFile, dtype: torch.dtype | None, keep_quantised: bool) -> int:
    """How much the weights take when they are written out."""
    return sum(
        tensor.size
        if keep_quantised and tensor.block_type
        else math.prod(tensor.shape) * _stored_dtype(tensor, dtype).itemsize
        for tensor in gguf.tensors.values()
    )


def _stored_as(tensor: GgufTensor, dtype: torch.dtype | None, keep_quantised: bool) -> tuple[str, tuple[int, ...]]:
    """The safetensors dtype and shape."""
    if keep_quantised and (kind := tensor.block_type):
        return DTYPE_CODES[torch.uint8], (tensor.shape[0], tensor.shape[1] // kind.size, kind.nbytes)
    return DTYPE_CODES[_stored_dtype(tensor, dtype)], tensor.shape


def _stored_dtype(tensor: GgufTensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and dtype.itemsize < tensor.dtype.itemsize else tensor.dtype


def _check_shapes(gguf: GgufFile, parts: dict[str, dict[str, int]], shapes: dict[str, tuple[int, ...]]) -> None:
    for name, part in parts.items():
        tensor, rests = gguf.tensors[name], {shapes[hf_name][1:] for hf_name in part}
        expected = (sum(shapes[hf_name][0] for hf_name in part), *rests.pop())
        if tensor.shape != expected:
            raise ValueError(f"{tensor} has shape {list(tensor.shape)}, expected {list(expected)}")


def _hf_parts(gguf: GgufFile, name: str, config: ModelConfig) -> dict[str, int]:
    """The Hugging Face names of a tensor's parts, and their rows: one, but for a fused tensor.

    An unknown name stays as it is, for expected_shapes to report.
    """
    rows = gguf.tensors[name].shape[0]
    if match := LAYER_NAME.fullmatch(name):
        layer, part, suffix = match.groups()
        prefix = f"model.layers.{layer}."
        if part == "attn_qkv" or (part == "ffn_up" and f"blk.{layer}.ffn_gate.{suffix}" not in gguf.tensors):
            return {f"{prefix}{own}.{suffix}": count for own, count in fused_rows(config)[FUSED_NAMES[part]].items()}
        if (hf_name := layer_names(config).get(part)) is not None:
            return {f"{prefix}{hf_name}.{suffix}": rows}
    return {OUTER_NAMES.get(name, name): rows}


def layer_names(config: ModelConfig) -> dict[str, str]:
    """A layer's tensors by their names in GGUF files, and their Hugging Face names."""
    return LAYER_NAMES | {NORM_NAMES[own]: hf_name for own, hf_name in NORMS[config.norm_placement].items()}


def _hf_tensors(
    gguf: GgufFile, parts: dict[str, dict[str, int]], config: ModelConfig, dtype: torch.dtype | None,
    keep_quantised: bool,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    _, family = family_of(gguf)
    progress = tqdm(parts.items(), desc=f"Converting {gguf.path.name} (once)", unit="tensor", file=sys.stderr)
    for name, part in progress:
        offset = config.norm_offset if name.endswith("norm.weight") else 0.0
        tensor = _converted(gguf.tensors[name], dtype, keep_quantised, offset)
        if family.paired_rows and ".attn_q." in name:
            tensor = _halves_from_pairs(tensor, config.num_heads)
        elif family.paired_rows and ".attn_k." in name:
            tensor = _halves_from_pairs(tensor, config.num_kv_heads)
        for hf_name, rows in zip(part, tensor.split(list(part.values())), strict=True):
            yield hf_name, rows.contiguous()


def _converted(tensor: GgufTensor, dtype: torch.dtype | None, keep_quantised: bool, offset: float) -> Tensor:
    """``offset``: what llama.cpp has added to a norm's weight, and adds no more when it runs."""
    if keep_quantised and tensor.block_type:
        return read_gguf_blocks(tensor)
    values = read_gguf_tensor(tensor)
    if offset:
        values = values - offset
    converted = values.to(_stored_dtype(tensor, dtype))
    check_finite(tensor, converted, values)
    return converted


def _halves_from_pairs(tensor: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a q or k projection [heads * K, ...].

    llama.cpp rotates neighbouring rows of a head together, and interleaves the rows for it; Hugging Face
    rotates row i with row i + K/2.
    """
    return tensor.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def _write_tokenizer(gguf: GgufFile, tokens: list[str] | None, directory: Path) -> None:
    tokenizer = gguf_tokenizer(gguf)
    if tokenizer is None or tokens is None:
        return
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    config = gguf_tokenizer_config(gguf, tokens)
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
