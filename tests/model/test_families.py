"""Every family against Transformers on the same random weights; the same bits on every backend; and its switches, each
of which a family's entry cannot lack."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from layerskip_kernels import GenerationConfig, Model, ModelConfig, generate, load_model
from layerskip_kernels.decoding.exits import each_exit
from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.model.families import FAMILIES
from layerskip_kernels.model.hf_config import read_hf_config
from layerskip_kernels.model.loading import read_checkpoint
from support.families import SIZES, VARIANTS, transformers_model
from support.models import DTYPES, INSTRUCTION_SETS, instruction_set, random_tokens

PLAIN = GenerationConfig("autoregressive", max_new_tokens=64, eos_token_ids=(), return_logits=True)
PROMPT = random_tokens(270)  # longer than a chunk of attention and than all windows


@pytest.fixture(scope="module", params=VARIANTS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A variant's name, its folder, and Transformers' model."""
    folder = tmp_path_factory.mktemp("family")
    return request.param, folder, transformers_model(request.param, folder)


def test_logits_and_greedy_tokens_are_those_of_transformers(family: tuple[str, Path, Any]):
    _, folder, theirs = family
    [ours] = generate(load_model(folder, torch.float32), [PROMPT], PLAIN)
    with torch.no_grad():
        logits = theirs(torch.tensor([PROMPT + ours.token_ids[:-1]])).logits[0, len(PROMPT) - 1 :]
    assert logits.std() > 0.5, "the logits must spread for this to mean something"
    assert (logits - ours.logits).abs().max() < 1e-3
    assert logits.argmax(dim=1).tolist() == ours.token_ids


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cpu_gives_the_bits_of_the_reference(family: tuple[str, Path, Any], dtype: torch.dtype):
    _, folder, _ = family
    config = dataclasses.replace(PLAIN, max_new_tokens=5, return_kv=True)
    [expected] = generate(load_model(folder, dtype, "reference"), [PROMPT], config)
    model = load_model(folder, dtype)
    for name in INSTRUCTION_SETS:
        with instruction_set(name):
            [got] = generate(model, [PROMPT], config)
        assert torch.equal(got.logits, expected.logits), name
        assert all(map(torch.equal, got.kv, expected.kv)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_speculative_decoding_is_plain_decoding_at_every_exit(family: tuple[str, Path, Any], dtype: torch.dtype):
    _, folder, _ = family
    model = load_model(folder, dtype)
    config = dataclasses.replace(PLAIN, max_new_tokens=24, return_kv=True)
    [plain] = generate(model, [PROMPT], config)
    for exit_layer in range(1, model.config.num_layers):
        drafting = dataclasses.replace(config, strategy="self_speculative", exit_layer=exit_layer, num_speculations=3)
        [drafted] = generate(model, [PROMPT], drafting)
        assert drafted.token_ids == plain.token_ids
        assert torch.equal(drafted.logits, plain.logits)
        assert all(map(torch.equal, drafted.kv, plain.kv))
        assert drafted.drafted > 0


def test_quantised_weights_have_the_bits_of_the_reference(family: tuple[str, Path, Any]):
    _, folder, _ = family
    config = dataclasses.replace(PLAIN, max_new_tokens=3)
    models = [load_model(folder, torch.bfloat16, backend, "int8") for backend in ("reference", "cpu")]
    expected, got = (generate(model, [PROMPT[:40]], config)[0].logits for model in models)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("variant", ["gemma2", "granite", "olmo2"])
def test_what_asks_the_head_outside_the_passes_says_the_same(variant: str, tmp_path: Path):
    """Lens and quality through each_exit, an early exit alone, and sampled drafts, which draft token by token."""
    transformers_model(variant, tmp_path)
    model = load_model(tmp_path, torch.bfloat16)
    [plain] = generate(model, [PROMPT[:40]], dataclasses.replace(PLAIN, max_new_tokens=8))
    text = PROMPT[:40] + plain.token_ids[:-1]
    *_, last = each_exit(model, text, 39)
    assert torch.equal(last.logits, plain.logits)
    early = dataclasses.replace(PLAIN, strategy="early_exit", exit_layer=2, max_new_tokens=1)
    [shallow] = each_exit(model, PROMPT[:40], 39, [2])
    assert generate(model, [PROMPT[:40]], early)[0].token_ids == shallow.tokens.tolist()
    sampled = dataclasses.replace(PLAIN, max_new_tokens=12, temperature=0.9, seed=3)
    drafting = dataclasses.replace(sampled, strategy="self_speculative", exit_layer=3, num_speculations=3)
    one, other = (generate(model, [PROMPT[:40]], config)[0] for config in (sampled, drafting))
    assert one.token_ids == other.token_ids and torch.equal(one.logits, other.logits)
    assert other.accepted > 0


@pytest.mark.parametrize("variant", ["qwen2", "olmo2", "phi3", "gemma2"])
def test_adapters_are_those_of_peft(variant: str, tmp_path: Path):
    import peft

    theirs = transformers_model(variant, tmp_path / "base")
    fused = ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]
    targets = fused if variant == "phi3" else ["q_proj", "o_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    [ours] = generate(load_model(tmp_path / "adapter", torch.float32), [PROMPT[:9]], PLAIN)
    with torch.no_grad():
        logits = adapted(torch.tensor([PROMPT[:9] + ours.token_ids[:-1]])).logits[0, 8:]
    assert (logits - ours.logits).abs().max() < 1e-3


# ---- every switch counts ----


def _last_logits(model: Model) -> torch.Tensor:
    config = dataclasses.replace(PLAIN, max_new_tokens=1)
    return generate(model, [PROMPT[:150]], config)[0].logits


def test_a_switch_that_is_left_out_changes_the_logits(family: tuple[str, Path, Any]):
    """A control: the tests above would not see a switch without effect."""
    _, folder, _ = family
    expected = _last_logits(load_model(folder, torch.float32))
    plain = {field.name: field.default for field in dataclasses.fields(ModelConfig)} | {"rope_theta": 10000.0}
    config = read_checkpoint(folder).config
    switches = [name for name in plain if name not in SHARED and getattr(config, name) != plain[name]]
    for name in switches:
        checkpoint = read_checkpoint(folder, torch.float32)
        try:
            changed = dataclasses.replace(checkpoint.config, **{name: plain[name]})
            without = _last_logits(Model.from_checkpoint(dataclasses.replace(checkpoint, config=changed)))
        except (KeyError, ValueError):  # a norm that stands elsewhere; as many factors as there are frequencies
            assert name in ("norm_placement", "rotary_dim")
            continue
        assert (without - expected).abs().max() > 1e-3, name


SHARED = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("max_positions", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_ids"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_family_whose_entry_lacks_something_is_not_read_as_it_is(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without a switch, the window, the local RoPE or the scaled embedding the config is another one; without a field
    that the file uses, the file is refused by that field's name."""
    transformers_model(variant, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    name, whole = fields["model_type"], read_hf_config(fields)
    entry = FAMILIES[name]
    changes: list[dict[str, Any]] = [
        {"switches": {key: value for key, value in entry.switches.items() if key != left_out}}
        for left_out in entry.switches
        if left_out != "activation"  # which these files name
    ]
    changes += [{flag: False} for flag in ("local_rope", "scaled_embedding") if getattr(entry, flag)]
    if whole.layer_windows:
        changes.append({"has_window": None})
    for change in changes:
        monkeypatch.setitem(FAMILIES, name, dataclasses.replace(entry, **change))
        try:
            assert read_hf_config(fields) != whole, change
        except UnsupportedModel as error:
            assert error.field in ("layer_types", "rope_parameters['full_attention']"), change
    used = [field for field in entry.fields if fields.get(field) not in (None, False, 0, 1.0)]
    for field in used:
        others = tuple(other for other in entry.fields if other != field)
        monkeypatch.setitem(FAMILIES, name, dataclasses.replace(entry, fields=others))
        with pytest.raises(UnsupportedModel, match=field):
            read_hf_config(fields)


# ---- files ----


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_file_leaves_out_is_what_transformers_takes(name: str):
    from transformers import AutoConfig

    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    written = {"model_type": name, **sizes, "num_hidden_layers": 7, "num_key_value_heads": 2, "vocab_size": 200000}
    whole = AutoConfig.for_model(**written).to_dict()
    # Transformers divides a width by heads; a family whose default is a number of its own says so in to_dict.
    assert read_hf_config(written) == read_hf_config(whole)


@pytest.mark.parametrize(
    ("model_type", "fields", "named"),
    [
        ("qwen2_moe", {}, "model_type"),
        ("mixtral", {}, "model_type"),
        ("gemma3", {"vision_config": {}}, "model_type"),
        ("qwen3", {"num_experts": 8}, "num_experts"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ("qwen2", {"use_mrope": True}, "use_mrope"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("granite", {"num_local_experts": 4}, "num_local_experts"),
        ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}}, "auto_map"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
        ("smollm3", {"num_hidden_layers": 2**30}, "num_hidden_layers"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_another_model_is_refused_by_field(model_type: str, fields: dict[str, Any], named: str):
    written = {**SIZES, "num_hidden_layers": 2, "head_dim": 10, "model_type": model_type, **fields}
    with pytest.raises(UnsupportedModel, match="supported") as error:
        read_hf_config(written)
    assert named in error.value.field


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("qwen2", {"use_mrope": False, "max_window_layers": 21, "use_sliding_window": False, "sliding_window": 32768}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None}),
        ("gemma2", {"cache_implementation": "hybrid", "sliding_window_size": 4096, "hidden_act": "gelu_pytorch_tanh"}),
        ("smollm3", {"max_window_layers": 28, "use_sliding_window": False, "pretraining_tp": 2}),
        ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "embd_pdrop": 0.1}),
        ("phi3", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "attention_bias": False}),
    ],
)
def test_what_published_files_hold_beside_is_harmless(model_type: str, fields: dict[str, Any]):
    plain = {**SIZES, "head_dim": 10, "model_type": model_type}
    assert dataclasses.replace(read_hf_config(plain | fields)) == read_hf_config(plain)


def test_a_fused_tensor_of_another_shape_is_named(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    transformers_model("phi3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.gate_up_proj.weight"
    save_file({**tensors, name: tensors[name][1:].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name}.* has shape \[149, 60\], expected \[150, 60\]"):
        load_model(tmp_path)


def test_longrope_ends_where_its_other_factors_would_count(tmp_path: Path):
    transformers_model("phi3", tmp_path)
    assert read_checkpoint(tmp_path).config.max_positions == 512 < SIZES["max_position_embeddings"]
