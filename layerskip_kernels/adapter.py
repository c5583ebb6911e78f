"""LoRA adapters in PEFT's format, added to the weights they were trained on: W + (alpha / r) B A."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.safetensors_file import TensorEntry, read_header, read_tensor

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "Adapter"]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What changes the formula, and the value with which it is the one above.
PLAIN = {"use_dora": False, "bias": "none", "modules_to_save": None}


@dataclass(frozen=True)
class Adapter:
    """``base``: what ``load_model`` takes. ``pairs``: a weight's name -> its A [r, in] and B [out, r]. ``scales``: a
    weight's name -> alpha / r."""

    base: str | None
    scales: dict[str, float]
    pairs: dict[str, tuple[TensorEntry, TensorEntry]]

    @classmethod
    def read(cls, directory: Path) -> "Adapter":
        """Read adapter_config.json and adapter_model.safetensors.

        Raises UnsupportedModel naming a field that asks for another formula, ValueError for files that do not fit
        together.
        """
        config = _read_config(directory / ADAPTER_CONFIG)
        entries = read_header(directory / ADAPTER_WEIGHTS)
        pairs, scales = {}, {}
        for name in sorted({entry.rpartition(".lora_")[0] for entry in entries}):
            a, b = (entries.get(f"{name}.lora_{part}.weight") for part in "AB")
            if a is None or b is None or not name.startswith(PREFIX):
                raise ValueError(
                    f"{directory / ADAPTER_WEIGHTS} must hold {PREFIX}NAME.lora_A and lora_B, got {name!r}"
                )
            weight = name.removeprefix(PREFIX) + ".weight"
            pairs[weight], scales[weight] = (a, b), _scale(config, name.removeprefix(PREFIX))
        return cls(config.get("base_model_name_or_path"), scales, pairs)

    def applied(self, name: str, weight: Tensor) -> Tensor:
        """``weight``, fp32 [out, in], with the adapter of that name added, if there is one."""
        if name not in self.pairs:
            return weight
        a, b = (read_tensor(entry).float() for entry in self.pairs[name])
        if a.shape[1:] != weight.shape[1:] or b.shape[:1] != weight.shape[:1] or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"the adapter of {name} has A {list(a.shape)} and B {list(b.shape)}, not for {list(weight.shape)}"
            )
        return weight + self.scales[name] * (b @ a)


def _scale(config: dict[str, Any], module: str) -> float:
    """alpha / r, or alpha / sqrt(r), of one module."""
    rank = _of_pattern(config, "rank_pattern", module, config["r"])
    alpha = _of_pattern(config, "alpha_pattern", module, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _of_pattern(config: dict[str, Any], field: str, module: str, default: float) -> float:
    """What a pattern gives a module, as PEFT reads it: the first regular expression that is the name or its end."""
    for pattern, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if config.get("peft_type") != "LORA":
        raise UnsupportedModel("peft_type", config.get("peft_type"), "'LORA'")
    for field, value in PLAIN.items():
        if config.get(field, value) not in (value, None):
            raise UnsupportedModel(field, config[field], repr(value))
    return config
