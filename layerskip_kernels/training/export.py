"""A trained model -> a folder that ``load_model`` reads, in bf16: the whole model, or its adapters."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict

from layerskip_kernels.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from layerskip_kernels.config import ModelConfig
from layerskip_kernels.llama_tensors import tensor_shapes
from layerskip_kernels.safetensors_file import write_safetensors

__all__ = ["export_adapter", "export_model"]

DTYPE_CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def export_model(model: Any, tokenizer: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``model``, a Transformers Llama, with its vocabulary to ``folder``, rounded to ``dtype``."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {**model.config.to_diff_dict(), "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    fields["dtype"] = str(dtype).removeprefix("torch.")
    fields |= _all_sizes(model.config)
    (folder / "config.json").write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    shapes = tensor_shapes(ModelConfig.from_hf(fields))
    state = model.state_dict()
    codes = {name: (DTYPE_CODES[dtype], shape) for name, shape in shapes.items()}
    write_safetensors(
        folder / "model.safetensors", codes, ((name, state[name].detach().cpu().to(dtype)) for name in shapes)
    )
    shutil.copyfile(tokenizer, folder / "tokenizer.json")


def export_adapter(model: Any, base: str | None, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the adapters of ``model``, a ``PeftModel``, in PEFT's format; ``base``: what they were trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().to(dtype) for name, tensor in get_peft_model_state_dict(model).items()}
    codes = {name: (DTYPE_CODES[dtype], tuple(tensor.shape)) for name, tensor in state.items()}
    write_safetensors(folder / ADAPTER_WEIGHTS, codes, state.items())
    settings = model.peft_config["default"]
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "rank_pattern": settings.rank_pattern,
        "alpha_pattern": settings.alpha_pattern,
        "target_modules": sorted(settings.target_modules),
        "bias": "none",
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def _all_sizes(config: Any) -> dict[str, Any]:
    """The sizes, written out even where they are Transformers' defaults."""
    names = [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
        *("bos_token_id", "eos_token_id"),
    ]
    return {name: getattr(config, name) for name in names}
