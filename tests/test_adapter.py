"""LoRA adapters beside a base model, and checkpoints by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import HF_CONFIG
from safetensors.torch import save_file
from torch import Tensor

from layerskip_kernels import loading
from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.llama_tensors import tensor_shapes
from layerskip_kernels.loading import read_checkpoint, shipped_checkpoints

NAME = "model.layers.1.self_attn.k_proj"
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "use_rslora": False}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(loading.ModelConfig.from_hf(HF_CONFIG))
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_adapter(folder: Path, base: Path, tensors: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    folder.mkdir()
    fields = {**SETTINGS, "base_model_name_or_path": str(base), **settings}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(pair() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def pair(a: tuple[int, int] = (2, 64), b: tuple[int, int] = (32, 2)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"A": a, "B": b}
    return {
        f"base_model.model.{NAME}.lora_{part}.weight": torch.randn(shape, generator=generator)
        for part, shape in shapes.items()
    }


FIRST, LAST = r"layers\.(0)\.\w+\.\w+", r"layers\.(1)\.\w+\.\w+"


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"r": 8, "rank_pattern": {FIRST: 4, LAST: 2}, "alpha_pattern": {LAST: 5}}, 2.5),
        ({"rank_pattern": {FIRST: 4}, "alpha_pattern": {"v_proj": 5}}, 3.0),
    ],
)
def test_adapters_are_added_before_the_one_rounding(
    tmp_path: Path, base: Path, settings: dict[str, Any], scale: float
) -> None:
    adapted = read_checkpoint(write_adapter(tmp_path / "adapted", base, **settings))
    plain = read_checkpoint(base)
    a, b = pair().values()
    expected = (plain.tensors[f"{NAME}.weight"].float() + scale * (b @ a)).bfloat16()
    assert torch.equal(adapted.tensors[f"{NAME}.weight"], expected)
    for name in plain.tensors.keys() - {f"{NAME}.weight"}:
        assert torch.equal(adapted.tensors[name], plain.tensors[name])
    assert (adapted.name, adapted.dtype, adapted.config) == ("adapted", torch.bfloat16, plain.config)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(peft_type="IA3"), UnsupportedModel, "peft_type"),
        (dict(use_dora=True), UnsupportedModel, "use_dora"),
        (dict(bias="all"), UnsupportedModel, "bias"),
        (dict(tensors={"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}), ValueError, "must hold .*lora_B"),
        (dict(tensors={name.removeprefix("base_model."): t for name, t in pair().items()}), ValueError, "must hold"),
        (dict(tensors=pair(a=(2, 63))), ValueError, rf"the adapter of {NAME}.weight has A \[2, 63\]"),
        (dict(tensors=pair(b=(31, 2))), ValueError, r"B \[31, 2\], not for \[32, 64\]"),
        (dict(base_model_name_or_path="/nowhere"), FileNotFoundError, "/nowhere"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, base: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_checkpoint(write_adapter(tmp_path / "adapted", base, **change))


def test_adapters_of_adapters_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapted"
    with pytest.raises(ValueError, match="adapters itself; merge one of them first"):
        read_checkpoint(write_adapter(folder, folder))


def test_an_adapter_for_a_weight_that_the_base_lacks_is_refused(tmp_path: Path, base: Path) -> None:
    strange = {name.replace("layers.1", "layers.7"): tensor for name, tensor in pair().items()}
    with pytest.raises(ValueError, match=r"model\.layers\.7\.self_attn\.k_proj"):
        read_checkpoint(write_adapter(tmp_path / "adapted", base, strange))


def test_a_shipped_checkpoint_is_found_by_its_name(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SHIPPED", tmp_path)
    assert shipped_checkpoints() == ["base"]
    monkeypatch.chdir(tmp_path / "base")  # where no folder has that name
    assert read_checkpoint("base").name == "base"
    with pytest.raises(FileNotFoundError, match="nor one of SmolLM2-135M-Instruct, base"):
        read_checkpoint("another")
