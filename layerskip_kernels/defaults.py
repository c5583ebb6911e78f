"""``layerskip.json``: the exit layer and the number of drafts that a model is best run with, kept with the model.

    {"exit_layer": 4, "num_speculations": 6, "draft_vocab": "draft_vocab.json"}

``draft_vocab`` (a list of token ids, or the name of a file that holds one, beside this file) may be left out.
``layerskip sweep`` measures and writes it, ``load_model`` reads it: first the user's own, then the model's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip_kernels.config import ModelConfig
from layerskip_kernels.draft_vocab import read_draft_vocab

__all__ = ["DEFAULT_MODEL", "DraftDefaults", "config_directory", "find_defaults", "read_defaults", "write_defaults"]

DEFAULT_MODEL = "SmolLM2-135M-Instruct"  # where no source is named
FILE = "layerskip.json"
FIELDS = ("exit_layer", "num_speculations", "draft_vocab")
Source = str | os.PathLike[str] | None


@dataclass(frozen=True)
class DraftDefaults:
    """What a config that leaves ``exit_layer`` or ``num_speculations`` open gets from the model.

    ``draft_vocab``: the token ids that drafts may be (`Model.with_draft_vocab`); None: any.
    """

    exit_layer: int
    num_speculations: int
    draft_vocab: tuple[int, ...] | None = None


def config_directory() -> Path:
    """``$XDG_CONFIG_HOME/layerskip_kernels``, or ``~/.config/layerskip_kernels``."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "layerskip_kernels"


def find_defaults(source: Source, directory: Path, config: ModelConfig) -> DraftDefaults | None:
    """The defaults of what ``load_model(source)`` reads from ``directory``, or None.

    The user's own come first: they were measured here. Raises ValueError naming the file where it is not valid.
    """
    for path in (_own(source), _beside(source) or directory / FILE):
        if path.is_file():
            return read_defaults(path, config)
    return None


def read_defaults(path: Path, config: ModelConfig) -> DraftDefaults:
    """The defaults in a file. Raises ValueError saying what is wrong with it and what to do."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _invalid(path, f"is no JSON: {error}") from error
    if not isinstance(fields, dict) or not {"exit_layer", "num_speculations"} <= fields.keys() <= set(FIELDS):
        raise _invalid(
            path, f"must be a JSON object of exit_layer, num_speculations and maybe draft_vocab, got {fields!r}"
        )
    for name, highest in (("exit_layer", config.num_layers - 1), ("num_speculations", config.max_positions)):
        if type(fields[name]) is not int or not 1 <= fields[name] <= highest:
            raise _invalid(path, f"must have {name} in 1..{highest} for this model, got {fields[name]!r}")
    vocab = _draft_vocab(path, fields.get("draft_vocab"), config.vocab_size)
    return DraftDefaults(fields["exit_layer"], fields["num_speculations"], vocab)


def write_defaults(source: Source, defaults: DraftDefaults) -> Path:
    """Write the defaults of ``load_model(source)`` and return where.

    A directory or a .gguf file that was named by its path gets the file beside the weights, where that can be
    written. What came by its name (from the hub or a package) is not the user's to change: for that, and for folders
    that cannot be written, the file goes into the config directory, under the source's name.
    """
    fields = {name: getattr(defaults, name) for name in FIELDS if getattr(defaults, name) is not None}
    text = json.dumps(fields) + "\n"
    beside, own = _beside(source), _own(source)
    if beside is not None:
        try:
            beside.write_text(text, encoding="utf-8")
        except OSError:
            pass
        else:
            own.unlink(missing_ok=True)  # or it would go on hiding the new one
            return beside
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text(text, encoding="utf-8")
    return own


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


def _draft_vocab(path: Path, value: Any, vocab_size: int) -> tuple[int, ...] | None:
    if isinstance(value, str):
        if Path(value).name != value or not (path.parent / value).is_file():
            raise _invalid(path, f"names the draft_vocab {value!r}, which must be a file beside it")
        value = read_draft_vocab(path.parent / value)
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(type(i) is int and 0 <= i < vocab_size for i in value):
        raise _invalid(
            path, f"must have a draft_vocab of token ids in 0..{vocab_size - 1}, or the name of a file of them"
        )
    return tuple(value)


def _invalid(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path} {problem}; `layerskip sweep` writes such files, and without one the model loads as well")
