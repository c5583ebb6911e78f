"""How many columns a tile of 16-bit weights has, and how many steps are on their way to a thread: by op and rows.

No choice changes a bit. What `make gpu-check` found fastest on a GPU is in tuned.json beside this file, or in the file
that LAYERSKIP_TRITON_TUNED names: {GPU: {op: {"columns": 16, "ahead": {"1": 8, ...}, "prompt": [64, 64, 4],
"dependent": true, "split": true}}}. What it does not say is as in DEFAULTS.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .contract import INTERPRETED

__all__ = ["AHEADS", "COLUMNS", "DEFAULTS", "FILE", "PROMPTS", "Config", "config_of", "read_tuned"]

FILE = Path(__file__).parent / "tuned.json"
COLUMNS, AHEADS, ROWS = (16, 32), (1, 2, 4, 8, 16), (1, 2, 4, 8)
# Rows and columns of a program's tile in a prompt, and its warps: as many sums a thread as its registers have room for.
PROMPTS = ((64, 64, 4), (64, 128, 8), (128, 64, 8), (32, 64, 4), (64, 32, 4))


@dataclass(frozen=True)
class Config:
    """``columns`` of a tile; ``ahead``: by the rows of a program, how many steps of 16-bit weights are on their way
    while one is used (half as many of fp32 weights). ``prompt``: one of PROMPTS, for the ops that have tiles.
    ``dependent``: a kernel of few rows asks for its first weights while the kernel ahead of it runs (contract.dot,
    integer_dot), on GPUs that can; off until it is measured to be faster. ``split``: a program of out_residual of few
    rows has two of rule 1's eight segments of four times the columns; off for the same reason."""

    columns: int
    ahead: dict[int, int]
    prompt: tuple[int, int, int] | None = None
    dependent: bool = False
    split: bool = False


DEFAULTS = {
    "norm_qkv_rope_append": Config(16, {1: 8, 2: 4, 4: 4, 8: 4}, (64, 64, 4)),
    "out_residual": Config(16, {1: 8, 2: 8, 4: 4, 8: 4}, (64, 64, 4)),
    "norm_gate_up_act": Config(32, {1: 4, 2: 4, 4: 4, 8: 2}, (64, 64, 4)),
    "norm_head_argmax": Config(32, {1: 4, 2: 4, 4: 4, 8: 2}),
    "linear": Config(32, {1: 4, 2: 4, 4: 4, 8: 2}, (64, 64, 4)),
}


def config_of(op: str) -> Config:
    """The op's on the current GPU."""
    return _configs(_gpu(), os.environ.get("LAYERSKIP_TRITON_TUNED") or str(FILE))[op]


def _gpu() -> str | None:
    return None if INTERPRETED or not torch.cuda.is_available() else torch.cuda.get_device_name()


@cache
def _configs(gpu: str | None, file: str) -> dict[str, Config]:
    if gpu is None or not os.path.exists(file):
        return DEFAULTS
    return {**DEFAULTS, **read_tuned(Path(file)).get(gpu, {})}


def read_tuned(file: Path) -> dict[str, dict[str, Config]]:
    """By GPU and op. Raises ValueError naming the file, and the op, where it is not valid."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        return {gpu: {op: _config(op, values) for op, values in ops.items()} for gpu, ops in said.items()}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{file} holds no launch configurations: {error}") from error


def _config(op: str, values: dict[str, Any]) -> Config:
    default = DEFAULTS[op].prompt if op in DEFAULTS else None
    prompt: Any = tuple(values["prompt"]) if "prompt" in values else default
    ahead = {int(rows): ahead for rows, ahead in values["ahead"].items()}
    config = Config(values["columns"], ahead, prompt, values.get("dependent", False), values.get("split", False))
    valid = op in DEFAULTS and config.columns in COLUMNS and set(config.ahead) == set(ROWS)
    valid = valid and (prompt is None if default is None else prompt in PROMPTS)
    valid = valid and isinstance(config.dependent, bool) and isinstance(config.split, bool)
    valid = valid and (op == "out_residual" or not config.split)
    if not valid or not set(config.ahead.values()) <= set(AHEADS):
        raise ValueError(
            f"{op!r} is {values}; it must be one of {', '.join(DEFAULTS)}, with columns of {COLUMNS} and, for each of "
            f"{ROWS} rows, one of {AHEADS} steps ahead, and (but for the head) for prompts one of {PROMPTS}; "
            "dependent is true or false, and so is, for out_residual, split"
        )
    return config
