"""Trainings from a YAML file: what the recipe is for, exact resume, several processes, adapters."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from layerskip_kernels import GenerationConfig, generate, load_model
from layerskip_kernels.cli import main as cli
from layerskip_kernels.machine import usable_cores
from layerskip_kernels.recipes.card import acceptance, write_card
from layerskip_kernels.training.config import read_config
from layerskip_kernels.training.export import export_adapter
from layerskip_kernels.training.run import build_trainer, train
from layerskip_kernels.training.trainer import last_checkpoint
from support.training import LETTERS, sentence, write_config

pytestmark = pytest.mark.usefixtures("one_thread")

# One layer of six drafts. Its own loss alone would do; dropout is there because it is half of the recipe.
RECIPE = {
    "layer_dropout": {"p_max": 0.1},
    "early_exit": {"weights": {1: 1.0, 6: 1.0}, "distillation": 0.5},
}


def drafts_accepted(model: Any) -> float:
    rng = random.Random(1)
    prompts = [sentence(rng)[:20] for _ in range(4)]
    config = GenerationConfig(exit_layer=1, num_speculations=4, max_new_tokens=40, eos_token_ids=())
    generations = generate(model, prompts, config)
    return sum(g.accepted for g in generations) / sum(g.drafted for g in generations)


def test_the_recipe_makes_drafts_acceptable(tmp_path: Path) -> None:
    rates, losses = {}, {}
    for name, recipe in (("with", RECIPE), ("without", {})):
        (tmp_path / name).mkdir()
        config = read_config(write_config(tmp_path / name, **recipe))
        folder = train(config)
        assert folder is not None
        trainer = build_trainer(config)
        trainer.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        losses[name] = trainer.evaluate()["eval_loss"]
        rates[name] = drafts_accepted(load_model(folder))
    assert rates["with"] > 0.9
    assert rates["without"] < rates["with"] - 0.3
    assert max(losses.values()) < 1.0  # of ln 26 = 3.26: both have learnt the language


def test_interrupted_and_resumed_is_never_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: weights, moments of the optimizer, and the losses on the way."""
    steps = {"max_steps": 12, "logging_steps": 1, "seed": 3}
    recipe = {**RECIPE, "early_exit": {**RECIPE["early_exit"], "draft_steps": 2}}
    folders = {name: tmp_path / name for name in ("whole", "parts")}
    for folder in folders.values():
        folder.mkdir()
    whole = read_config(write_config(folders["whole"], **recipe, training={**steps, "save_steps": 12}))
    train(whole)

    # the moment at which the first SIGTERM comes, and a kill that leaves half a checkpoint behind
    parts = read_config(write_config(folders["parts"], **recipe, training={**steps, "save_steps": 12}))
    terminate_at(5, monkeypatch)
    assert train(parts) is None
    assert last_checkpoint(Path(parts.output_dir)).name == "checkpoint-5"
    (Path(parts.output_dir) / "checkpoint-9").mkdir()
    terminate_at(8, monkeypatch)
    assert train(parts) is None
    monkeypatch.undo()
    train(parts)

    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        ours, theirs = (Path(config.output_dir) / "checkpoint-12" / name for config in (parts, whole))
        assert_equal(load(ours), load(theirs), name)
    assert logged(parts.output_dir) == logged(whole.output_dir)


