"""ModelConfig and GenerationConfig: what they accept, and what they say about the rest."""

import dataclasses
import math

import pytest

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.model.hf_config import read_hf_config
from layerskip_kernels.model_config import ModelConfig, RopeScaling

LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_SCALING = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def config_of(**changes: object) -> ModelConfig:
    return read_hf_config(LLAMA_2_7B | changes)


def test_llama_2_and_the_defaults_of_absent_fields():
    assert config_of() == ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_positions=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=RopeScaling("none"),
        tie_word_embeddings=False,
        qkv_bias=False,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_llama_3_2_with_grouped_heads_its_own_head_dim_and_tied_embeddings():
    config = config_of(num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, attention_bias=True)
    assert (config.num_kv_heads, config.head_dim) == (8, 64)
    assert config.tie_word_embeddings and config.qkv_bias and config.out_bias
    assert config.softmax_scale == 1 / math.sqrt(64)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_of().num_layers = 3  # type: ignore[misc]


@pytest.mark.parametrize(("eos", "ids"), [(2, (2,)), ([7, 31999], (7, 31999)), (None, ())])
def test_eos_is_an_int_a_list_or_null(eos: object, ids: tuple[int, ...]):
    assert config_of(eos_token_id=eos).eos_token_ids == ids


def test_bos_may_be_null():
    assert config_of(bos_token_id=None).bos_token_id is None


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING},
        {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 500000.0}},
    ],
    ids=["rope_scaling", "rope_parameters"],
)
def test_llama3_scaling_in_both_forms(fields: dict):
    config = config_of(**fields)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_linear_scaling_under_both_keys(key: str):
    assert config_of(rope_scaling={key: "linear", "factor": 2.0}).rope_scaling == RopeScaling("linear", 2.0)


def test_default_rope_parameters_are_no_scaling():
    config = config_of(rope_parameters={"rope_type": "default", "rope_theta": 100000.0})
    assert (config.rope_theta, config.rope_scaling) == (100000.0, RopeScaling("none"))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "mixtral"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"lm_head_bias": True}, "lm_head_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "rope_scaling['rope_type']"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "llama3", "short_factor": [1.0]}}, "rope_parameters['short_factor']"),
        ({"rope_parameters": {"rope_type": ["llama3"]}}, "rope_parameters['rope_type']"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"head_dim": 63}, "head_dim"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"num_attention_heads": 31}, "hidden_size"),
    ],
)
def test_another_model_is_refused_by_field(changes: dict, field: str):
    with pytest.raises(UnsupportedModel, match="supported") as error:
        config_of(**changes)
    assert error.value.field == field


@pytest.mark.parametrize(
    "field",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_a_missing_field_is_named(field: str):
    with pytest.raises(ValueError, match=f"config.json lacks the field '{field}'"):
        read_hf_config({key: value for key, value in LLAMA_2_7B.items() if key != field})


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor"])
def test_a_missing_rope_number_is_named(name: str):
    scaling = {key: value for key, value in LLAMA3_SCALING.items() if key != name}
    with pytest.raises(ValueError, match=name):
        config_of(rope_scaling=scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer in 1..2147483647, got 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"hidden_size": 4096.0}, "hidden_size must be an integer"),
        ({"hidden_size": 10**400}, "hidden_size must be an integer .* got an integer of more than 40 digits"),
        ({"hidden_size": -(10**5000)}, "got an integer of more than 40 digits"),
        ({"max_position_embeddings": "4096"}, "max_position_embeddings must be an integer"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings must be an integer"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta must be a positive number"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"bos_token_id": -1}, "bos_token_id must be an integer in 0.."),
        ({"eos_token_id": [2, "3"]}, "eos_token_id must be an integer in 0..31999, or a list"),
        ({"eos_token_id": 32000}, "eos_token_id must be an integer in 0..31999"),
        ({"rope_scaling": {"type": "linear", "factor": -1.0}}, "rope_scaling: factor must be a positive number"),
        (
            {"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1.0}},
            "high_freq_factor must be above low_freq_factor",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": [3]}}, "beta_fast must be a positive number"),
    ],
)
def test_a_bad_value_is_named_with_its_file(changes: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        read_hf_config(LLAMA_2_7B | changes, "folder/config.json")
    assert str(error.value).startswith("folder/config.json: ") and len(str(error.value)) < 300


def test_rope_scaling_checks_its_order():
    with pytest.raises(ValueError, match="high_freq_factor must be above low_freq_factor"):
        RopeScaling("llama3", 8.0, low_freq_factor=4.0, high_freq_factor=4.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strategy": "beam"}, ValueError, "strategy must be one of 'autoregressive', 'self_speculative'"),
        ({"num_speculations": 0}, ValueError, "num_speculations must be at least 1, got 0"),
        ({"num_speculations": True}, TypeError, "num_speculations must be an int"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 8.0}, TypeError, "max_new_tokens must be an int"),
        ({"exit_layer": 0}, ValueError, "exit_layer must be at least 1, got 0"),
        ({"exit_layer": 2.0}, TypeError, "exit_layer must be an int"),
        ({"eos_token_ids": {2}}, TypeError, "eos_token_ids must be a tuple"),
        ({"eos_token_ids": (2.0,)}, TypeError, "eos_token_ids must be an int"),
        ({"return_logits": 1}, TypeError, "return_logits must be True or False"),
    ],
)
def test_generation_arguments(arguments: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        GenerationConfig(**arguments)


@pytest.mark.parametrize(("num_layers", "exit_layer"), [(2, 1), (3, 1), (5, 1), (6, 2), (16, 5), (30, 10)])
def test_the_exit_layer_is_a_third_by_default(num_layers: int, exit_layer: int):
    assert GenerationConfig().resolve_exit_layer(num_layers) == exit_layer


@pytest.mark.parametrize("exit_layer", [1, 3])
def test_the_exit_layer_given(exit_layer: int):
    assert GenerationConfig(exit_layer=exit_layer).resolve_exit_layer(4) == exit_layer


def test_the_exit_layer_must_leave_a_layer_to_verify():
    with pytest.raises(ValueError, match=r"exit_layer must be in 1\.\.3 .* got 4; leave it None for 1"):
        GenerationConfig(exit_layer=4).resolve_exit_layer(4)


def test_one_layer_leaves_nothing_to_exit_from():
    with pytest.raises(ValueError, match="at least 2 layers, got one of 1; use strategy='autoregressive'"):
        GenerationConfig().resolve_exit_layer(1)
