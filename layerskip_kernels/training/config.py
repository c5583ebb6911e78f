"""A training as a YAML file says it: checked once, here, with the name of the field in every complaint."""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from layerskip_kernels.checks import MAX_INT
from layerskip_kernels.errors import shown
from layerskip_kernels.model.files import read_text
from layerskip_kernels.training.dropout import LayerDropout
from layerskip_kernels.training.early_exit import EarlyExitLoss
from layerskip_kernels.training.heads import Transplant

__all__ = ["DataConfig", "LoraSettings", "ModelSource", "TrainingConfig", "read_config"]

MAX_NUMBER = 1e30


@dataclass(frozen=True, slots=True)
class DataConfig:
    """``train``, ``validation``: files, as ``text_data`` reads them. ``sequence_length``: tokens a row, at most.
    ``validation_rows``: how many rows an evaluation looks at (the first ones). ``similar_lengths``: the rows of a batch
    are about as long as each other, so that little of it is padding."""

    train: list[str]
    validation: list[str] = field(default_factory=list)
    sequence_length: int = 512
    validation_rows: int = 256
    similar_lengths: bool = False

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("data.train must name at least one file")
        if self.sequence_length < 2:
            raise ValueError(f"data.sequence_length must be at least 2, got {self.sequence_length}")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Either ``source``, what ``load_model`` takes (``default``: its default model), or ``sizes``, the fields of a
    ``LlamaConfig``, or with ``model_type`` of another family's config, for a model from scratch. ``vocab_size``: of
    the vocabulary that is learnt with it. ``grown_from``: the folder of a trained model of the same width and fewer
    layers, whose vocabulary and layers it starts with; the layers on top add nothing at first, so the exit below them
    is the whole model. ``attention``: Transformers' ``attn_implementation``; short rows train faster with ``eager`` on
    a CPU."""

    source: str | None = None
    sizes: dict[str, Any] | None = None
    vocab_size: int = 4096
    grown_from: str | None = None
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        if (self.source is None) == (self.sizes is None):
            raise ValueError("model must have either source (a model to train on) or sizes (one from scratch)")
        if self.grown_from is not None and self.sizes is None:
            raise ValueError("model.grown_from needs model.sizes: those of the larger model")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adapters on the linear layers ``targets``; everything else stays as it was.

    ``early_layers``: how many of the first layers have adapters of ``early_rank`` and ``early_alpha`` instead: those
    that draft have more to learn, since their exit is to say what the whole model says. ``transplants``: heads of
    deeper layers that theirs start as; see ``heads.py``. ``grown_from``: the folder of trained adapters of the same
    ranks that these start as instead.
    """

    rank: int = 16
    alpha: int = 32
    early_layers: int = 0
    early_rank: int = 64
    early_alpha: int = 64
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    transplants: list[Transplant] = field(default_factory=list)
    grown_from: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "transplants", [_built(Transplant, t, "lora.transplants") for t in self.transplants])
        if self.transplants and self.grown_from is not None:
            raise ValueError("lora must have transplants or grown_from, not both: trained adapters have the heads")


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """``training``: fields of Transformers' ``TrainingArguments``. ``eval_exits``: exit layers to evaluate. ``name``:
    of the trained model. Paths in the file are relative to it."""

    output_dir: str
    model: ModelSource
    data: DataConfig
    name: str = "model"
    layer_dropout: LayerDropout | None = None
    early_exit: EarlyExitLoss | None = None
    lora: LoraSettings | None = None
    eval_exits: list[int] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.early_exit is not None and self.early_exit.anchor and self.lora is None:
            raise ValueError("early_exit.anchor needs lora: it holds layers to what they were without adapters")


SECTIONS = {
    "model": ModelSource,
    "data": DataConfig,
    "layer_dropout": LayerDropout,
    "early_exit": EarlyExitLoss,
    "lora": LoraSettings,
}


def read_config(path: Path) -> TrainingConfig:
    """Read a YAML file. Raises ValueError naming the field for one that is unknown, missing or out of range."""
    text = read_text(path)
    try:
        contents = yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as the 31st of June
        raise ValueError(f"{path} is not valid YAML: {str(error)[:300]}") from error
    try:
        given = dict(_checked(contents, TrainingConfig, "the training"))
        for name, kind in SECTIONS.items():
            if given.get(name) is not None:
                given[name] = _built(kind, given[name], name)
        config = _built(TrainingConfig, given, "the training")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _with_paths(config, path.resolve().parent)


def _checked(contents: Any, kind: type, where: str) -> dict[str, Any]:
    known = [entry.name for entry in fields(kind)]
    if not isinstance(contents, dict):
        raise ValueError(f"{where} must be a mapping with some of {', '.join(known)}, got {shown(contents)}")
    if unknown := contents.keys() - set(known):
        raise ValueError(f"{where} has no field {shown(min(map(str, unknown)))}; it has {', '.join(known)}")
    return contents


def _built(kind: type, contents: Any, where: str) -> Any:
    given, types = _checked(contents, kind, where), get_type_hints(kind)
    for name, value in given.items():
        if not _fits(value, types[name]):
            plain = isinstance(types[name], type) and get_origin(types[name]) is None
            expected = types[name].__name__ if plain else str(types[name]).replace("typing.", "")
            raise ValueError(f"{where}: {name} must be {expected}, got {shown(value)}")
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value that YAML has read is of an annotated type; what is built already is."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if kind is float:
        return type(value) in (int, float) and -MAX_NUMBER < value < MAX_NUMBER
    if kind is int:
        return type(value) is int and abs(value) <= MAX_INT
    return kind is Any or isinstance(value, (kind, dict) if is_dataclass(kind) else kind)  # type: ignore[arg-type]


def _with_paths(config: TrainingConfig, folder: Path) -> TrainingConfig:
    """The same with paths that are absolute."""

    def absolute(path: str) -> str:
        return str(folder / Path(path).expanduser())

    data = replace(
        config.data,
        train=[absolute(path) for path in config.data.train],
        validation=[absolute(path) for path in config.data.validation],
    )
    model, lora, early_exit = config.model, config.lora, config.early_exit
    if model.grown_from is not None:
        model = replace(model, grown_from=absolute(model.grown_from))
    if lora is not None and lora.grown_from is not None:
        lora = replace(lora, grown_from=absolute(lora.grown_from))
    if early_exit is not None and early_exit.draft_vocab is not None:
        early_exit = replace(early_exit, draft_vocab=absolute(early_exit.draft_vocab))
    return replace(
        config, data=data, model=model, lora=lora, early_exit=early_exit, output_dir=absolute(config.output_dir)
    )
