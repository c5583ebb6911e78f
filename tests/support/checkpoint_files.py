"""A small Llama as the files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.hf_config import read_hf_config
from layerskip_kernels.model.tensor_names import tensor_shapes

HF_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def random_tensors(hf_config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = tensor_shapes(read_hf_config(hf_config))
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_directory(directory: Path, tensors: dict[str, Tensor] | None = None, **changes: object) -> dict[str, Tensor]:
    hf_config = HF_CONFIG | changes
    tensors = random_tensors(hf_config) if tensors is None else tensors
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config))
    save_file(tensors, directory / "model.safetensors")
    return tensors


def assert_same(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.tensors[name], tensor), name
