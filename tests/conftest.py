"""Switches that must be set before anything is imported, and the fixtures of all rooms."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# Kernels run on a GPU where there is one; elsewhere Triton's interpreter runs them, which must be said before it loads.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

# Processes that run tests side by side have a core each; the tests of threads ask for their number.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

import layerskip_kernels
import support.two_devices
from layerskip_kernels import Model
from layerskip_kernels.model.chat_template import ChatTemplate
from support.models import (
    ALL_INSTRUCTION_SETS,
    DTYPES,
    GPU,
    INSTRUCTION_SETS,
    ONLY_INTEGERS,
    instruction_set,
    threads,
    tiny_model,
)
from support.tokenizers import Words
from support.two_devices import TwoDevices


@pytest.fixture(scope="session", autouse=True)
def config_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a developer's own sweeps found shall not change what the tests see, nor the other way round."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("config")
        patch.setenv("XDG_CONFIG_HOME", str(folder))
        yield folder / "layerskip_kernels"


@pytest.fixture(params=DTYPES, ids=["bf16", "fp16", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[name for name in INSTRUCTION_SETS if name not in ONLY_INTEGERS])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set this machine has."""
    with instruction_set(request.param):
        yield request.param


@pytest.fixture(params=[name for name in INSTRUCTION_SETS if name != "avx512_bf16"])
def integer_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set with kernels of its own for rule 8."""
    with instruction_set(request.param):
        yield request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small matrices only wait for each other on more; and commands set the number for good."""
    with threads(1):
        yield


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Model:
    """A tiny model, which the commands load instead of the one they were asked for."""
    model = replace(tiny_model(), tokenizer=Words())
    monkeypatch.setattr(layerskip_kernels, "load_model", lambda *_: model)
    return model


CHAT_TEMPLATE = (
    "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_code() -> Model:
    """The smallest shipped checkpoint, with a chat template that it was not trained with."""
    model = layerskip_kernels.load_model("layerskip-tiny-code")
    assert model.tokenizer is not None
    model.tokenizer.chat_template = ChatTemplate(CHAT_TEMPLATE)
    return model


@pytest.fixture
def two_devices() -> Iterator[TwoDevices]:
    """The triton backend on a device of its own, which tests/support/two_devices.py pretends."""
    if GPU:
        pytest.skip("this machine has a GPU, which need not be pretended")
    with support.two_devices.two_devices() as world:
        yield world


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which kernels no test ran, which no count of skipped tests would show."""
    if missing := [name for name in ALL_INSTRUCTION_SETS if name not in INSTRUCTION_SETS]:
        terminalreporter.write_line(f"not tested, because this machine lacks them: kernels for {', '.join(missing)}")


@pytest.fixture(autouse=True)
def gradients_stay_on() -> Iterator[None]:
    """A test that leaves gradients switched off breaks whatever trains after it: the blame falls here, not there."""
    yield
    left_off = not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert not left_off, "gradients were left switched off"
