"""The weights of a directory: where each tensor lies, in one file or in shards, and reading them one by one."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from layerskip_kernels.errors import shown
from layerskip_kernels.model.finite import check_finite
from layerskip_kernels.model.json_file import read_json_object
from layerskip_kernels.model.safetensors_file import TORCH_DTYPES, TensorEntry, read_header, read_tensor
from layerskip_kernels.model.tensor_names import fused_parts
from layerskip_kernels.model_config import ModelConfig
from layerskip_kernels.ops import reference

__all__ = ["OnDemand", "Read", "TensorsOnDemand", "check_entries", "read_entries", "split_fused", "split_rows"]

LARGE_BYTES = 2 << 30  # from here on, reading shows its progress
DEQUANTISED_ROWS = 4096  # at a time: it takes several times their memory


def read_entries(directory: Path) -> dict[str, TensorEntry]:
    """Where each tensor lies, of the single file or of the shards in the index.

    Raises FileNotFoundError, or ValueError naming the file and the tensor.
    """
    if (directory / "model.safetensors").exists():
        return read_header(directory / "model.safetensors")
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        raise FileNotFoundError(
            f"{directory} has neither model.safetensors nor {index.name}; pickled weights are not read: "
            "convert them with Transformers' save_pretrained"
        )
    return _read_shards(index)


def _read_shards(index: Path) -> dict[str, TensorEntry]:
    shard_of = read_json_object(index).object("weight_map").values
    if not shard_of:
        raise ValueError(f"{index} must have a weight_map from tensor names to shard files")
    for shard in shard_of.values():
        # By name alone: the files of a downloaded snapshot are links that lead out of it.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", shard):
            raise ValueError(f"{index} names the shard {shown(shard)}; it must be a .safetensors file beside the index")
    entries: dict[str, TensorEntry] = {}
    for shard in dict.fromkeys(shard_of.values()):
        for name, entry in read_header(_shard_path(index, shard)).items():
            if name in entries:
                raise ValueError(f"{entry} is also in {entries[name].path.name}")
            entries[name] = entry
    for name, shard in shard_of.items():
        if name not in entries or entries[name].path.name != shard:
            raise ValueError(f"tensor {shown(name)} is not in {shard[:80]}, where {index} says it is")
    return entries


def _shard_path(index: Path, shard: str) -> Path:
    path = index.parent / shard
    if not os.path.exists(path):
        raise FileNotFoundError(f"{str(path)[:200]} is missing, but {index.name} names it; download all shards")
    return path


def split_fused(entries: dict[str, TensorEntry], config: ModelConfig) -> dict[str, TensorEntry]:
    """The entries with each fused tensor (`fused_rows`) as the parts that it is made of: rows of the same bytes.

    Raises ValueError naming the file and the tensor for one of another shape.
    """
    split: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        rows = fused_parts(name, config)
        if rows and entry.shape != (shape := (sum(rows.values()), config.hidden_size)):
            raise ValueError(f"{entry} has shape {shown(list(entry.shape))}, expected {list(shape)}")
        split |= split_rows(entry, rows) if rows else {name: entry}
    return split


def split_rows(entry: TensorEntry, rows: dict[str, int]) -> dict[str, TensorEntry]:
    """The rows of a matrix as matrices of their own: name -> how many, in their order."""
    parts, offset = {}, entry.offset
    for name, count in rows.items():
        size = entry.size // entry.shape[0] * count
        parts[name] = replace(entry, shape=(count, *entry.shape[1:]), offset=offset, size=size)
        offset += size
    return parts


def check_entries(entries: dict[str, TensorEntry], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError for a tensor of another shape or of a type that is not read, before a weight is read."""
    for name, shape in shapes.items():
        entry = entries[name]
        if _is_in_blocks(entry, shape):
            continue
        if entry.shape != shape:
            raise ValueError(f"{entry} has shape {shown(list(entry.shape))}, expected {list(shape)}")
        if entry.dtype not in TORCH_DTYPES:
            raise ValueError(f"{entry} has dtype {entry.dtype}; supported: {', '.join(TORCH_DTYPES)}")


def _is_in_blocks(entry: TensorEntry, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a weight of this shape as uint8 [N, blocks, bytes of a block], as gguf_convert writes it."""
    if entry.dtype != "U8" or len(shape) != 2:
        return False
    kinds = [kind for kind in reference.BLOCK_TYPES.values() if shape[1] % kind.size == 0]
    return entry.shape in [(shape[0], shape[1] // kind.size, kind.nbytes) for kind in kinds]


class Read(NamedTuple):
    """A tensor that was read, its values not checked yet."""

    what: object  # its name, for an error
    tensor: Tensor
    source: Tensor  # what it was converted from

    def check(self) -> None:
        """Raise ValueError for a NaN, an infinity, or a value beyond the range of the dtype."""
        check_finite(self.what, self.tensor, self.source)


class OnDemand(dict[str, Tensor]):
    """Tensors that are read, and checked, when they are popped; until then a meta tensor stands for each."""

    def pop(self, name: str, *default: Any) -> Tensor:
        if name not in self:
            return super().pop(name, *default)
        read = self.read(name)
        read.check()
        self.drop(name)
        return read.tensor

    def read(self, name: str) -> Read:
        """The tensor of this name, on the CPU, whether it was dropped or not."""
        raise NotImplementedError

    def drop(self, name: str) -> None:
        """This tensor is not asked for any more."""
        super().pop(name)


class TensorsOnDemand(OnDemand):
    """Tensors of ``shapes`` in a directory's files.

    Each is of ``dtype``. With ``keep_quantised``, a quantised one stays uint8 [N, blocks, bytes of a block].
    """

    def __init__(
        self,
        entries: dict[str, TensorEntry],
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        keep_quantised: bool = False,
    ) -> None:
        super().__init__({name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()})
        self._entries = {name: entries[name] for name in shapes}
        self._shapes = shapes
        self._dtype, self._keep_quantised = dtype, keep_quantised
        large = sum(entry.size for entry in self._entries.values()) >= LARGE_BYTES
        self._progress = tqdm(total=len(shapes), desc="Reading weights", unit="tensor", disable=not large)

    def read(self, name: str) -> Read:
        entry = self._entries[name]
        source = read_tensor(entry)
        if source.dtype != torch.uint8:
            return Read(entry, source.to(self._dtype), source)
        if self._keep_quantised:
            return Read(entry, source, source)
        width, rows = self._shapes[name][-1], source.split(DEQUANTISED_ROWS)
        return Read(entry, torch.cat([reference.dequantise(some, width).to(self._dtype) for some in rows]), source)

    def drop(self, name: str) -> None:
        super().drop(name)
        self._progress.update()
        if not self:
            self._progress.close()
