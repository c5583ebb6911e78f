"""Small Llamas as GGUF files, laid out as llama.cpp's converter does it."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from torch import Tensor

from layerskip_kernels.model import gguf_convert

GgmlType = gguf.GGMLQuantizationType
HF_PART = {name: part for part, name in gguf_convert.LAYER_NAMES.items()}
HF_OUTER = {name: outer for outer, name in gguf_convert.OUTER_NAMES.items()}


def gguf_name(name: str) -> str:
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.(weight|bias)", name):
        return f"blk.{match[1]}.{HF_PART[match[2]]}.{match[3]}"
    return HF_OUTER[name]


def interleave(rows: Tensor, num_heads: int) -> Tensor:
    """Row 2i of a head is row i, row 2i + 1 is row i + K/2: llama.cpp's layout, written with indices."""
    head_dim = len(rows) // num_heads
    order = [i // 2 + (i % 2) * head_dim // 2 for i in range(head_dim)]
    return torch.cat([head[order] for head in rows.split(head_dim)])


def gguf_rows(name: str, tensor: Tensor) -> np.ndarray:
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    return (interleave(tensor, heads) if heads else tensor).contiguous().numpy()


METADATA: dict[str, Any] = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 160,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 16,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def write_gguf(
    path: Path,
    tensors: dict[str, Tensor],
    matrix_type: GgmlType = GgmlType.F32,
    extra: dict[str, np.ndarray] | None = None,
    arch: str = "llama",
    raw: dict[str, tuple[GgmlType, np.ndarray]] | None = None,
    **metadata: Any,
) -> None:
    """Norms and biases are F32, the matrices of ``matrix_type``, those in ``raw`` as they are there (type, bytes); None
    takes a metadata key away."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (METADATA | {key.replace("__", "."): value for key, value in metadata.items()}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](key, value)
    for name, tensor in tensors.items():
        if gguf_name(name) in (raw or {}):
            raw_type, rows = raw[gguf_name(name)]
            writer.add_tensor(gguf_name(name), rows, raw_dtype=raw_type)
            continue
        rows = gguf_rows(name, tensor)
        tensor_type = matrix_type if rows.ndim == 2 else GgmlType.F32
        writer.add_tensor(gguf_name(name), quantize(rows, tensor_type), raw_dtype=tensor_type)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_parts(whole: Path, count: int, name: str = "parts", drop: int = 0) -> list[Path]:
    """The file in parts, the metadata in the first, as llama.cpp's gguf-split does it; without the last ``drop``."""
    reader = gguf.GGUFReader(whole)
    paths = [whole.with_name(f"{name}-{part + 1:05d}-of-{count:05d}.gguf") for part in range(count)]
    for part, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        if part == 0:
            for field in list(reader.fields.values()):
                if field.name.startswith(("llama.", "tokenizer.")):
                    writer.add_key_value(field.name, field.contents(), field.types[0])
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[part::count][: -drop or None]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths
