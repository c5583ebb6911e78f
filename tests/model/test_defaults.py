"""layerskip.json: where it is looked for, what it may say, and that a model is then run as it says."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerskip_kernels import GenerationConfig, Model, generate, load_model
from layerskip_kernels.evaluation.equality import verify
from layerskip_kernels.model.defaults import DraftDefaults, find_defaults, read_defaults, write_defaults
from layerskip_kernels.model.draft_vocab import read_draft_vocab, write_draft_vocab
from layerskip_kernels.model.hf_config import read_hf_config
from support.checkpoint_files import HF_CONFIG, write_directory
from support.models import tiny_model

CONFIG = read_hf_config(HF_CONFIG)
BEST = DraftDefaults(1, 3)


def drafts_of(model: Model, config: GenerationConfig | None = None) -> int:
    """How many tokens a generation drafts at first."""
    lengths: list[int] = []
    generate(model, [[1, 2, 3]], config, on_draft=lambda _, drafts, __: lengths.append(len(drafts)))
    return lengths[0]


def test_load_model_reads_the_file_beside_the_weights(tmp_path):
    write_directory(tmp_path)
    assert load_model(tmp_path).defaults is None
    (tmp_path / "layerskip.json").write_text('{"exit_layer": 1, "num_speculations": 3}')
    model = load_model(tmp_path)
    assert model.defaults == BEST
    assert model.draft_settings(GenerationConfig()) == (1, 3)
    assert drafts_of(model) == 3


def test_what_the_user_says_goes_before_the_model():
    model = replace(tiny_model(), defaults=DraftDefaults(2, 5))
    settings = {
        (2, 5): GenerationConfig(),
        (1, 5): GenerationConfig(exit_layer=1),
        (2, 7): GenerationConfig(num_speculations=7),
        (0, 0): GenerationConfig("autoregressive"),
        (1, 0): GenerationConfig("early_exit", exit_layer=1),
    }
    for expected, config in settings.items():
        assert model.draft_settings(config) == expected
    assert tiny_model().draft_settings(GenerationConfig()) == (1, 4)
    assert drafts_of(model) == 5
    assert drafts_of(model, GenerationConfig(num_speculations=7)) == 7


def test_a_number_of_drafts_left_out_is_chosen_on_the_way(tmp_path):
    write_directory(tmp_path)
    (tmp_path / "layerskip.json").write_text('{"exit_layer": 1, "draft_vocab": [3, 5]}')
    model = load_model(tmp_path)
    assert model.defaults == DraftDefaults(1, None, (3, 5)) and model.draft_ids is not None
    assert model.leaves_drafting_open(GenerationConfig())
    assert not model.leaves_drafting_open(GenerationConfig(num_speculations=2))
    assert model.draft_exits(GenerationConfig()) == (1,)
    assert model.draft_settings(GenerationConfig(num_speculations=2)) == (1, 2)
    write_defaults(tmp_path, DraftDefaults(1, None, (3, 5)))
    assert "num_speculations" not in json.loads((tmp_path / "layerskip.json").read_text())
    assert load_model(tmp_path).defaults == model.defaults


def test_defaults_change_no_token():
    model = tiny_model()
    [plain] = generate(model, [[1, 2, 3]], GenerationConfig("autoregressive"))
    [drafted] = generate(replace(model, defaults=DraftDefaults(2, 6)), [[1, 2, 3]])
    assert drafted.token_ids == plain.token_ids and drafted.drafted > 0


def test_verify_takes_them():
    model = replace(tiny_model(), defaults=DraftDefaults(2, 6))
    [report] = verify(model, [("p", [1, 2, 3])], GenerationConfig(max_new_tokens=8), [2], batch=1)
    assert report.all_equal and report.exit_layer == 2 and report.drafted > 4


@pytest.mark.parametrize("form", ["list", "file"])
def test_the_draft_vocabulary_may_be_a_list_or_a_file(tmp_path, form):
    write_directory(tmp_path)
    (tmp_path / "vocab.json").write_text("[3, 5, 7]")
    vocab = [3, 5, 7] if form == "list" else "vocab.json"
    fields = {"exit_layer": 1, "num_speculations": 2, "draft_vocab": vocab}
    (tmp_path / "layerskip.json").write_text(json.dumps(fields))
    model = load_model(tmp_path)
    assert model.draft_ids.tolist() == [3, 5, 7]
    assert torch.equal(model.draft_head.weight, load_model(tmp_path).with_draft_vocab([3, 5, 7]).draft_head.weight)
    assert model.with_draft_vocab(None).draft_ids is None


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ("{", "is not valid JSON: Expecting property name"),
        ("[1, 2]", "must hold a JSON object"),
        ('{"num_speculations": 1}', "lacks the field 'exit_layer'"),
        ('{"exit_layer": 1, "num_speculations": 2, "exit": 3}', "JSON object of exit_layer"),
        ('{"exit_layer": 0, "num_speculations": 2}', "exit_layer must be an integer in 1..1, got 0"),
        ('{"exit_layer": 2, "num_speculations": 2}', "exit_layer must be an integer in 1..1, got 2"),
        ('{"exit_layer": true, "num_speculations": 2}', "exit_layer must be an integer in 1..1, got True"),
        ('{"exit_layer": 1, "num_speculations": "4"}', "num_speculations must be an integer in 1..128, got '4'"),
        ('{"exit_layer": 1, "num_speculations": 2, "draft_vocab": [99999]}', "token ids in 0.."),
        ('{"exit_layer": 1, "num_speculations": 2, "draft_vocab": []}', "token ids in 0.."),
        ('{"exit_layer": 1, "num_speculations": 2, "draft_vocab": "gone.json"}', "must be a file beside it"),
        ('{"exit_layer": 1, "num_speculations": 2, "draft_vocab": "../up.json"}', "must be a file beside it"),
    ],
)
def test_a_bad_file_is_named_with_what_to_do(tmp_path, contents, said):
    (tmp_path / "layerskip.json").write_text(contents)
    with pytest.raises(ValueError) as raised:
        read_defaults(tmp_path / "layerskip.json", CONFIG)
    assert said in str(raised.value)
    assert str(tmp_path / "layerskip.json") in str(raised.value) and "layerskip sweep" in str(raised.value)


def test_load_model_refuses_a_bad_file(tmp_path):
    write_directory(tmp_path)
    (tmp_path / "layerskip.json").write_text("{}")
    with pytest.raises(ValueError, match=r"layerskip\.json"):
        load_model(tmp_path)


# ---- where it is written ----


def test_a_directory_gets_the_file_beside_its_weights(tmp_path):
    path = write_defaults(str(tmp_path), replace(BEST, draft_vocab=(1, 2)))
    assert path == tmp_path / "layerskip.json"
    assert find_defaults(tmp_path, tmp_path, CONFIG) == replace(BEST, draft_vocab=(1, 2))


def test_a_gguf_file_gets_it_beside_itself(tmp_path):
    model = tmp_path / "m.Q8_0.gguf"
    model.write_bytes(b"")
    assert write_defaults(model, BEST) == tmp_path / "m.Q8_0.layerskip.json"
    assert find_defaults(str(model), Path("converted"), CONFIG) == BEST


@pytest.mark.parametrize("source", ["owner/model", None, "SmolLM2-135M-Instruct"])
def test_what_came_by_name_gets_it_in_the_config_directory(config_directory, tmp_path, source):
    path = write_defaults(source, BEST)
    assert path.parent == config_directory / "defaults"
    assert find_defaults(source, tmp_path, CONFIG) == BEST
    assert find_defaults("owner/other", tmp_path, CONFIG) is None
    path.unlink()


def test_the_default_model_has_one_file_by_either_name(config_directory):
    path = write_defaults(None, BEST)
    assert write_defaults("SmolLM2-135M-Instruct", BEST) == path
    path.unlink()


def test_a_folder_that_cannot_be_written_gets_it_in_the_config_directory(config_directory, tmp_path):
    (tmp_path / "layerskip.json").mkdir()  # so that not even root can write the file
    path = write_defaults(tmp_path, BEST)
    assert path.parent == config_directory / "defaults"
    assert find_defaults(tmp_path, tmp_path, CONFIG) == BEST
    (tmp_path / "layerskip.json").rmdir()
    # Once the folder can be written, the old file no longer hides the new one.
    assert write_defaults(tmp_path, DraftDefaults(1, 9)) == tmp_path / "layerskip.json"
    assert find_defaults(tmp_path, tmp_path, CONFIG) == DraftDefaults(1, 9)
    assert not path.exists()


def test_a_process_killed_while_it_saves_leaves_what_was_there(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from layerskip_kernels.model.defaults import DraftDefaults, write_defaults
def half(path, text, **_):
    with open(path, "w") as file:
        file.write(text[: len(text) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
Path.write_text = half
write_defaults(Path(sys.argv[1]), DraftDefaults(1, 7))
"""
    write_defaults(tmp_path, BEST)
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert ran.returncode == -signal.SIGKILL
    assert find_defaults(tmp_path, tmp_path, CONFIG) == BEST
    [left] = tmp_path.glob(".layerskip.json.*")
    write_defaults(tmp_path, DraftDefaults(1, 8))
    assert left.exists()  # it may be another's that is at work
    os.utime(left, (1, 1))
    write_defaults(tmp_path, DraftDefaults(1, 9))
    assert [path.name for path in tmp_path.iterdir()] == ["layerskip.json"]
    assert find_defaults(tmp_path, tmp_path, CONFIG) == DraftDefaults(1, 9)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    def no_room(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    write_defaults(tmp_path, BEST)
    write_draft_vocab(tmp_path / "vocab.json", [1, 2])
    monkeypatch.setattr(Path, "write_text", no_room)
    for write in (
        lambda: write_defaults(tmp_path, DraftDefaults(1, 7)),
        lambda: write_draft_vocab(tmp_path / "vocab.json", [3]),
    ):
        with pytest.raises(OSError, match="No space"):
            write()
    assert find_defaults(tmp_path, tmp_path, CONFIG) == BEST and read_draft_vocab(tmp_path / "vocab.json") == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layerskip.json", "vocab.json"]


def test_the_users_own_go_before_those_that_came_with_a_model(tmp_path):
    (tmp_path / "layerskip.json").write_text('{"exit_layer": 1, "num_speculations": 8}')
    assert find_defaults("owner/model", tmp_path, CONFIG) == DraftDefaults(1, 8)
    path = write_defaults("owner/model", BEST)
    assert find_defaults("owner/model", tmp_path, CONFIG) == BEST
    path.unlink()
