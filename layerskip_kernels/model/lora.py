"""LoRA adapters in PEFT's format, added to the weights they were trained on: W + (alpha / r) B A.

Every field of adapter_config.json is read, listed as harmless, or refused by name unless it is switched off; every
tensor of adapter_model.safetensors is used, or refused by name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from layerskip_kernels.errors import UnsupportedModel, shown
from layerskip_kernels.model.finite import check_finite
from layerskip_kernels.model.json_file import JsonObject, read_json_object
from layerskip_kernels.model.module_patterns import check_patterns, first_pattern
from layerskip_kernels.model.safetensors_file import TORCH_DTYPES, TensorEntry, read_header, read_tensor
from layerskip_kernels.model.tensor_names import fused_parts
from layerskip_kernels.model.weight_files import split_fused, split_rows
from layerskip_kernels.model_config import ModelConfig

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "Adapter"]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR_NAME = re.compile(r"base_model\.model\.(.+?)(?:\.lora_(A|B))?\.weight")
MERGE = "merge it with PEFT's merge_and_unload() and load the result"
MAX_RANK = 1 << 16

READ = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "base_model_name_or_path"),
    *("revision", "init_lora_weights", "bias", "modules_to_save"),
}
# What was done in training, and what only matters there: the tensors say where adapters are.
HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "runtime_config"),
    # PEFT takes it back for linear layers
    "fan_in_fan_out",
    # of ways to begin that are refused by init_lora_weights, or leave the base as it is
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
}
# Ways to begin that leave the base weights as they are; PiSSA, OLoRA, CorDA and LoftQ change them.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
OFF: tuple[Any, ...] = (None, False, 0, "", [], {})


@dataclass(frozen=True)
class Adapter:
    """``base``, ``revision``: what `locate` takes. ``pairs``: a weight's name -> its A [r, in] and B [out, r].
    ``scales``: a weight's name -> alpha / r. ``whole``: weights that replace the base's."""

    config: Path
    base: str
    revision: str | None
    scales: dict[str, float]
    pairs: dict[str, tuple[TensorEntry, TensorEntry]]
    whole: dict[str, TensorEntry]

    @classmethod
    def read(cls, directory: Path) -> "Adapter":
        """Read adapter_config.json and adapter_model.safetensors.

        Raises UnsupportedModel naming a field that asks for another formula, ValueError naming file and field or tensor
        for files that are damaged or do not fit together, FileNotFoundError saying what to do.
        """
        fields = read_json_object(directory / ADAPTER_CONFIG)
        _refuse_other_formulas(fields)
        base = fields.string("base_model_name_or_path")
        if base is None:
            fields.refuse("base_model_name_or_path", "the model that the adapters were trained on (a path or a hub id)")
        pairs, whole = _sort_tensors(_read_weights(directory))
        scales = _scales(fields, pairs)
        return cls(directory / ADAPTER_CONFIG, base, fields.string("revision"), scales, pairs, whole)

    def split(self, config: ModelConfig) -> "Adapter":
        """The same adapters, those of fused projections as adapters of their parts: rows of B, with A for each.

        Raises ValueError naming the tensor for one whose rows are not those of its parts, or for a part that has
        adapters of its own.
        """
        scales, pairs, whole = {}, {}, split_fused(self.whole, config)
        for name, (a, b) in self.pairs.items():
            rows = fused_parts(name, config)
            if rows and b.shape[0] != sum(rows.values()):
                raise ValueError(f"{b} has shape {shown(b.shape)}, expected {sum(rows.values())} rows")
            for part, own_b in (split_rows(b, rows) if rows else {name: b}).items():
                if part in pairs:
                    raise ValueError(f"{b} is a second adapter of {part}; {MERGE}")
                pairs[part], scales[part] = (a, own_b), self.scales[name]
        return replace(self, scales=scales, pairs=pairs, whole=whole)

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError naming the tensor for one that does not fit the base, whose weights have these shapes."""
        for name, entry in self.whole.items():
            if self._base_shape(shapes, name, entry) != entry.shape:
                raise ValueError(f"{entry} has shape {shown(entry.shape)}, the base {shapes[name]}; {MERGE}")
            if "lm_head.weight" not in shapes and "embed_tokens" in name:
                raise ValueError(f"{entry} replaces an embedding that the base uses as its head, too; {MERGE}")
        for name, (a, b) in self.pairs.items():
            shape = self._base_shape(shapes, name, a)
            if len(shape) != 2 or (b.shape[0], a.shape[1]) != shape:
                halves = f"A {list(a.shape)} and B {list(b.shape)}"
                raise ValueError(f"the adapter of {name} in {a.path} has {halves}, not for {list(shape)}")

    def _base_shape(self, shapes: dict[str, tuple[int, ...]], name: str, entry: TensorEntry) -> tuple[int, ...]:
        if name not in shapes:
            raise ValueError(f"{entry}: the base model {self.base[:100]} does not have {shown(name)}; {MERGE}")
        return shapes[name]

    def applied(self, name: str, weight: Tensor) -> Tensor:
        """``weight``, fp32 [out, in], replaced or with the adapter of that name added, if there is one."""
        if name in self.whole:
            weight = read_tensor(self.whole[name]).float()
            check_finite(self.whole[name], weight, weight)
        if name not in self.pairs:
            return weight
        a, b = (read_tensor(entry).float() for entry in self.pairs[name])
        return weight + self.scales[name] * (b @ a)