def terminate_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to this process within a training step."""
    from layerskip_kernels.training.trainer import LayerSkipTrainer

    original = LayerSkipTrainer.plan

    def plan(self: LayerSkipTrainer, at: int, rows: int) -> Any:
        if at == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, at, rows)

    monkeypatch.undo()
    monkeypatch.setattr(LayerSkipTrainer, "plan", plan)


def load(path: Path) -> Any:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def assert_equal(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}, {key}")
    else:
        assert ours == theirs, where


def logged(output_dir: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("epoch", "time")} for line in lines if "loss" in line]


def test_a_grown_model_starts_as_the_one_it_grew_from(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    path = write_config(tmp_path / "small", training={"max_steps": 3})
    small = train(read_config(path))
    model = yaml.safe_load(path.read_text())["model"]
    grown = {**model, "sizes": {**model["sizes"], "num_hidden_layers": 8}, "grown_from": str(small)}
    trainer = build_trainer(read_config(write_config(tmp_path, model=grown, eval_exits=[6])))
    metrics = trainer.evaluate()
    assert metrics["eval_loss_exit_8"] == metrics["eval_loss_exit_6"]
    assert metrics["eval_agreement_exit_6"] == 1.0
    exported = load_file(small / "model.safetensors")
    ours = trainer.model.state_dict()
    assert all(torch.equal(ours[name].bfloat16(), tensor) for name, tensor in exported.items())
    ours["model.layers.7.mlp.down_proj.weight"].fill_(0.1)
    assert trainer.evaluate()["eval_loss_exit_8"] != metrics["eval_loss_exit_8"]

    wider = {**grown, "sizes": {**grown["sizes"], "hidden_size": 48}}
    with pytest.raises(ValueError, match=r"model.grown_from: model.embed_tokens.weight is \[\d+, 32\] there"):
        build_trainer(read_config(write_config(tmp_path, model=wider)))


def test_draft_steps_learn_from_the_text_alone(tmp_path: Path) -> None:
    recipe = {"early_exit": {"weights": {1: 1.0, 6: 1.0}, "distillation": 0.5, "draft_steps": 2}}
    trainer = build_trainer(read_config(write_config(tmp_path, **recipe)))
    plans = [trainer.plan(step, rows=8) for step in range(4)]
    assert [plan.weights for plan in plans] == [{0: 0.5, 5: 0.5}, {0: 1.0}, {0: 1.0}, {0: 0.5, 5: 0.5}]
    assert [plan.distillation for plan in plans] == [0.5, 0.0, 0.0, 0.5]


def test_exits_choose_from_the_draft_vocabulary_and_the_trained_model_says_so(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"weights": {1: 1.0, 6: 1.0}, "draft_vocab": "some.json"}  # beside the config
    path = write_config(tmp_path, early_exit=recipe, training={"max_steps": 2})
    for contents in ("[3, 300]", "[]"):
        (tmp_path / "some.json").write_text(contents)
        with pytest.raises(ValueError, match=r"early_exit\.draft_vocab: .*some\.json must hold token ids in 0\.\."):
            build_trainer(read_config(path))
    (tmp_path / "some.json").write_text("[3, 5, 8]")
    assert build_trainer(read_config(path)).plan(0, rows=8).draft_vocab.tolist() == [3, 5, 8]
    trained = load_model(train(read_config(path)))
    assert trained.draft_ids.tolist() == [3, 5, 8]
    assert (trained.defaults.exit_layer, trained.defaults.num_speculations) == (1, 4)
    with pytest.raises(ValueError, match=r"early_exit\.draft_vocab needs early_exit\.weights"):
        read_config(write_config(tmp_path, early_exit={"draft_vocab": "some.json"}))


def test_an_anchor_is_for_adapters(tmp_path: Path) -> None:
    recipe = {"weights": {1: 1.0, 6: 1.0}, "anchor": 0.5}
    with pytest.raises(ValueError, match=r"early_exit\.anchor needs lora"):
        read_config(write_config(tmp_path, early_exit=recipe))
    trainer = build_trainer(read_config(write_config(tmp_path, early_exit=recipe, lora={"rank": 2})))
    assert trainer.plan(0, rows=8).anchor == 0.5
    with pytest.raises(ValueError, match=r"early_exit\.anchor must be at least 0"):
        read_config(write_config(tmp_path, early_exit={"anchor": -1.0}))


def test_evaluation_drops_nothing(tmp_path: Path) -> None:
    losses = []
    for p_max in (0.0, 0.9):
        trainer = build_trainer(read_config(write_config(tmp_path, layer_dropout={"p_max": p_max})))
        losses.append(trainer.evaluate()["eval_loss_exit_1"])
        trainer.state.max_steps = 10
        assert trainer.plan(0, rows=8).dropped.any() == (p_max > 0.0)
    assert losses[0] == losses[1]


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """gloo, the same global batch: the same samples are dropped; loss and weights agree but for the order of sums."""
    common = {"max_steps": 4, "logging_steps": 1, "save_steps": 4, "seed": 3}
    recipe = {**RECIPE, "layer_dropout": {"p_max": 0.5, "group": 4}}
    configs = {}
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        training = {**common, "per_device_train_batch_size": 8 // processes}
        configs[processes] = write_config(tmp_path / str(processes), **recipe, training=training)
    train(read_config(configs[1]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "layerskip_kernels.cli", "train", str(configs[2]), "--threads", "1"]
    for _ in range(2):  # torchrun's port may be taken by somebody else between its choice and its use
        ran = subprocess.run(
            command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120
        )
        if ran.returncode == 0:
            break
        shutil.rmtree(tmp_path / "2" / "run", ignore_errors=True)
    assert ran.returncode == 0, ran.stderr

    one, two = (logged(str(path.parent / "run")) for path in configs.values())
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in one], rel=1e-4)
    ours, theirs = (load_file(path.parent / "run/checkpoint-4/model.safetensors") for path in configs.values())
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def test_adapters_load_as_they_were_trained(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base = train(read_config(write_config(tmp_path / "base", training={"max_steps": 2})))
    pairs = [{"prompt": f"{letter} ->", "completion": f" {letter.upper()}"} for letter in LETTERS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    changes = {
        "model": {"source": str(base)},
        "data": {"train": ["pairs.jsonl"], "validation": ["pairs.jsonl"], "sequence_length": 16},
        "lora": {"rank": 4, "alpha": 8, "early_layers": 2, "early_rank": 6, "early_alpha": 3},
        "training": {"max_steps": 20, "save_steps": 20, "learning_rate": 3e-2},
    }
    config = read_config(write_config(tmp_path, **RECIPE, **changes))
    trainer = build_trainer(config)
    before = trainer.evaluate()["eval_loss"]
    folder = train(config)
    assert folder is not None
    kept = {"adapter_config.json", "adapter_model.safetensors", "layerskip.json", "prompts.jsonl"}
    assert {path.name for path in folder.iterdir()} == kept

    trained = build_trainer(config)
    trained._load_from_checkpoint(str(last_checkpoint(Path(config.output_dir))))
    assert trained.evaluate()["eval_loss"] < before - 0.3
    with torch.no_grad():
        tokens = load_model(folder).tokenizer.encode("q ->")
        theirs = trained.model.eval()(torch.tensor([tokens])).logits[0, -1]
    export_adapter(trained.model, str(base), folder, torch.float32)
    torch.testing.assert_close(next_logits(folder, tokens), theirs, rtol=1e-4, atol=1e-4)
    assert (next_logits(base, tokens) - theirs).abs().max() > 0.1  # the adapters are what made the difference

    changes["lora"] |= {"grown_from": str(folder), "transplants": [{"head": [1, 0], "to": [0, 0]}]}
    with pytest.raises(ValueError, match="transplants or grown_from, not both"):
        read_config(write_config(tmp_path, **changes))
    del changes["lora"]["transplants"]
    grown = build_trainer(read_config(write_config(tmp_path, **changes, output_dir="grown")))
    assert grown.evaluate()["eval_loss"] == pytest.approx(trained.evaluate()["eval_loss"], rel=1e-4)


def next_logits(source: Path, tokens: list[int]) -> torch.Tensor:
    config = GenerationConfig("autoregressive", max_new_tokens=1, return_logits=True)
    logits = generate(load_model(source, torch.float32), [tokens], config)[0].logits
    assert logits is not None
    return logits[0]


def test_a_card_tells_what_was_measured(tmp_path: Path) -> None:
    path = write_config(
        tmp_path, training={"max_steps": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    )
    folder = train(read_config(path))
    assert folder is not None
    sources = {"circles": {"version": "1.10", "licence": "MIT", "characters": 2_000_000}}
    (tmp_path / "sources.json").write_text(json.dumps(sources))
    text = write_card(folder, [path], tmp_path / "sources.json", ["a b c", "f g h"])
    assert (folder / "README.md").read_text() == text
    model = load_model(folder)
    figures = acceptance(model, ["a b c", "f g h"], 1, 4)
    assert f"| 1 of 6 | 4 | {figures['acceptance_rate']:.1%} | {figures['tokens_per_cycle']:.2f} |" in text
    parameters = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert f"A Llama of {parameters / 1e6:.1f} million parameters" in text
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-2])
    assert f"| 6 | {last['eval_loss_exit_6']:.3f} | 100.0% |" in text
    assert "toy: 4 steps of 8 rows" in text and "- **MIT**: circles 1.10" in text


def test_the_command_trains_and_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, training={"max_steps": 2})
    assert cli.main(["train", str(path)]) == 0
    assert f"layerskip generate --model {tmp_path / 'run/toy'}" in capsys.readouterr().out
    assert cli.main(["train", str(path), "--export", str(tmp_path / "copy")]) == 0
    assert "checkpoint-2 written to" in capsys.readouterr().out
    copy, trained = (tmp_path / name / "model.safetensors" for name in ("copy", "run/toy"))
    assert copy.read_bytes() == trained.read_bytes()
    for change, message in (
        ({"early_exit": {"rotations": 3}}, "early_exit has no field 'rotations'"),
        ({"layer_dropout": {"p_max": 1.5}}, "layer_dropout.p_max must be in"),
        ({"model": {}}, "model must have either source"),
        ({"lora": 3}, "lora must be a mapping"),
    ):
        assert cli.main(["train", str(write_config(tmp_path, **change))]) == 2
        assert message in capsys.readouterr().err


def test_the_log_begins_with_where_it_ran(tmp_path: Path) -> None:
    train(read_config(write_config(tmp_path, training={"max_steps": 1})))
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert (first["step"], first["device"], first["processes"]) == (0, f"{usable_cores()} CPU cores", 1)
