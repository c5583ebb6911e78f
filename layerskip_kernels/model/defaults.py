"""``layerskip.json``: the exit layer and the number of drafts that a model is best run with, kept with the model.

    {"exit_layer": 4, "num_speculations": 6, "draft_vocab": "draft_vocab.json", "prompts": "prompts.jsonl"}

``num_speculations`` (as many as pay, where it is left out), ``draft_vocab`` (a list of token ids, or the name of a file
that holds one, beside this file) and ``prompts`` (the name of a .jsonl file beside this file, or "human-eval": what the
model is measured and shown with) may be left out.
``layerskip sweep`` measures and writes it, ``load_model`` reads it: first the user's own, then the model's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from layerskip_kernels.errors import shown
from layerskip_kernels.model.draft_vocab import read_draft_vocab
from layerskip_kernels.model.files import naming, read_bytes, whole, write_whole
from layerskip_kernels.model.json_file import JsonObject, are_integers, read_json_object
from layerskip_kernels.model_config import ModelConfig

__all__ = [
    "DEFAULT_MODEL", "DraftDefaults", "config_directory", "copy_defaults", "find_defaults", "find_prompts",
    "read_defaults", "write_defaults",
]  # fmt: skip

DEFAULT_MODEL = "SmolLM2-135M-Instruct"  # where no source is named
FILE = "layerskip.json"
FIELDS = ("exit_layer", "num_speculations", "draft_vocab", "prompts")
HUMAN_EVAL = "human-eval"
Source = str | os.PathLike[str] | None


@dataclass(frozen=True)
class DraftDefaults:
    """What a config that leaves ``exit_layer`` or ``num_speculations`` open gets from the model.

    ``num_speculations``: None: chosen on the way, as "auto". ``draft_vocab``: the token ids that drafts may be
    (`Model.with_draft_vocab`); None: any.
    """

    exit_layer: int
    num_speculations: int | None = None
    draft_vocab: tuple[int, ...] | None = None


def config_directory() -> Path:
    """``$XDG_CONFIG_HOME/layerskip_kernels``, or ``~/.config/layerskip_kernels``."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "layerskip_kernels"


def find_defaults(source: Source, directory: Path, config: ModelConfig) -> DraftDefaults | None:
    """The defaults of what ``load_model(source)`` reads from ``directory``, or None.

    The user's own come first: they were measured here. Raises ValueError naming the file where it is not valid.
    """
    for path in (_own(source), _beside(source) or directory / FILE):
        if os.path.exists(path):  # pathlib's raises for a name that is too long
            return read_defaults(path, config)
    return None


def find_prompts(source: Source, directory: Path) -> Path | str | None:
    """What a model is measured and shown with: a .jsonl file, or "human-eval"; None where its file names nothing.

    The user's own defaults have no part in it: prompts belong to the model, not to the machine.
    """
    path = _beside(source) or directory / FILE
    named = _prompts(read_json_object(path), path) if os.path.exists(path) else None
    return named if named in (None, HUMAN_EVAL) else path.parent / named


def _prompts(fields: JsonObject, path: Path) -> str | None:
    value = fields.get("prompts")
    if value is None or value == HUMAN_EVAL:
        return value
    if not isinstance(value, str) or Path(value).name != value or not os.path.exists(path.parent / value):
        fields.refuse("prompts", f'"{HUMAN_EVAL}", or the name of a file beside it')
    return value


def read_defaults(path: Path, config: ModelConfig) -> DraftDefaults:
    """The defaults in a file. Raises ValueError saying what is wrong with it and what to do."""
    try:
        return _read_fields(read_json_object(path), path, config)
    except ValueError as error:
        hint = "`layerskip sweep` writes such files, and the file is optional"
        raise ValueError(f"{error}; {hint}") from error


def _read_fields(fields: JsonObject, path: Path, config: ModelConfig) -> DraftDefaults:
    if unknown := sorted(fields.values.keys() - set(FIELDS)):
        raise ValueError(f"{path} must be a JSON object of {', '.join(FIELDS)}, got {shown(unknown[0])}")
    exit_layer = fields.integer("exit_layer", 1, config.num_layers - 1)
    num_speculations = None
    if "num_speculations" in fields.values:
        num_speculations = fields.integer("num_speculations", 1, config.max_positions)
    _prompts(fields, path)
    return DraftDefaults(exit_layer, num_speculations, _draft_vocab(fields, path, config.vocab_size))


def write_defaults(source: Source, defaults: DraftDefaults) -> Path:
    """Write the defaults of ``load_model(source)`` and return where; the prompts that the model names stay.

    A directory or a .gguf file that was named by its path gets the file beside the weights, where that can be
    written. What came by its name (from the hub or a package) is not the user's to change: for that, and for folders
    that cannot be written, the file goes into the config directory, under the source's name.
    """
    fields = {name: value for name, value in asdict(defaults).items() if value is not None}
    text = json.dumps(fields) + "\n"
    beside, own = _beside(source), _own(source)
    if beside is not None:
        try:
            write_whole(beside, json.dumps({**fields, **_kept_prompts(beside)}) + "\n")
        except OSError:
            pass
        else:
            own.unlink(missing_ok=True)  # or it would go on hiding the new one
            return beside
    own.parent.mkdir(parents=True, exist_ok=True)
    write_whole(own, text)
    return own


def copy_defaults(source: Path, folder: Path) -> None:
    """Give a folder the defaults of another one, with the files beside them that they name; nothing where it has none.

    Raises ValueError naming a file that is damaged.
    """
    if not (source / FILE).exists() or source.resolve() == folder.resolve():
        return
    fields = read_json_object(source / FILE).values
    named = [name for name in (fields.get("prompts"), fields.get("draft_vocab")) if isinstance(name, str)]
    beside = [name for name in named if name == Path(name).name and os.path.exists(source / name)]
    for name in (*beside, FILE):
        contents = read_bytes(source / name)
        with whole(folder / name) as unfinished, naming(folder / name):
            unfinished.write_bytes(contents)


def _kept_prompts(path: Path) -> dict[str, str]:
    """The prompts that a file names, if it is one that can be read."""
    try:
        named = _prompts(read_json_object(path), path)
    except (OSError, ValueError):
        named = None
    return {} if named is None else {"prompts": named}


def _beside(source: Source) -> Path | None:
    """The file beside the weights of a source that is a path; None for one that is a name."""
    path = None if source is None else Path(source)
    if path is not None and path.is_dir():
        return path / FILE
    return path.with_suffix(f".{FILE}") if path is not None and path.is_file() else None


def _own(source: Source) -> Path:
    """The user's own file for a source."""
    named = DEFAULT_MODEL if source is None else source
    key = str(named) if _beside(source) is None else str(Path(named).resolve())
    name = re.sub(r"[^\w.-]+", "--", Path(key).name)
    return config_directory() / "defaults" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def _draft_vocab(fields: JsonObject, path: Path, vocab_size: int) -> tuple[int, ...] | None:
    value = fields.get("draft_vocab")
    if isinstance(value, str):
        if Path(value).name != value or not os.path.exists(path.parent / value):
            fields.refuse("draft_vocab", "a file beside it, or a list of token ids")
        value = read_draft_vocab(path.parent / value)
    if value is None:
        return None
    if not isinstance(value, list) or not value or not are_integers(value, 0, vocab_size - 1):
        fields.refuse("draft_vocab", f"token ids in 0..{vocab_size - 1}, or the name of a file of them")
    return tuple(value)
