"""A trained model -> a folder that ``load_model`` reads: config.json, model.safetensors in bf16, tokenizer.json."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerskip_kernels.config import ModelConfig
from layerskip_kernels.llama_tensors import tensor_shapes
from layerskip_kernels.safetensors_file import write_safetensors

__all__ = ["export_model"]

DTYPE_CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def export_model(model: nn.Module, tokenizer: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``model``, a Transformers Llama, with its vocabulary to ``folder``, rounded to ``dtype``."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {**model.config.to_diff_dict(), "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    fields["dtype"] = str(dtype).removeprefix("torch.")
    fields |= {"vocab_size": model.config.vocab_size, "hidden_size": model.config.hidden_size}
    fields |= _all_sizes(model.config)
    (folder / "config.json").write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    shapes = tensor_shapes(ModelConfig.from_hf(fields))
    state = model.state_dict()
    codes = {name: (DTYPE_CODES[dtype], shape) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", codes, ((name, state[name].detach().cpu().to(dtype)) for name in shapes))
    shutil.copyfile(tokenizer, folder / "tokenizer.json")


def _all_sizes(config: Any) -> dict[str, Any]:
    """The sizes, written out even where they are Transformers' defaults."""
    names = ("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    return {name: getattr(config, name) for name in names}
