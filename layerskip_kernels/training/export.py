"""A trained model -> a folder that ``load_model`` reads, in bf16: the whole model, or its adapters."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict

from layerskip_kernels.model.families import FAMILIES
from layerskip_kernels.model.hf_config import read_hf_config
from layerskip_kernels.model.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from layerskip_kernels.model.safetensors_file import DTYPE_CODES, write_safetensors
from layerskip_kernels.training.text_data import END_OF_TEXT

__all__ = ["export_adapter", "export_model"]


# Files of a model beside config, weights and tokenizer.json: where its texts end, how a conversation is written.
COMPANIONS = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "merges.txt",
    "special_tokens_map.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
)  # fmt: skip
OWN_TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT),
}


def export_model(
    model: Any, tokenizer: Path, folder: Path, dtype: torch.dtype = torch.bfloat16, source: Path | None = None
) -> None:
    """Write ``model``, Transformers' of any family, with its vocabulary to ``folder``, rounded to ``dtype``.

    ``source``: the folder of the model that it started as. What that says of ends of text, of special tokens and of
    conversations is kept; a model from scratch gets a tokenizer_config.json that names its end of text.
    """
    class_name = FAMILIES[model.config.model_type].class_name
    fields = {**model.config.to_diff_dict(), "model_type": model.config.model_type, "architectures": [class_name]}
    fields["dtype"] = str(dtype).removeprefix("torch.")
    fields |= _all_sizes(model.config)
    config = read_hf_config(fields)
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    codes = {name: (DTYPE_CODES[dtype], tuple(tensor.shape)) for name, tensor in state.items()}
    tensors = ((name, tensor.detach().cpu().to(dtype)) for name, tensor in state.items())
    with _whole(folder) as unfinished:
        write_safetensors(unfinished / "model.safetensors", codes, tensors)
        shutil.copyfile(tokenizer, unfinished / "tokenizer.json")
        if source is None:
            _write_json(unfinished / "tokenizer_config.json", OWN_TOKENIZER)
        else:
            _copy_companions(source, unfinished)
        _write_json(unfinished / "config.json", fields)


def _copy_companions(source: Path, folder: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write files in, which are then moved to ``folder``; the config, which makes it a model, last."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir(parents=True)
    yield unfinished
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name in ("config.json", ADAPTER_CONFIG)):
        path.replace(folder / path.name)
    unfinished.rmdir()


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def export_adapter(model: Any, base: str | None, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the adapters of ``model``, a ``PeftModel``, in PEFT's format; ``base``: what they were trained on."""
    state = {name: tensor.detach().cpu().to(dtype) for name, tensor in get_peft_model_state_dict(model).items()}
    codes = {name: (DTYPE_CODES[dtype], tuple(tensor.shape)) for name, tensor in state.items()}
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
    with _whole(folder) as unfinished:
        write_safetensors(unfinished / ADAPTER_WEIGHTS, codes, state.items())
        _write_json(unfinished / ADAPTER_CONFIG, fields)


def _all_sizes(config: Any) -> dict[str, Any]:
    """The sizes, written out even where they are Transformers' defaults."""
    names = [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
        *("bos_token_id", "eos_token_id"),
    ]
    return {name: getattr(config, name) for name in names if hasattr(config, name)}
