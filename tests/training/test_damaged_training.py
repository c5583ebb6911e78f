"""Hundreds of damaged files of each kind that a training reads or keeps: read, or refused by name, soon.

As in tests/model/test_damaged_files.py, whose files are a model's.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from layerskip_kernels import load_model
from layerskip_kernels.training.adapt import Candidate, read_choice
from layerskip_kernels.training.adapter_start import OwnWeights
from layerskip_kernels.training.adapter_training import AdapterTraining, AdaptSettings
from layerskip_kernels.training.config import read_config
from layerskip_kernels.training.exit_states import ExitStates
from layerskip_kernels.training.kept import check_checkpoints
from layerskip_kernels.training.text_data import read_texts
from layerskip_kernels.training.written_texts import Text, judged_texts, write_texts
from support.checkpoint_files import write_directory
from support.damage import (
    HOLES,
    NO_FILES,
    SECONDS_EACH,
    Kind,
    check_damaged,
    damaged_bytes,
    damaged_json,
    put_no_file,
    time_limit,
)
from support.models import random_tokens
from support.tokenizers import Letters
from support.training import write_config

with tempfile.TemporaryDirectory() as folder:
    write_directory(Path(folder), num_hidden_layers=3, vocab_size=128)
    MODEL, OWN = replace(load_model(folder, torch.float32), tokenizer=Letters()), OwnWeights(folder, [1])
TEXTS = [Text(random_tokens(9, 96, seed=n), random_tokens(9, 96, seed=n + 1)) for n in range(4)]
LINES = "".join(json.dumps(asdict(text)) + "\n" for text in TEXTS)
LAST = torch.zeros(2, MODEL.config.hidden_size)  # the states of a text of two tokens
SETTINGS = AdaptSettings(exits=(1,), texts_per_step=2)


def _file(name: str, text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        folder.mkdir()
        (folder / name).write_text(text)
        return folder / name

    return make


def _config(folder: Path) -> Path:
    folder.mkdir()
    exits = {"curriculum": "gradual", "distillation": 0.5, "scale": 0.2}
    return write_config(folder, early_exit=exits, layer_dropout={"p_max": 0.1}, lora={"targets": ["q_proj"]})


def _yaml_damage(raw: bytes, rng) -> bytes:
    """A value replaced by a hostile one, in JSON, which YAML can read; or bytes damaged."""
    if rng.random() < 0.5:
        return damaged_bytes(raw, rng)
    return damaged_json(json.dumps(yaml.safe_load(raw)).encode(), rng)


def _training(folder: Path) -> AdapterTraining:
    states = ExitStates(MODEL, (1, 3), [text.tokens for text in TEXTS], folder)
    return AdapterTraining(OWN, TEXTS, states, [*range(20)], 1, 1, replace(SETTINGS, passes=1))


def _state(folder: Path) -> Path:
    folder.mkdir()
    _training(folder).run(folder / "state.safetensors")
    return folder / "state.safetensors"


def _note(folder: Path) -> Path:
    folder.mkdir()
    check_checkpoints(folder, None, MADE_FROM)
    return folder / "checkpoints.made_from.json"


MADE_FROM = {"files": {"/a/train.jsonl": "0123"}, "length": 64, "versions": {"tokenizers": "0.22.0"}}
CHOICE = [asdict(Candidate(1, n, 16, 0.5, 1.25, 3)) for n in (1, 2)]
JSONL = '{"prompt": "a", "completion": "b"}\n\n{"prompt": "c\\u0085", "completion": "d"}\n'
KINDS = {
    "config": Kind(_config, _yaml_damage, read_config),
    "texts": Kind(_file("train.jsonl", JSONL), damaged_bytes, lambda path: list(read_texts([path]))),
    "one text": Kind(
        _file("train.txt", "caf\N{LATIN SMALL LETTER E WITH ACUTE} " * 9),
        damaged_bytes,
        lambda path: [*read_texts([path])],
    ),
    "written": Kind(
        _file("000000.jsonl", LINES), damaged_bytes, lambda path: write_texts(MODEL, [], path.parent, 1, 2)
    ),
    "judged": Kind(
        _file("given.jsonl", LINES), damaged_bytes, lambda path: judged_texts(MODEL, [[1, 2]], [LAST], path)
    ),
    "choice": Kind(_file("choice.json", json.dumps(CHOICE)), damaged_json, lambda path: read_choice(path, 3, 20)),
    "state": Kind(
        _state, lambda raw, rng: damaged_bytes(raw, rng, 3000), lambda path: _training(path.parent).run(path)
    ),
    "note": Kind(
        _note, damaged_json, lambda path: check_checkpoints(path.parent, path.parent / "checkpoint-1", MADE_FROM)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused_by_name(tmp_path: Path, one_thread: None, kind: str):
    check_damaged(kind, KINDS[kind], tmp_path / kind)


@pytest.mark.parametrize("kind", [name for name in NO_FILES if name not in ("empty", "nothing") and name not in HOLES])
def test_states_in_the_place_of_which_there_is_no_file(tmp_path: Path, kind: str):
    path = tmp_path / "states-1.bin"
    path.touch()
    put_no_file(path, kind)
    with time_limit(SECONDS_EACH), pytest.raises(ValueError, match=path.name):
        ExitStates(MODEL, [1], [text.tokens for text in TEXTS], tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": {"train": "train.jsonl"}}, r"config.yaml: data: train must be list\[str\], got 'train.jsonl'"),
        ({"data": {"train": ["a"], "sequence_length": "64"}}, "sequence_length must be int, got '64'"),
        ({"data": {"train": ["a"], "similar_lengths": "no"}}, "similar_lengths must be bool, got 'no'"),
        ({"early_exit": {"weights": {1: float("nan")}}}, "weights must be dict"),
        ({"early_exit": {"distillation": float("inf")}}, "distillation must be float, got inf"),
        ({"eval_exits": [True]}, r"the training: eval_exits must be list\[int\], got \[True\]"),
        ({"name": 7}, "name must be str, got 7"),
    ],
    ids=str,
)
def test_a_config_of_other_types_is_refused_by_name(tmp_path: Path, changes: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        read_config(write_config(tmp_path, **changes))


def test_yaml_that_grows_when_it_is_shown(tmp_path: Path):
    """Lists of lists of the same lists: ten to the power of nine values in a file of a few hundred bytes."""
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(lines) + "\nname: *a9\noutput_dir: *a9\n")
    with time_limit(SECONDS_EACH), pytest.raises(ValueError, match=r"config.yaml: the training has no field 'a0'"):
        read_config(path)
    path.write_text("model: &m\n" + "".join(f"  {line}\n" for line in lines) + "data: {train: *a9}\noutput_dir: x\n")
    with time_limit(SECONDS_EACH), pytest.raises(ValueError, match=r"config.yaml") as caught:
        read_config(path)
    assert len(str(caught.value)) < 600
