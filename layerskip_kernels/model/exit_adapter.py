"""Exit adapters: a few layers, a final norm and perhaps an LM head of their own, which only drafts pass.

The model stays bit for bit what it is: verification never sees the adapter. (In the family of Kangaroo, arXiv
2404.18911, and the tuned lens, arXiv 2303.08112.) Each of the A layers is like one of the model's and has K and V of
its own; with A = 0 the adapter is a final norm and perhaps a head. A single layer may also be an MLP without attention,
which has neither K nor V.

A file ``exit_adapter.safetensors`` holds ``norm.weight`` [D] and ``layers.0.`` .. with the Hugging Face names of a
layer's tensors, in 16 or 32 bits or quantised; and, where drafts have a head of their own, ``head.weight`` [N, D] with
the token that each of its rows stands for, ``head.ids`` int32 [N], ascending. Its metadata names the exit layer and the
model it was made for, to which it is bound by a copy of that model's norms, ``model_norms``. (Training that hardly
changes a norm is not noticed; a text is exact with any adapter.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from layerskip_kernels.errors import shown
from layerskip_kernels.model.files import whole
from layerskip_kernels.model.finite import check_finite
from layerskip_kernels.model.quantise import quantise
from layerskip_kernels.model.safetensors_file import (
    DTYPE_CODES,
    TensorEntry,
    read_header,
    read_metadata,
    read_tensor,
    write_safetensors,
)
from layerskip_kernels.model.tensor_names import check_names, layer_products, layer_shapes
from layerskip_kernels.model.weight_files import TensorsOnDemand, check_entries
from layerskip_kernels.model_config import ModelConfig
from layerskip_kernels.operands import DraftHead, LayerWeights, ModelSizes, ModelWeights
from layerskip_kernels.ops.reference import BLOCK_TYPES, block_type, dequantise

__all__ = [
    "ADAPTER_FILE", "HEAD", "HEAD_IDS", "MLP", "AdapterKind", "DraftExit", "ExitAdapter", "adapter_depth",
    "adapter_kind", "adapter_numbers", "adapter_shapes", "check_adapter_weights", "exit_of", "exit_sizes",
    "model_norms", "num_adapter_layers", "quantise_exit_adapter", "quantised_adapter", "read_exit_adapter",
    "write_exit_adapter",
]  # fmt: skip

ADAPTER_FILE = "exit_adapter.safetensors"
MOST_LAYERS = 2
MLP: Literal["mlp"] = "mlp"  # the kind of an adapter that is one layer without attention
AdapterKind = int | Literal["mlp"]  # A whole layers, or MLP
HEAD, HEAD_IDS = "head.weight", "head.ids"
LAYER_NAME = re.compile(r"layers\.(\d{1,3})\.(.+)")
NORMS_NAME = "model_norms"
NORM_TOLERANCE = 2**-7  # one unit in the last place of bfloat16: float16 rounds first
FORMAT = "1"
QUANTISED_ROWS = 1024  # at a time: it takes several times their memory


@dataclass(frozen=True, eq=False)
class ExitAdapter:
    """An adapter after ``exit_layer`` layers, as run_layers takes it.

    ``draft_weights``: the model's, under the adapter's final norm. ``weights``: the same with the adapter's layers, of
    which there are A + 1: a row that has passed the first of them is one at the exit, so that one is never run.
    ``sizes``: of those layers. ``head``: its own, in the backend's layout; None: the LM head. ``draft_head``: what
    chooses among the drafts, that one or some of its words (`Model.with_draft_vocab`); None: the LM head.
    """

    exit_layer: int
    draft_weights: ModelWeights
    weights: ModelWeights
    sizes: ModelSizes
    head: DraftHead | None = None
    draft_head: DraftHead | None = None

    @property
    def num_layers(self) -> int:
        """A."""
        return max(0, len(self.weights.layers) - 1)

    @property
    def num_kv_layers(self) -> int:
        """Those that have K and V: all, or none."""
        return sum(layer.attends for layer in self.weights.layers[1:])

    @property
    def tensors(self) -> list[Tensor]:
        """Those that its K and V depend on, and its final norm."""
        return [self.weights.final_norm, *(t for layer in self.weights.layers[1:] for t in layer.tensors)]

    def products(self, config: ModelConfig) -> int:
        """tensor_names.layer_products of all its layers."""
        return sum(layer_products(config, layer.attends) for layer in self.weights.layers[1:])


class DraftExit(NamedTuple):
    """What says a token at an exit: the model's weights, under the final norm that counts there, and a head."""

    weights: ModelWeights
    head: DraftHead | None  # None: the LM head
    adapters: tuple[ExitAdapter, ...]  # that rows pass on their way, by exit; the exit's own is the last


