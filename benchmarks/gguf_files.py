"""The default model's weights as GGUF files of other types, for llama.cpp: the same numbers, rounded once."""

from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open
from torch import Tensor

from layerskip_kernels.model.gguf_cache import converted_directory
from layerskip_kernels.model.gguf_convert import LAYER_NAMES, OUTER_NAMES
from layerskip_kernels.model.gguf_write import pairs_from_halves
from layerskip_kernels.model.sources import default_model_path

TYPES = {
    "BF16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "F16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "Q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# GGUFWriter writes them itself.
OWN_KEYS = {"general.architecture", "general.file_type", "general.quantization_version"}


def write_gguf(path: Path, type_name: str) -> None:
    """Write the file: metadata and tokenizer of the original, all matrices of one type, norms in fp32."""
    original = gguf.GGUFReader(default_model_path())
    tensor_type, file_type = TYPES[type_name]
    writer = gguf.GGUFWriter(path, arch="llama")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _copy_metadata(original.fields.values(), writer)
    heads = {name: original.fields[f"llama.attention.{key}"].contents()
             for name, key in (("attn_q", "head_count"), ("attn_k", "head_count_kv"))}  # fmt: skip
    with safe_open(converted_directory(default_model_path()) / "model.safetensors", "pt") as weights:
        for tensor in original.tensors:
            _add(writer, tensor.name, weights.get_tensor(_hf_name(tensor.name)).float(), tensor_type, heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_metadata(fields: Iterable[gguf.ReaderField], writer: gguf.GGUFWriter) -> None:
    for field in fields:
        if not field.name.startswith("GGUF.") and field.name not in OWN_KEYS:
            element_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], element_type)


def _hf_name(name: str) -> str:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"


def _add(
    writer: gguf.GGUFWriter, name: str, tensor: Tensor, tensor_type: gguf.GGMLQuantizationType, heads: dict[str, int]
) -> None:
    part = name.split(".")[-2]
    if part in heads:
        tensor = pairs_from_halves(tensor, heads[part])
    if tensor.dim() == 1:
        tensor_type = gguf.GGMLQuantizationType.F32
    data = gguf.quants.quantize(np.ascontiguousarray(tensor.numpy()), tensor_type)
    writer.add_tensor(name, data, raw_dtype=tensor_type)
