"""The prompts that a model is measured and shown with."""

import json
from pathlib import Path

import pytest

from layerskip_kernels.evaluation import prompts
from layerskip_kernels.evaluation.prompts import CODE_PROMPTS, example_prompts, human_eval_prompts, read_jsonl_prompts
from layerskip_kernels.model.defaults import DraftDefaults, find_prompts, read_defaults, write_defaults
from layerskip_kernels.model.sources import shipped_checkpoints
from layerskip_kernels.recipes.parse_task import draw_examples
from support.models import config


def write(folder: Path, **fields: object) -> Path:
    path = folder / "layerskip.json"
    path.write_text(json.dumps({"exit_layer": 1, "num_speculations": 2, **fields}))
    return path


def test_a_folder_names_its_prompts(tmp_path):
    (tmp_path / "p.jsonl").write_text('"a"\n{"prompt": "b", "task_id": "second"}\n')
    write(tmp_path, prompts="p.jsonl")
    found = example_prompts(tmp_path)
    assert (found.origin, found.prompts) == ("the model's p.jsonl", [("line 1", "a"), ("second", "b")])
    assert example_prompts(str(tmp_path), 1).prompts == [("line 1", "a")]
    write(tmp_path, prompts="human-eval")
    assert example_prompts(tmp_path, 2).prompts == human_eval_prompts(2)


@pytest.mark.parametrize("value", ["../p.jsonl", "missing.jsonl", 5, [], {"a": 1}])
def test_prompts_that_are_not_there_are_refused_by_name(tmp_path, value):
    path = write(tmp_path, prompts=value)
    for read in (lambda: read_defaults(path, config()), lambda: example_prompts(tmp_path)):
        with pytest.raises(ValueError, match=r"layerskip\.json: prompts must be") as raised:
            read()
        assert len(str(raised.value)) < 500


def test_a_model_that_names_nothing_gets_human_eval_or_what_is_carried(tmp_path, monkeypatch):
    assert (example_prompts(tmp_path).origin, len(example_prompts(tmp_path).prompts)) == ("HumanEval", 164)
    monkeypatch.setattr(prompts.importlib.util, "find_spec", lambda _: None)
    found = example_prompts(tmp_path)
    assert found.origin == "Python code of this package"
    assert found.prompts == read_jsonl_prompts(CODE_PROMPTS.read_text()) and 5 <= len(found.prompts) <= 20
    assert example_prompts("layerskip-tiny-code") == example_prompts() == found


@pytest.mark.parametrize("name", shipped_checkpoints())
def test_every_shipped_checkpoint_carries_prompts(name, monkeypatch):
    """So that `verify`, `demo` and `sweep` need nothing else."""
    monkeypatch.setattr(prompts.importlib.util, "find_spec", lambda _: None)
    found = example_prompts(name)
    assert 5 <= len(found.prompts) <= 20 and len({text for _, text in found.prompts}) == len(found.prompts)


def test_the_parse_models_prompts_are_of_the_test_split():
    found = [text for _, text in example_prompts("smollm2-135m-parse").prompts]
    assert found == [example.prompt for example in draw_examples("test", len(found))]


def test_saving_a_setting_keeps_the_prompts(tmp_path, config_directory):
    (tmp_path / "p.jsonl").write_text('"a"\n')
    path = write(tmp_path, prompts="p.jsonl")
    assert write_defaults(tmp_path, DraftDefaults(2, 3)) == path
    assert json.loads(path.read_text()) == {"exit_layer": 2, "num_speculations": 3, "prompts": "p.jsonl"}
    assert find_prompts(tmp_path, tmp_path) == tmp_path / "p.jsonl"


def test_the_users_own_setting_of_a_shipped_model_does_not_hide_its_prompts(config_directory):
    own = write_defaults("smollm2-135m-parse", DraftDefaults(3, 3))
    try:
        assert own.is_relative_to(config_directory)
        assert example_prompts("smollm2-135m-parse").origin == "the model's prompts.jsonl"
    finally:
        own.unlink()