def exit_sizes(sizes: ModelSizes, exit_layer: int, num_layers: int) -> ModelSizes:
    """The sizes of an adapter's layers: windows and RoPE as in the last layer before the exit."""
    count, last = num_layers + 1, exit_layer - 1
    return replace(sizes, windows=(sizes.windows[last],) * count, ropes=(sizes.ropes[last],) * count)


def adapter_shapes(config: ModelConfig, kind: AdapterKind, num_words: int = 0) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of an adapter of this kind but HEAD_IDS; projections are [out, in].

    ``num_words``: the rows of its own head; 0: it has none.
    """
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (config.hidden_size,)}
    for layer in range(num_adapter_layers(kind)):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in layer_shapes(config, kind != MLP).items()}
    return shapes | ({HEAD: (num_words, config.hidden_size)} if num_words else {})


def adapter_kind(names: Iterable[str]) -> AdapterKind:
    """Of which kind the adapter with tensors of these names is."""
    found = [match for name in names if (match := LAYER_NAME.fullmatch(name))]
    count = 1 + max((int(match[1]) for match in found), default=-1)
    return MLP if count == 1 and not any(match[2].startswith("self_attn") for match in found) else count


def num_adapter_layers(kind: AdapterKind) -> int:
    """A."""
    return 1 if kind == MLP else int(kind)


def adapter_depth(config: ModelConfig, kind: AdapterKind) -> float:
    """How many of the model's layers the adapter's are worth, by the products in them."""
    return num_adapter_layers(kind) * layer_products(config, kind != MLP) / layer_products(config)


def model_norms(weights: ModelWeights) -> Tensor:
    """What an adapter is bound to: all norms of a model one after the other, bfloat16 [n], on the CPU.

    Norms are numbers in every file, and small, so it does not matter how the model is loaded.
    """
    names = [field.name for field in fields(LayerWeights) if "norm" in field.name]
    norms = [getattr(layer, name) for layer in weights.layers for name in names]
    return torch.cat([norm.cpu().bfloat16() for norm in (weights.final_norm, *norms) if norm is not None])


def write_exit_adapter(
    folder: Path, exit_layer: int, tensors: dict[str, Tensor], model_name: str, weights: ModelWeights
) -> Path:
    """Write ADAPTER_FILE into a folder and return where.

    ``tensors``: `adapter_shapes`, and HEAD_IDS with a head; ``weights``: the model's.
    """
    said = {"format": FORMAT, "exit_layer": str(exit_layer), "model": model_name}
    return _write(folder, {NORMS_NAME: model_norms(weights), **tensors}, said)


def _write(folder: Path, tensors: dict[str, Tensor], said: dict[str, str]) -> Path:
    shapes = {name: (DTYPE_CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    with whole(folder / ADAPTER_FILE) as unfinished:
        write_safetensors(unfinished, shapes, tensors.items(), said)
    return folder / ADAPTER_FILE


def check_adapter_weights(shapes: Mapping[str, Sequence[int]], weights: str) -> None:
    """Raise ValueError unless ``weights`` is a type of ops.reference.BLOCK_TYPES that the matrices among these fit."""
    if weights not in BLOCK_TYPES:
        raise ValueError(f"an exit adapter's weights must be one of {', '.join(BLOCK_TYPES)}, got {shown(weights)}")
    size = BLOCK_TYPES[weights].size
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[1] % size:
            raise ValueError(
                f"{name} has rows of {shape[1]} numbers, which are no whole blocks of {size}, those of {weights}; "
                "choose a type of smaller blocks (q8_0 has 32), or leave the adapter in 16 bits"
            )


def quantised_adapter(tensors: dict[str, Tensor], weights: str) -> dict[str, Tensor]:
    """An adapter's tensors with its matrices, the head's too, as another type. Raises as `check_adapter_weights`."""
    check_adapter_weights({name: tensor.shape for name, tensor in tensors.items()}, weights)
    return {
        name: torch.cat([quantise(rows, weights) for rows in tensor.split(QUANTISED_ROWS)]) if tensor.dim() == 2
        else tensor
        for name, tensor in tensors.items()
    }  # fmt: skip


def adapter_numbers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors with quantised matrices as the numbers that they stand for, fp32."""
    return {
        name: dequantise(tensor, tensor.size(1) * block_type(tensor).size) if tensor.dtype == torch.uint8 else tensor
        for name, tensor in tensors.items()
    }


