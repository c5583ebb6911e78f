"""How long a training takes is said before it starts and from its first step on; nothing of it changes the training."""

import os
import re
import subprocess
import sys

import pytest
import torch

from layerskip_kernels import machine
from layerskip_kernels.training import run
from layerskip_kernels.training.config import read_config
from layerskip_kernels.training.duration import duration
from layerskip_kernels.training.progress import announce, measured_step_seconds
from layerskip_kernels.training.run import build_trainer, train
from support.training import write_config

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_time_is_said_before_the_first_step_and_after_it(tmp_path, capsys):
    train(read_config(write_config(tmp_path, training={"max_steps": 3})))
    lines = capsys.readouterr().err.splitlines()
    before = next(i for i, line in enumerate(lines) if line.startswith("layerskip: 3 steps of 8 rows; at about "))
    after = next(i for i, line in enumerate(lines) if line.startswith("step 1 of 3; "))
    assert before < after and re.search(r"s a step, about \d+ \w+ left$", lines[after])
    assert not any(line.startswith("step 2") for line in lines)  # half a minute later


def test_the_estimate_changes_nothing(tmp_path):
    recipe = {"early_exit": {"weights": {1: 1.0, 6: 1.0}, "draft_steps": 2}, "layer_dropout": {"p_max": 0.5}}
    trainer = build_trainer(read_config(write_config(tmp_path, **recipe)))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    random = torch.random.get_rng_state()
    assert measured_step_seconds(trainer) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.state.global_step == 0 and not trainer._exit_losses


def test_steps_are_those_that_are_left(tmp_path, capsys):
    trainer = build_trainer(read_config(write_config(tmp_path, training={"max_steps": 10})))
    announce(trainer, steps_done=7)
    assert "layerskip: 3 steps of 8 rows; " in capsys.readouterr().err


def test_epochs_are_counted_in_steps(tmp_path):
    epochs = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    trainer = build_trainer(read_config(write_config(tmp_path, training=epochs)))
    trainer.train()
    assert trainer.num_training_steps() == trainer.state.max_steps > 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 second"), (40, "40 seconds"), (725, "12 minutes"), (9000, "2.5 hours"), (300_000, "3.5 days")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# ---- bf16 ----


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu avx2 fma", False),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("Features\t: fp asimd", False),
        ("", True),
    ],
)
def test_bf16_units_are_found(cpuinfo, expected):
    assert machine.has_bf16_units(cpuinfo) is expected


@pytest.mark.parametrize("has_units", [False, True])
def test_bf16_is_switched_off_where_it_would_be_emulated(tmp_path, capsys, monkeypatch, has_units):
    monkeypatch.setattr(run, "has_bf16_units", lambda: has_units)
    trainer = build_trainer(read_config(write_config(tmp_path, training={"bf16": True, "use_cpu": True})))
    assert trainer.args.bf16 is has_units
    assert ("layerskip: bf16 is off: this processor has no" in capsys.readouterr().err) is not has_units


# ---- other versions of Transformers ----


def test_a_training_uses_nothing_that_is_deprecated(tmp_path):
    """Warnings that name our own files, or say that a call of theirs will go, are errors."""
    path = write_config(tmp_path, training={"max_steps": 1}, early_exit={"weights": {1: 1.0, 6: 1.0}})
    code = (
        "import sys, warnings\nfrom layerskip_kernels.cli.main import main\n"
        "warnings.filterwarnings('error', category=FutureWarning)\n"
        "warnings.filterwarnings('error', category=DeprecationWarning, module='layerskip_kernels')\n"
        "sys.exit(main(['train', sys.argv[1], '--threads', '1']))"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


def test_a_precision_does_not_reach_the_next_training(tmp_path, monkeypatch):
    """Transformers 4 writes it into the environment, for the process and all that it starts."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr("layerskip_kernels.training.run.has_bf16_units", lambda: True)
    found = []
    for bf16 in (True, False):
        trainer = build_trainer(read_config(write_config(tmp_path, training={"bf16": bf16})))
        found.append(trainer.accelerator.mixed_precision)
        assert "ACCELERATE_MIXED_PRECISION" not in os.environ
    assert found == ["bf16", "no"]
