"""What a training keeps knows what it was made from; what it hands on is whole, and says where its texts end."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import tokenizers
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from layerskip_kernels import load_model
from layerskip_kernels.cli import main as cli
from layerskip_kernels.evaluation import prompts as evaluation_prompts
from layerskip_kernels.model.defaults import read_defaults
from layerskip_kernels.training.adapt import adapt
from layerskip_kernels.training.adapter_training import AdaptSettings
from layerskip_kernels.training.config import DataConfig, read_config
from layerskip_kernels.training.examples import example_prompts
from layerskip_kernels.training.export import export_model
from layerskip_kernels.training.kept import keep, only_one, origin
from layerskip_kernels.training.materials import load_rows, load_vocabulary
from layerskip_kernels.training.run import build_trainer, train, trained_exit
from layerskip_kernels.training.text_data import train_tokenizer
from support.models import tiny_model
from support.training import write_config

pytestmark = pytest.mark.usefixtures("one_thread")


def row_lengths(folder: Path) -> set[int]:
    return {len(row["input_ids"]) for row in datasets.Dataset.from_file(str(folder / "run/data/train.arrow"))}


def data(length: int) -> dict[str, object]:
    return {"train": ["train.jsonl"], "validation": ["validation.jsonl"], "sequence_length": length}


# ---- kept things and their origins ----


def test_rows_are_made_again_where_text_length_or_vocabulary_changed(tmp_path, capsys):
    build_trainer(read_config(write_config(tmp_path)))
    assert row_lengths(tmp_path) == {64}
    arrow = tmp_path / "run/data/train.arrow"
    before = arrow.stat().st_mtime_ns

    build_trainer(read_config(write_config(tmp_path)))
    assert arrow.stat().st_mtime_ns == before and "making" not in capsys.readouterr().err

    build_trainer(read_config(write_config(tmp_path, data=data(32))))
    assert row_lengths(tmp_path) == {32}
    assert "layerskip: sequence_length changed; making " in capsys.readouterr().err

    config = read_config(write_config(tmp_path, data=data(32)))
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "zebra " * 400}) + "\n")
    build_trainer(config)
    said = capsys.readouterr().err
    assert "train.jsonl changed; making" in said and "tokenizer.json again" in said and "train.arrow again" in said
    vocabulary = tokenizers.Tokenizer.from_file(str(tmp_path / "run/tokenizer.json"))
    assert "zebra" in vocabulary.decode(datasets.Dataset.from_file(str(arrow))[0]["input_ids"])


def test_checkpoints_are_not_continued_with_other_data(tmp_path, capsys):
    steps = {"max_steps": 1, "save_steps": 1}
    train(read_config(write_config(tmp_path, training=steps)))
    weights = (tmp_path / "run/toy/model.safetensors").read_bytes()
    for change, name in (
        ({"data": data(32)}, "sequence_length"),
        ({"lora": {"rank": 2}}, "lora"),
        (
            {"model": {**yaml.safe_load((tmp_path / "config.yaml").read_text())["model"], "vocab_size": 299}},
            "vocab_size",
        ),
    ):
        path = write_config(tmp_path, training={"max_steps": 2, "save_steps": 1}, **change)
        assert cli.main(["train", str(path)]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert "checkpoint-1 belongs to a training with other data" in message and f"{name} changed" in message, message
    assert (tmp_path / "run/toy/model.safetensors").read_bytes() == weights
    more = read_config(write_config(tmp_path, training={"max_steps": 2, "save_steps": 1}))  # only longer
    train(more)
    assert (tmp_path / "run/toy/model.safetensors").read_bytes() != weights


@pytest.mark.parametrize("damage", ["cut", "no note", "cut note"])
def test_what_a_kill_left_half_made_is_made_again(tmp_path, damage):
    config = read_config(write_config(tmp_path))
    build_trainer(config)
    path = tmp_path / "run/tokenizer.json"
    whole, note = path.read_text(), path.with_name("tokenizer.json.made_from.json")
    left = path.with_name(".tokenizer.json.1.unfinished")
    if damage == "cut":
        path.rename(left)
        left.write_text(whole[:100])
        os.utime(left, (0, 0))  # long ago
    elif damage == "no note":
        path.write_text(whole[:100])
        note.unlink()
    else:
        path.write_text(whole[:100])
        note.write_text(note.read_text()[:20])
    build_trainer(config)
    assert path.read_text() == whole
    assert not list(path.parent.glob(".*.unfinished"))


@pytest.mark.parametrize("damage", ["a bit", "shorter", "a hole"])
def test_rows_that_are_not_as_they_were_written_are_made_again(tmp_path, capsys, damage):
    """Arrow's reader ends the process on some of them, and takes others for rows."""
    config = read_config(write_config(tmp_path))
    vocabulary = load_vocabulary(config)
    rows = [row["input_ids"] for row in load_rows(config, "train", vocabulary, 0)]
    path = tmp_path / "run/data/train.arrow"
    raw = bytearray(path.read_bytes())
    if damage == "a bit":
        raw[len(raw) // 2] ^= 1
    path.write_bytes(raw[: len(raw) // 2] if damage == "shorter" else raw)
    if damage == "a hole":
        os.truncate(path, 1 << 40)
    assert [row["input_ids"] for row in load_rows(config, "train", vocabulary, 0)] == rows
    assert f"its contents changed; making {path} again" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_others_are_left_alone(tmp_path):
    changes = {"save_steps": 1, "max_steps": 2}
    train(read_config(write_config(tmp_path, training=changes)))
    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "run/checkpoint-old")  # somebody's own copy
    more = read_config(write_config(tmp_path, training=changes | {"max_steps": 3}))
    for name in ("optimizer.pt", "trainer_state.json", "model.safetensors"):
        path = tmp_path / "run/checkpoint-2" / name
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        with pytest.raises(ValueError, match=rf"checkpoint-2/{name} is damaged: .*delete .*checkpoint-2 to go on"):
            train(more)
        path.write_bytes(raw)
    assert train(more) is not None and (tmp_path / "run/checkpoint-3").is_dir()


def test_a_process_killed_while_it_writes_leaves_nothing_under_the_name(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from layerskip_kernels.training.kept import keep
def make(path):
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
keep(Path(sys.argv[1]), {"files": {}}, make)
"""
    path = tmp_path / "kept.json"
    ran = subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ, timeout=60)
    assert ran.returncode == -signal.SIGKILL and not path.exists()
    keep(path, {"files": {}}, lambda unfinished: unfinished.write_text("whole"))
    keep(path, {"files": {}}, lambda unfinished: unfinished.write_text("not written again"))
    assert path.read_text() == "whole"


def test_an_origin_knows_contents_settings_and_versions(tmp_path):
    (tmp_path / "a").write_text("1")
    before = origin([tmp_path / "a"], length=3)
    assert origin([tmp_path / "a"], length=3) == before != origin([tmp_path / "a"], length=4)
    assert before["versions"]["tokenizers"] == tokenizers.__version__
    (tmp_path / "a").write_text("2")
    assert origin([tmp_path / "a"], length=3) != before


# ---- what is handed on ----


@pytest.fixture
def instruct(tmp_path) -> Path:
    """A model that ends texts in two ways, with a chat template and special tokens."""
    folder = tmp_path / "base"
    torch.manual_seed(3)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
    config = LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=300, bos_token_id=0, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    train_tokenizer(["some text to learn from"] * 3, 300, folder / "tokenizer.json")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7], "bos_token_id": 0}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!", "chat_template": "{{ messages }}"})
    )
    return folder


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}], ids=["whole", "adapters"])
def test_a_trained_model_stops_where_its_base_does(tmp_path, instruct, lora):
    changes = {"model": {"source": str(instruct)}, "early_exit": {"weights": {2: 0.5, 3: 1.0}}, "lora": lora}
    folder = train(read_config(write_config(tmp_path, **changes, training={"max_steps": 1})))
    trained = load_model(folder)
    assert trained.config.eos_token_ids == load_model(instruct).config.eos_token_ids
    assert {0, 7} <= set(trained.config.eos_token_ids)
    assert trained.defaults.exit_layer == 2
    if lora is None:
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs.chat_template == "{{ messages }}" and theirs.eos_token == "!"


def test_a_model_from_scratch_names_its_end_of_text_for_transformers(tmp_path):
    folder = train(read_config(write_config(tmp_path, training={"max_steps": 1})))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == theirs.bos_token_id == 0
    assert theirs("a b c")["input_ids"] == load_model(folder).tokenizer.encode("a b c")


@pytest.mark.parametrize(
    ("changes", "layers", "expected"),
    [
        ({"early_exit": {"weights": {2: 0.5, 4: 0.0, 6: 1.0}}, "eval_exits": [4]}, 6, 2),
        ({"early_exit": {"weights": {6: 1.0}}, "eval_exits": [4, 5]}, 6, 4),
        ({"early_exit": {"scale": 0.2}, "eval_exits": []}, 6, 2),
        ({"eval_exits": []}, 2, 1),
        ({"eval_exits": []}, 1, None),
    ],
)
def test_every_trained_folder_names_its_exit(tmp_path, changes, layers, expected):
    assert trained_exit(read_config(write_config(tmp_path, **changes)), layers) == expected


def test_the_exit_is_written_beside_the_weights(tmp_path):
    folder = train(read_config(write_config(tmp_path, training={"max_steps": 1})))
    assert read_defaults(folder / "layerskip.json", load_model(folder).config).exit_layer == 1  # eval_exits


def test_an_export_cut_short_leaves_the_folder_that_was_there(tmp_path, instruct, monkeypatch):
    model = LlamaForCausalLM.from_pretrained(instruct)
    out = tmp_path / "out"
    export_model(model, instruct / "tokenizer.json", out, source=instruct)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("layerskip_kernels.training.export.shutil.copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        export_model(model, instruct / "tokenizer.json", out, source=instruct)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    monkeypatch.undo()
    export_model(model, instruct / "tokenizer.json", out, source=instruct)
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert not out.with_name("out.unfinished").exists()


# ---- sources that are no model by themselves ----


def test_adapters_are_not_taken_for_a_model(tmp_path, capsys, instruct):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(instruct)}))
    for changes in ({}, {"lora": {"rank": 2}}):
        path = write_config(tmp_path, model={"source": str(tmp_path / "adapter")}, **changes)
        assert cli.main(["train", str(path)]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "holds adapters, not a whole model" in line and "lora.grown_from" in line


def test_texts_are_tokenised_as_the_source_reads_them(tmp_path, instruct):
    """Not cut or filled up as its tokenizer.json was last used; with BOS where tokenizer_config.json asks for it."""
    path = instruct / "tokenizer.json"
    own = tokenizers.Tokenizer.from_file(str(path))
    own.post_processor = tokenizers.processors.ByteLevel()
    own.enable_truncation(4)
    own.enable_padding(length=16, pad_id=5)
    own.save(str(path))
    settings = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|endoftext|>", "add_bos_token": True}
    (instruct / "tokenizer_config.json").write_text(json.dumps(settings))
    config = write_config(tmp_path, model={"source": str(instruct)}, data=data(48))
    (tmp_path / "train.jsonl").write_text('{"prompt": "learn from text ", "completion": "some"}\n')
    vocabulary = load_vocabulary(read_config(config))
    [row] = load_rows(read_config(config), "train", vocabulary, 0)
    prompt = load_model(instruct).tokenizer.encode("learn from text ")
    assert prompt[0] == 0 and len(prompt) > 4
    assert row["input_ids"][: len(prompt)] == prompt and 5 not in row["input_ids"] and row["input_ids"][-1] == 0

    settings["add_bos_token"] = False
    (instruct / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = load_vocabulary(read_config(config))
    assert [row["input_ids"][0] for row in load_rows(read_config(config), "train", vocabulary, 0)] == prompt[1:2]


def test_a_source_without_a_tokenizer_is_named(tmp_path, capsys, instruct):
    (instruct / "tokenizer.json").unlink()
    assert cli.main(["train", str(write_config(tmp_path, model={"source": str(instruct)}))]) == 2
    assert "model.source: " in (err := capsys.readouterr().err) and "has no tokenizer.json" in err


# ---- example prompts ----


def test_a_trained_folder_names_prompts_of_its_own_kind(tmp_path):
    folder = train(read_config(write_config(tmp_path, training={"max_steps": 1})))
    examples = evaluation_prompts.example_prompts(str(folder), 3)
    texts = [json.loads(line)["text"] for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert len(examples.prompts) == 3
    for (_, prompt), text in zip(examples.prompts, texts, strict=False):
        assert prompt and text.startswith(prompt)


def test_prompts_are_those_of_examples_or_line_starts_of_a_long_text(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "say 1 =>", "completion": " 1"}\n' * 30)
    assert example_prompts(DataConfig([str(tmp_path / "pairs.jsonl")])) == ["say 1 =>"] * 20
    lines = [f"line {i} of a long text, which has words enough" for i in range(2000)]
    (tmp_path / "long.txt").write_text("\n".join(lines))
    found = example_prompts(DataConfig(["unused"], [str(tmp_path / "long.txt")]))
    assert len(found) == 20 and all(prompt.splitlines()[0] in lines for prompt in found) and len(set(found)) == 20
    (tmp_path / "short.txt").write_text("one")
    assert example_prompts(DataConfig([str(tmp_path / "short.txt")])) == ["one"]
    (tmp_path / "empty.txt").write_text(" \n")
    assert example_prompts(DataConfig([str(tmp_path / "empty.txt")])) == []


def test_two_processes_that_make_the_same_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each writes under a name of its own: the last one wins, and nothing is mixed."""
    path = tmp_path / "train.arrow"

    def another_process() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: 7)
            keep(path, {"files": {"theirs": ""}}, lambda unfinished: unfinished.write_text("theirs"))

    def make(unfinished: Path) -> None:
        with unfinished.open("w") as file:
            file.write("ours, ")
            another_process()
            file.write("whole")

    keep(path, {"files": {"ours": ""}}, make)
    assert path.read_text() == "ours, whole"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["train.arrow", "train.arrow.made_from.json"]
    keep(path, {"files": {"ours": ""}}, lambda _: pytest.fail("it was made of the same"))


def test_two_processes_that_train_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second one is refused: both would write the same checkpoints, texts and states."""
    config, folder = write_config(tmp_path), tmp_path / "run"
    folder.mkdir()
    with only_one(folder):
        assert cli.main(["train", str(config)]) == 2
        assert f"{folder} is in use: another process trains there" in capsys.readouterr().err.splitlines()[-1]
        assert [path.name for path in folder.iterdir()] == [".lock"]
    with only_one(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        with only_one(folder):  # of the processes of one training
            pass
    (tmp_path / "adapter/training").mkdir(parents=True)
    with only_one(tmp_path / "adapter/training"), pytest.raises(ValueError, match="training is in use"):
        adapt(tiny_model(), None, tmp_path / "adapter", AdaptSettings())
