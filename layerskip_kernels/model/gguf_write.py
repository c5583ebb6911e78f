"""A checkpoint as a quantised GGUF file, laid out as llama.cpp reads it.

A file's type names the mixture that llama.cpp makes by that name: most matrices of one type, those that cost most
quality in a better one, and another type where a row is no whole number of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.families import FAMILIES, Family
from layerskip_kernels.model.files import naming, whole
from layerskip_kernels.model.gguf_convert import FUSED_NAMES, OUTER_NAMES, layer_names
from layerskip_kernels.model.gguf_write_metadata import add_metadata, config_metadata, rope_factor_tensors
from layerskip_kernels.model.gguf_write_vocabulary import vocabulary_metadata
from layerskip_kernels.model.quantise import quantise
from layerskip_kernels.model.tensor_names import FUSED, tensor_shapes
from layerskip_kernels.model_config import ModelConfig
from layerskip_kernels.ops.reference import BLOCK_TYPES

__all__ = ["FILE_TYPES", "pairs_from_halves", "write_gguf"]

ROWS = 1024  # quantised at a time: it takes several times their memory


@dataclass(frozen=True)
class FileType:
    """``better``: for the value and down projections of some layers (`_has_more_bits`); ``fused``: for q, k and v in
    one tensor; ``outer``: for the head, or the embedding where it is the head."""

    usual: str
    better: str
    fused: str
    outer: str
    number: gguf.LlamaFileType


FILE_TYPES = {
    "q8_0": FileType("q8_0", "q8_0", "q8_0", "q8_0", gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": FileType("q4_0", "q4_0", "q4_0", "q6_k", gguf.LlamaFileType.MOSTLY_Q4_0),
    "q4_1": FileType("q4_1", "q4_1", "q4_1", "q6_k", gguf.LlamaFileType.MOSTLY_Q4_1),
    "q5_0": FileType("q5_0", "q5_0", "q5_0", "q6_k", gguf.LlamaFileType.MOSTLY_Q5_0),
    "q5_1": FileType("q5_1", "q5_1", "q5_1", "q6_k", gguf.LlamaFileType.MOSTLY_Q5_1),
    "q4_k_m": FileType("q4_k", "q6_k", "q5_k", "q6_k", gguf.LlamaFileType.MOSTLY_Q4_K_M),
    "q5_k_m": FileType("q5_k", "q6_k", "q6_k", "q6_k", gguf.LlamaFileType.MOSTLY_Q5_K_M),
    "q6_k": FileType("q6_k", "q6_k", "q6_k", "q6_k", gguf.LlamaFileType.MOSTLY_Q6_K),
}
# Where a row is no whole number of blocks of 256; what even 32 do not divide stays in 16 bits.
FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


@dataclass(frozen=True)
class _Output:
    """A tensor of the file: its name, its Hugging Face ``parts``, whose rows lie one after the other, and its type
    (None: it is not quantised)."""

    name: str
    parts: list[str]
    shape: tuple[int, ...]
    type: str | None


def write_gguf(checkpoint: Checkpoint, path: Path, type_name: str) -> None:
    """Write ``checkpoint`` (of 16 or 32 bits, taken out of its ``tensors`` one by one) as a GGUF file.

    Raises, before anything is written, ValueError for a vocabulary that a GGUF file cannot say, and UnsupportedModel
    for a switch that would be another one when the file is read.
    """
    file_type, config, family = FILE_TYPES[type_name], checkpoint.config, FAMILIES[checkpoint.model_type]
    outputs = _outputs(config, family, file_type)
    metadata = config_metadata(checkpoint, [output.name for output in outputs])
    metadata |= {
        "general.file_type": int(file_type.number),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    if checkpoint.tokenizer is not None:
        metadata |= vocabulary_metadata(checkpoint.tokenizer, checkpoint.name, config)
    factors = rope_factor_tensors(config)
    with whole(path) as unfinished, naming(path):  # nobody takes half a file for a model
        writer = gguf.GGUFWriter(unfinished, family.architecture)
        add_metadata(writer, metadata)
        for name, data in factors.items():
            writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes)
        for output in outputs:
            _announce(writer, output)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in factors.values():
            writer.write_tensor_data(data)
        for output in tqdm(outputs, desc=f"Writing {path.name}", unit="tensor"):
            writer.write_tensor_data(_data(checkpoint, output, family))
        writer.close()


# ---- which tensors, of which types ----


def _outputs(config: ModelConfig, family: Family, file_type: FileType) -> list[_Output]:
    parts: dict[str, list[str]] = {}
    shapes = tensor_shapes(config)
    for name in shapes:
        parts.setdefault(_fused_name(name) if family.fused else name, []).append(name)
    outputs = []
    for name, own in parts.items():
        shape = (sum(shapes[part][0] for part in own), *shapes[own[0]][1:])
        kind = matrix_type(file_type, name, shape, config) if len(shape) == 2 else None
        outputs.append(_Output(_gguf_name(name, config), own, shape, kind))
    return outputs


def _fused_name(name: str) -> str:
    """The tensor that a projection is part of, by its Hugging Face name."""
    for fused, parts in FUSED.items():
        for part in parts:
            if f".{part}." in name:
                return name.replace(part, fused)
    return name


def _gguf_name(name: str, config: ModelConfig) -> str:
    outer = {hf_name: own for own, hf_name in OUTER_NAMES.items()}
    if name in outer:
        return outer[name]
    _, _, layer, *part, suffix = name.split(".")
    names = {hf_name: own for own, hf_name in [*layer_names(config).items(), *FUSED_NAMES.items()]}
    return f"blk.{layer}.{names['.'.join(part)]}.{suffix}"


def matrix_type(file_type: FileType, name: str, shape: tuple[int, ...], config: ModelConfig) -> str | None:
    """The block type of a matrix, by its Hugging Face name; None: it is not quantised."""
    if name == "lm_head.weight" or (name == "model.embed_tokens.weight" and config.tie_word_embeddings):
        chosen = file_type.outer
    elif name.endswith("qkv_proj.weight"):
        chosen = file_type.fused
    elif name.endswith(("v_proj.weight", "down_proj.weight")) and _has_more_bits(name, config.num_layers):
        chosen = file_type.better
    else:
        chosen = file_type.usual
    while shape[-1] % BLOCK_TYPES[chosen].size:
        if chosen not in FALLBACK:
            return None
        chosen = FALLBACK[chosen]
    return chosen


def _has_more_bits(name: str, num_layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    layer, eighth = int(name.split(".")[2]), num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


# ---- their bytes ----


def _announce(writer: gguf.GGUFWriter, output: _Output) -> None:
    if output.type is not None:
        block = BLOCK_TYPES[output.type]
        raw_shape = (output.shape[0], output.shape[1] // block.size * block.nbytes)
        number = gguf.GGMLQuantizationType[output.type.upper()]
        writer.add_tensor_info(output.name, raw_shape, np.dtype(np.uint8), int(np.prod(raw_shape)), number)
    else:
        dtype = np.dtype(np.float16 if len(output.shape) == 2 else np.float32)
        writer.add_tensor_info(output.name, output.shape, dtype, int(np.prod(output.shape)) * dtype.itemsize)


def _data(checkpoint: Checkpoint, output: _Output, family: Family) -> np.ndarray:
    tensor = torch.cat([_rows(checkpoint, name, family) for name in output.parts])
    if output.type is not None:
        tensor = torch.cat([quantise(rows, output.type).flatten(1) for rows in tensor.split(ROWS)])
    else:
        tensor = tensor.half() if tensor.dim() == 2 else tensor.float()
    return np.ascontiguousarray(tensor.numpy())


def _rows(checkpoint: Checkpoint, name: str, family: Family) -> Tensor:
    """A tensor with its rows and values as llama.cpp wants them; it adds nothing to a norm's weight when it runs."""
    config, tensor = checkpoint.config, checkpoint.tensors.pop(name)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    if family.paired_rows and (part := name.split(".")[-2]) in heads:
        return pairs_from_halves(tensor, heads[part])
    return tensor.float() + config.norm_offset if config.norm_offset and name.endswith("norm.weight") else tensor


def pairs_from_halves(tensor: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a q or k projection [heads * K, ...] for llama.cpp, which rotates neighbouring rows."""
    return tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