def _refuse_other_formulas(fields: JsonObject) -> None:
    if fields.get("peft_type") != "LORA":
        raise UnsupportedModel("peft_type", fields.get("peft_type"), "'LORA'", fields.where)
    if fields.get("bias", "none") != "none":
        raise UnsupportedModel("bias", fields.get("bias"), f"'none'; {MERGE}", fields.where)
    start = fields.get("init_lora_weights")
    if not (type(start) is bool or start in PLAIN_STARTS):
        supported = f"a start that leaves the base weights as they are; {MERGE}"
        raise UnsupportedModel("init_lora_weights", start, supported, fields.where)
    for name, value in fields.values.items():
        if name not in READ and name not in HARMLESS and value not in OFF:
            raise UnsupportedModel(name[:100], value, f"adapters without it; {MERGE}", fields.where)


def _read_weights(directory: Path) -> dict[str, TensorEntry]:
    path = directory / ADAPTER_WEIGHTS
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; pickled adapters (adapter_model.bin) are not read: load them with PEFT and convert "
            "them with save_pretrained"
        )
    return read_header(path)


def _sort_tensors(
    entries: dict[str, TensorEntry],
) -> tuple[dict[str, tuple[TensorEntry, TensorEntry]], dict[str, TensorEntry]]:
    """The pairs of A and B by the weight they adapt, and the weights that replace the base's."""
    halves: dict[str, dict[str, TensorEntry]] = {"A": {}, "B": {}}
    whole: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        match = TENSOR_NAME.fullmatch(name)
        if match is None or ".lora_" in match[1] or entry.dtype not in TORCH_DTYPES:
            types = ", ".join(TORCH_DTYPES)
            raise ValueError(
                f"{entry} ({entry.dtype}) is neither base_model.model.NAME.lora_A.weight nor lora_B.weight nor a whole "
                f"weight, in {types}; {MERGE}"
            )
        # PEFT saves an adapted embedding or head whole as well, as the base layer of its adapters.
        (halves[match[2]] if match[2] else whole)[f"{match[1].removesuffix('.base_layer')}.weight"] = entry
    a, b = halves["A"], halves["B"]
    for name in a.keys() ^ b.keys():
        raise ValueError(f"{a.get(name) or b.get(name)} lacks its other half: lora_A and lora_B come in pairs")
    for name in a:
        if len(a[name].shape) != 2 or len(b[name].shape) != 2 or a[name].shape[0] != b[name].shape[1]:
            raise ValueError(f"{a[name]} has shape {shown(a[name].shape)}, its lora_B {shown(b[name].shape)}")
    return {name: (a[name], b[name]) for name in a}, whole


# ---- scales ----


def _scales(fields: JsonObject, pairs: Mapping[str, tuple[TensorEntry, TensorEntry]]) -> dict[str, float]:
    """alpha / r, or alpha / sqrt(r), of each weight."""
    rank, alpha = fields.integer("r", 1, MAX_RANK), fields.positive("lora_alpha")
    root = fields.boolean("use_rslora", False)
    ranks, alphas = fields.object("rank_pattern"), fields.object("alpha_pattern")
    for patterns in (ranks, alphas):
        check_patterns(patterns, len(pairs))
    scales = {}
    for name, (a, _) in pairs.items():
        module = name.removesuffix(".weight")
        pattern = first_pattern(ranks, module)
        own_rank = rank if pattern is None else ranks.integer(pattern, 1, MAX_RANK)
        pattern = first_pattern(alphas, module)
        own_alpha = alpha if pattern is None else alphas.positive(pattern)
        if a.shape[0] != own_rank:
            raise ValueError(f"{a} has rank {a.shape[0]}, but {fields.where} says {own_rank}")
        scales[name] = own_alpha / own_rank**0.5 if root else own_alpha / own_rank
    return scales