def quantise_exit_adapter(source: Path, folder: Path, weights: str) -> Path:
    """Write the adapter of a file or folder into ``folder`` with its matrices as another type; returns where.

    Raises as `read_exit_adapter` and `quantised_adapter` do, before anything is written.
    """
    _, entries, said = _opened(source)
    tensors = adapter_numbers({name: read_tensor(entry) for name, entry in entries.items()})
    for name, entry in entries.items():
        if tensors[name].is_floating_point():
            check_finite(entry, tensors[name], tensors[name])
    quantised = quantised_adapter(tensors, weights)
    folder.mkdir(exist_ok=True)
    return _write(folder, quantised, said)


def read_exit_adapter(
    path: Path, config: ModelConfig, dtype: torch.dtype, model_name: str, weights: ModelWeights
) -> tuple[int, dict[str, Tensor]]:
    """The exit layer and the tensors of an adapter for a model: a file, or a folder with ADAPTER_FILE.

    Numbers come in ``dtype``, quantised matrices as they are, HEAD_IDS int64. Raises FileNotFoundError, or ValueError
    naming the file: another model's adapter, no adapter at all, a missing, unknown, misshapen or damaged tensor.
    """
    path, entries, said = _opened(path)
    _check_model(path, entries.pop(NORMS_NAME, None), said.get("model"), model_name, weights)
    exit_layer = said.get("exit_layer", "")
    if not re.fullmatch(r"\d{1,4}", exit_layer) or not 1 <= int(exit_layer) < config.num_layers:
        raise ValueError(f"{path}: exit_layer must be in 1..{config.num_layers - 1}, got {shown(exit_layer)}")
    kind = adapter_kind(entries)
    if (num_layers := num_adapter_layers(kind)) > MOST_LAYERS:
        raise ValueError(f"{path} has {num_layers} layers; an exit adapter has at most {MOST_LAYERS}")
    ids = _read_ids(entries.pop(HEAD_IDS), config.vocab_size) if HEAD_IDS in entries else None
    shapes = adapter_shapes(config, kind, 0 if ids is None else len(ids))
    check_names(path, set(entries), shapes)
    check_entries(entries, shapes)
    tensors = TensorsOnDemand(entries, shapes, dtype, keep_quantised=True)
    return int(exit_layer), {name: tensors.pop(name) for name in shapes} | ({} if ids is None else {HEAD_IDS: ids})


def exit_of(path: Path) -> int:
    """The exit layer of an adapter that was read before."""
    return int(_opened(path)[2]["exit_layer"])


def _opened(path: Path) -> tuple[Path, dict[str, TensorEntry], dict[str, str]]:
    """The file of an adapter, its tensors and what its metadata says. Raises as `read_exit_adapter` does."""
    path = path / ADAPTER_FILE if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; an exit adapter is a file named {ADAPTER_FILE}, or its folder")
    entries, said = read_header(path), read_metadata(path)
    if said.get("format") != FORMAT:
        raise ValueError(f"{path} is not an exit adapter of format {FORMAT}: its metadata says {shown(said)}")
    return path, entries, said


def _read_ids(entry: TensorEntry, vocab_size: int) -> Tensor:
    """The tokens of an adapter's head, int64 [N]. Raises ValueError unless they are token ids in ascending order."""
    if entry.dtype != "I32" or len(entry.shape) != 1 or not 1 <= entry.shape[0] <= vocab_size:
        raise ValueError(f"{entry} must be I32 [1..{vocab_size}], got {entry.dtype} {shown(list(entry.shape))}")
    ids = read_tensor(entry).long()
    if ids[0] < 0 or ids[-1] >= vocab_size or not (ids.diff() > 0).all():
        raise ValueError(f"{entry} must hold token ids in 0..{vocab_size - 1}, ascending; the file is damaged")
    return ids


def _check_model(
    path: Path, entry: TensorEntry | None, made_for: str | None, model_name: str, weights: ModelWeights
) -> None:
    """Raise ValueError naming both models unless the norms that an adapter is bound to are this model's."""
    expected = model_norms(weights)
    found = None if entry is None or entry.shape != expected.shape or entry.dtype != "BF16" else read_tensor(entry)
    if found is None or not torch.allclose(found.float(), expected.float(), rtol=NORM_TOLERANCE, atol=1e-6):
        raise ValueError(
            f"{path} is an exit adapter for {shown(made_for)}, not for {model_name!r}: their norms differ; use it with "
            "the model it was trained on, or train one for this model"
        )
