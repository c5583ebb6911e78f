"""LoRA adapters beside a base model, and checkpoints by name."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.model import sources
from layerskip_kernels.model.hf_config import read_hf_config
from layerskip_kernels.model.json_file import JsonObject
from layerskip_kernels.model.loading import load_model, read_checkpoint
from layerskip_kernels.model.module_patterns import check_patterns, first_pattern
from layerskip_kernels.model.sources import shipped_checkpoints
from layerskip_kernels.model.tensor_names import tensor_shapes
from support.checkpoint_files import HF_CONFIG

NAME = "model.layers.1.self_attn.k_proj"
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "use_rslora": False}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(read_hf_config(HF_CONFIG))
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
        (
            dict(tensors={"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}),
            ValueError,
            "neither .*lora_B|other half",
        ),
        (dict(tensors={name.removeprefix("base_model."): t for name, t in pair().items()}), ValueError, "neither"),
        (dict(tensors=pair(a=(2, 63))), ValueError, rf"the adapter of {NAME}.weight in .* has A \[2, 63\]"),
        (dict(tensors=pair(b=(31, 2))), ValueError, r"B \[31, 2\], not for \[32, 64\]"),
        (dict(base_model_name_or_path="/nowhere"), FileNotFoundError, "/nowhere"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, base: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_checkpoint(write_adapter(tmp_path / "adapted", base, **change))


REFUSED_FIELDS: dict[str, Any] = {
    "init_lora_weights": "pissa_niter_4",
    "bias": "lora_only",
    "lora_bias": True,
    "use_dora": True,
    "use_qalora": True,
    "use_bdlora": {"target_modules_bd_a": ["q_proj"]},
    "alora_invocation_tokens": [3],
    "trainable_token_indices": [5],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "layer_replication": [[0, 1]],
    "megatron_config": {"a": 1},
    "arrow_config": {"top_k": 3},
    "monteclora_config": {"a": 1},
    "ensure_weight_tying": True,
    "a_field_of_the_future": "on",
}


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_a_field_that_may_change_the_formula_is_refused_by_name(tmp_path: Path, base: Path, field: str) -> None:
    folder = write_adapter(tmp_path / "adapted", base, **{field: REFUSED_FIELDS[field]})
    with pytest.raises(UnsupportedModel, match=rf"adapter_config\.json: {field} is .*merge_and_unload"):
        read_checkpoint(folder)


@pytest.mark.parametrize("start", ["olora", "corda", "loftq", "lora_ga", "mica", "new", ["pissa"], 3])
def test_starts_that_change_the_base_are_refused(tmp_path: Path, base: Path, start: object) -> None:
    with pytest.raises(UnsupportedModel, match="init_lora_weights"):
        read_checkpoint(write_adapter(tmp_path / "adapted", base, init_lora_weights=start))


def test_what_peft_writes_by_default_is_harmless(tmp_path: Path, base: Path) -> None:
    from peft import LoraConfig

    settings = LoraConfig(
        r=2, lora_alpha=6, lora_dropout=0.1, target_modules=["k_proj"], layers_to_transform=[1],
        layers_pattern="layers", init_lora_weights="gaussian", fan_in_fan_out=True,
        exclude_modules=["x"], inference_mode=True,
    ).to_dict()  # fmt: skip
    settings |= {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["k_proj"], "exclude_modules": ["x"]}
    del settings["base_model_name_or_path"]
    adapted = read_checkpoint(write_adapter(tmp_path / "peft", base, **settings))
    plain = read_checkpoint(write_adapter(tmp_path / "plain", base))
    assert torch.equal(adapted.tensors[f"{NAME}.weight"], plain.tensors[f"{NAME}.weight"])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("r", None, "lacks the field 'r'"),
        ("r", 0, "r must be an integer in 1..65536, got 0"),
        ("r", -2, "r must be an integer"),
        ("r", [2], "r must be an integer"),
        ("r", 10**39, "r must be an integer"),
        ("lora_alpha", None, "lacks the field 'lora_alpha'"),
        ("lora_alpha", "6", "lora_alpha must be a positive number"),
        ("lora_alpha", 10**39, "lora_alpha must be a positive number"),
        ("use_rslora", 1, "use_rslora must be true or false"),
        ("rank_pattern", [1], "rank_pattern must be a JSON object"),
        ("rank_pattern", {"k_proj": 0}, "rank_pattern: k_proj must be an integer"),
        ("alpha_pattern", {"k_proj": "x"}, "alpha_pattern: k_proj must be a positive number"),
        ("rank_pattern", {"(": 1}, r"the pattern '\(' is not read here"),
        ("rank_pattern", {"a" * 501: 1}, "has more than 500 characters"),
        ("base_model_name_or_path", None, "base_model_name_or_path must be the model"),
        ("base_model_name_or_path", "", "base_model_name_or_path must be the model"),
        ("base_model_name_or_path", 5, "base_model_name_or_path must be a string"),
        ("revision", 5, "revision must be a string"),
        ("r", 4, "has rank 2, but .*adapter_config.json says 4"),
    ],
)
def test_a_bad_setting_is_named_with_its_file(tmp_path: Path, base: Path, field: str, value: object, said: str) -> None:
    folder = write_adapter(tmp_path / "adapted", base, **{field: value})
    with pytest.raises(ValueError, match=rf"adapter_config\.json.*{said}|{said}") as error:
        read_checkpoint(folder)
    assert "adapter_config.json" in str(error.value) and len(str(error.value)) < 400


PATTERNS = [
    "k_proj", "self_attn.k_proj", "proj", "model.layers.1.self_attn.k_proj", "^self_attn.k_proj", "^model.*", "k.proj",
    r"layers\.(0|1)\.\w+\.\w+", r"layers\.(0|2)\..*", r"(.*\.)?k_proj", r"layers\.\d+\.self_attn\.[kv]_proj",
    r"(?:self_attn|mlp)\.(k_(proj|x)|up_proj)", "k_proj|v_proj", "v_proj|o_proj",
    r"l?a?y?e?rs\.1\..+", "k_proj$",
    r".*\..*\..*\..*", "x*k_proj", "x+k_proj", r"(self_attn\.)?k_proj", r"\w+", r"[\w.]+", "[a-z_]+", ".",
    "[^q]_proj", "k_pro", "",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_peft(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    patterns = JsonObject("f", {pattern: 1})
    for module in (NAME, NAME.replace("k_proj", "q_proj"), "model.layers.0.mlp.up_proj", "k_proj", "lm_head"):
        theirs = get_pattern_key([pattern], module)
        try:
            check_patterns(patterns, 1)
            ours = first_pattern(patterns, module)
        except ValueError:
            assert pattern == r"[\w.]+"
        else:
            assert (ours is not None) == (theirs != module or pattern == module), module


@pytest.mark.parametrize(
    "pattern",
    [
        "([a-z_.0-9]+)+!",
        "(a*)*",
        "((((a?){99}){99}){99}){99}",
        "(a|b)+",
        "(",
        "a)",
        "[",
        "[z-a]",
        "a{9}",
        "**",
        "(?=a)",
        "\\1",
    ],
)
def test_patterns_that_could_run_for_ever_or_are_broken_are_refused(tmp_path: Path, base: Path, pattern: str) -> None:
    folder = write_adapter(tmp_path / "adapted", base, rank_pattern={pattern: 1})
    with pytest.raises(
        ValueError, match=r"adapter_config\.json: rank_pattern: the pattern .* is not read here"
    ) as error:
        read_checkpoint(folder)
    assert repr(pattern) in str(error.value)


def test_patterns_take_time_in_proportion_to_their_length() -> None:
    patterns = JsonObject("f", {".*" * 200 + "Z": 1, "(a|.)" * 90 + "Z": 1, "(.?.?.?" * 50 + ")" * 50 + "Z": 1})
    start = time.monotonic()
    check_patterns(patterns, 1)
    assert first_pattern(patterns, NAME * 3) is None
    assert time.monotonic() - start < 10
    with pytest.raises(ValueError, match=r"f has too many patterns \(3\) for 10000 modules"):
        check_patterns(patterns, 10_000)


@pytest.mark.parametrize(
    "name",
    [
        "lora_B.bias",
        "lora_embedding_A",
        "lora_magnitude_vector.weight",
        "lora_A.default.weight",
        "token_adapter.trainable_tokens_delta",
    ],
)
def test_every_tensor_is_used_or_refused_by_name(tmp_path: Path, base: Path, name: str) -> None:
    strange = f"base_model.model.{NAME}.{name}"
    folder = write_adapter(tmp_path / "adapted", base, pair() | {strange: torch.zeros(2, 64)})
    with pytest.raises(ValueError, match=rf"tensor '{strange}' in .*merge_and_unload"):
        read_checkpoint(folder)


def test_a_half_alone_and_ranks_that_differ_are_named(tmp_path: Path, base: Path) -> None:
    a, b = pair().items()
    with pytest.raises(ValueError, match=r"lora_A.weight.* lacks its other half"):
        read_checkpoint(write_adapter(tmp_path / "half", base, dict([a])))
    with pytest.raises(ValueError, match=r"lora_A.weight.* has shape \(3, 64\), its lora_B \(32, 2\)"):
        read_checkpoint(write_adapter(tmp_path / "ranks", base, dict([(a[0], torch.zeros(3, 64)), b])))


def test_adapters_of_fused_projections_are_those_of_their_parts(tmp_path: Path, base: Path) -> None:
    """Of Phi-3's, whose logits tests/model/test_families.py compares with PEFT's."""
    fused = f"base_model.model.{NAME.replace('k_proj', 'qkv_proj')}"
    q, kv = 64, 32
    halves = {f"{fused}.lora_A.weight": torch.randn(2, 64), f"{fused}.lora_B.weight": torch.randn(q + 2 * kv, 2)}
    found = read_checkpoint(write_adapter(tmp_path / "fused", base, halves), torch.float32).tensors
    plain, (a, b) = read_checkpoint(base, torch.float32).tensors, halves.values()
    for name, rows in zip("qkv", b.split([q, kv, kv]), strict=True):
        name = f"{NAME.replace('k_proj', f'{name}_proj')}.weight"
        assert torch.equal(found[name], plain[name] + 3.0 * (rows @ a))
    with pytest.raises(ValueError, match=rf"second adapter of {NAME}\.weight; merge"):
        read_checkpoint(write_adapter(tmp_path / "both", base, halves | pair()))
    halves[f"{fused}.lora_B.weight"] = torch.zeros(q + kv, 2)
    with pytest.raises(ValueError, match=r"qkv_proj.lora_B.weight.* has shape \(96, 2\), expected 128 rows"):
        read_checkpoint(write_adapter(tmp_path / "rows", base, halves))


def test_whole_weights_replace_those_of_the_base(tmp_path: Path, base: Path) -> None:
    """As PEFT saves modules_to_save, and the base layer of an adapted head."""
    value = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    whole = f"base_model.model.{NAME}.base_layer.weight"
    both = read_checkpoint(write_adapter(tmp_path / "both", base, pair() | {whole: value}, modules_to_save=["k_proj"]))
    a, b = pair().values()
    assert torch.equal(both.tensors[f"{NAME}.weight"], (value + 3.0 * (b @ a)).bfloat16())
    alone = read_checkpoint(write_adapter(tmp_path / "alone", base, {f"base_model.model.{NAME}.weight": value}))
    assert torch.equal(alone.tensors[f"{NAME}.weight"], value.bfloat16())


def test_a_whole_weight_that_does_not_fit_is_refused(tmp_path: Path, base: Path) -> None:
    """New tokens; and an embedding that is the head, too, of which PEFT would replace one alone."""
    embedding = "base_model.model.model.embed_tokens.weight"
    for rows, said in ((97, r"has shape \(97, 64\), the base \(96, 64\)"), (96, "uses as its head, too")):
        folder = write_adapter(tmp_path / str(rows), base, {embedding: torch.zeros(rows, 64)})
        with pytest.raises(ValueError, match=rf"tensor '{embedding}' in .*{said}.*merge"):
            read_checkpoint(folder)


def test_a_base_that_is_gone_is_named_with_the_field(tmp_path: Path, base: Path) -> None:
    folder = write_adapter(tmp_path / "adapted", base, base_model_name_or_path="/home/someone/llama")
    with pytest.raises(
        FileNotFoundError, match=r"adapter_config\.json: base_model_name_or_path: .*'/home/someone/llama'"
    ):
        read_checkpoint(folder)


def test_pickled_adapters_are_not_read(tmp_path: Path, base: Path) -> None:
    folder = write_adapter(tmp_path / "adapted", base)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"pickled adapters \(adapter_model.bin\) are not read: .* save_pretrained"
    ):
        read_checkpoint(folder)


def test_adapters_and_their_base_by_hub_id(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    adapted = write_adapter(tmp_path / "local", base, base_model_name_or_path="owner/base", revision="v2")
    for name, files, branch in (("base", base, "v2"), ("adapters", adapted, "main")):
        repository = tmp_path / "hub" / f"models--owner--{name}"
        shutil.copytree(files, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / branch).write_text("0" * 40)
    hub, local = read_checkpoint("owner/adapters"), read_checkpoint(write_adapter(tmp_path / "plain", base))
    assert hub.name == "owner/adapters"
    assert torch.equal(hub.tensors[f"{NAME}.weight"], local.tensors[f"{NAME}.weight"])


def test_adapters_on_demand_are_the_same(tmp_path: Path, base: Path) -> None:
    folder = write_adapter(tmp_path / "adapted", base)
    at_once, lazy = read_checkpoint(folder), read_checkpoint(folder, on_demand=True)
    assert lazy.tensors[f"{NAME}.weight"].is_meta and lazy.tensors.keys() == at_once.tensors.keys()
    for name in list(lazy.tensors):
        assert torch.equal(lazy.tensors.pop(name), at_once.tensors[name])
    assert not lazy.tensors


def test_adapted_weights_beyond_a_dtype_are_named_wherever_they_are(two_devices, tmp_path: Path, base: Path) -> None:
    tensors = {name: 1e3 * tensor for name, tensor in pair().items()}
    folder = write_adapter(tmp_path / "adapted", base, tensors)
    said = rf"tensor '{NAME}\.weight' with the adapters of {folder} has values beyond the range of torch\.float16"
    with pytest.raises(ValueError, match=said):
        read_checkpoint(folder, torch.float16)
    with pytest.raises(ValueError, match=said):
        load_model(folder, torch.float16, backend="triton")
    assert load_model(folder, backend="triton").dtype == torch.bfloat16


def test_adapters_of_adapters_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapted"
    with pytest.raises(ValueError, match=r"its base .* is itself an adapter; merge it first"):
        read_checkpoint(write_adapter(folder, folder))


def test_an_adapter_for_a_weight_that_the_base_lacks_is_refused(tmp_path: Path, base: Path) -> None:
    strange = {name.replace("layers.1", "layers.7"): tensor for name, tensor in pair().items()}
    with pytest.raises(ValueError, match=r"model\.layers\.7\.self_attn\.k_proj"):
        read_checkpoint(write_adapter(tmp_path / "adapted", base, strange))


def test_a_shipped_checkpoint_is_found_by_its_name(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SHIPPED", tmp_path)
    assert shipped_checkpoints() == ["base"]
    monkeypatch.chdir(tmp_path / "base")  # where no folder has that name
    assert read_checkpoint("base").name == "base"
    with pytest.raises(FileNotFoundError, match=r"a hub id .*, SmolLM2-135M-Instruct, base"):
        read_checkpoint("another")


def test_a_shipped_checkpoint_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other files called config lie beside its own."""
    monkeypatch.setattr(sources, "SHIPPED", tmp_path)
    for name, own in (("whole", "config.json"), ("adapter", "adapter_config.json")):
        (tmp_path / name).mkdir()
        for file in (own, "tokenizer_config.json", "generation_config.json"):
            (tmp_path / name / file).write_text("{}")
    assert shipped_checkpoints() == ["adapter", "whole"]
