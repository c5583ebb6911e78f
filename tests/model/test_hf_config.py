"""Fields of config.json beside the sizes: unknown ones, and every spelling of RoPE, judged by Transformers."""

import dataclasses
from typing import Any

import pytest
import torch

from layerskip_kernels import GenerationConfig, ModelConfig, PagedKVCache, RopeScaling, generate
from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.model import model as model_module
from layerskip_kernels.model.hf_config import read_hf_config
from layerskip_kernels.model.rope import inverse_frequencies, rope_tables
from support.checkpoint_files import HF_CONFIG
from support.models import tiny_model

# ---- unknown fields ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("logits_scaling", 8.0),
        ("attention_multiplier", 0.0078125),
        ("attention_multiplier", 1),
        ("residual_multiplier", 0),
        ("sliding_window", 4096),
        ("qk_norm", True),
        ("use_qk_norm", True),
        ("no_rope_layers", [1, 1, 0]),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("num_local_experts", 8),
        ("final_logit_softcapping", 30.0),
        ("clip_qkv", 8.0),
        ("is_causal", False),
        ("query_pre_attn_scalar", 256),
        ("norm_type", "layernorm"),
        ("rope_parameters", {"rope_type": "default", "mrope_section": [1, 2]}),
        ("auto_map", {"AutoModelForCausalLM": "modeling_x.X"}),
    ],
)
def test_a_field_that_may_change_the_arithmetic_is_refused_by_name(name: str, value: object):
    with pytest.raises(UnsupportedModel, match=rf"folder/config\.json: .*{name}"):
        read_hf_config(HF_CONFIG | {name: value}, "folder/config.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embedding_multiplier", 1.0),
        ("logits_scaling", None),
        ("sliding_window", None),
        ("use_sliding_window", False),
        ("num_local_experts", 0),
        ("no_rope_layers", []),
        ("layer_types", ["full_attention"] * 2),
        ("attention_dropout", 0.1),
        ("_attn_implementation", "sdpa"),
        ("transformers.js_config", {"dtype": "q4"}),
    ],
)
def test_a_harmless_field_changes_nothing(name: str, value: object):
    assert read_hf_config(HF_CONFIG | {name: value}) == read_hf_config(HF_CONFIG)


def test_all_that_transformers_writes_of_a_llama_is_known():
    from transformers import LlamaConfig

    plain = LlamaConfig(max_length=99, do_sample=True, temperature=0.5, top_p=0.5, num_beams=4, use_cache=False)
    fields = {**LlamaConfig().to_dict(), **plain.to_dict(), "id2label": {"0": "a"}, "initializer_range": 0.1}
    assert fields["model_type"] == "llama" and len(fields) > 30
    assert read_hf_config(fields).hidden_size == 4096


# ---- RoPE ----

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "theta beside": {"rope_theta": 5e5},
    "theta inside goes first": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
    "scaling goes before parameters": {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LINEAR},
    "theta of the parameters is lost": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": LINEAR,
    },
    "an empty scaling is none": {"rope_parameters": LINEAR, "rope_scaling": {}},
    "the older type": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope_type goes before type": {"rope_scaling": {"type": "dynamic", **LINEAR}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}, "rope_theta": 5e5},
    "llama3 without its length": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "the length beside goes first": {
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16},
        "original_max_position_embeddings": 32,
        "rope_theta": 5e5,
    },
    "yarn": {"rope_scaling": YARN},
    "yarn without its length": {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 64},
    "yarn's factor from the lengths": {"rope_scaling": {**YARN, "factor": None}},
    "yarn's attention factor": {"rope_scaling": {**YARN, "attention_factor": 0.7}},
    "yarn's betas": {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2.5}},
    "yarn, not truncated": {"rope_scaling": {**YARN, "truncate": False, "beta_fast": 20}},
    "yarn's mscale": {"rope_scaling": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.5}},
    "yarn's mscale alone": {"rope_scaling": {**YARN, "mscale": 0.9}},
    "yarn that shrinks": {"rope_scaling": {**YARN, "factor": 0.5}},
    "yarn of a short training": {"rope_scaling": {**YARN, "original_max_position_embeddings": 2}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROPES)
def test_every_spelling_of_rope_is_read_as_transformers_reads_it(name: str):
    import transformers
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    if transformers.__version__.startswith("4."):
        pytest.skip("Transformers 4 does not know all of them")
    fields = {**HF_CONFIG, "head_dim": 32, **ROPES[name]}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**_copy(fields)))
    config = read_hf_config(_copy(fields))
    assert torch.allclose(inverse_frequencies(config).float(), theirs.inv_freq, rtol=2e-6, atol=0)
    cos, sin = theirs(torch.zeros(1), torch.arange(40)[None])
    ours = rope_tables(config, 40)
    assert torch.allclose(ours[0][0], cos[0, :, :16], atol=1e-5) and torch.allclose(
        ours[1][0], sin[0, :, :16], atol=1e-5
    )


def _copy(fields: dict[str, Any]) -> dict[str, Any]:
    """Transformers writes into the dicts it is given."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in fields.items()}


# ---- positions ----


def test_tables_hold_what_a_cache_can_and_grow_with_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_module, "FIRST_POSITIONS", 32)
    model = tiny_model(max_positions=2**30)
    assert model.weights.cos.size(1) == 32
    config = GenerationConfig(max_new_tokens=60, eos_token_ids=(), return_logits=True)
    small = PagedKVCache(model, 1, 16)
    assert model.weights.cos.size(1) == 32
    identity = model.identity
    [long] = generate(model, [[1, 2, 3]], config)
    assert 63 <= model.weights.cos.size(1) < 200
    assert model.identity == identity and small.model is model
    monkeypatch.setattr(model_module, "FIRST_POSITIONS", 4096)
    [whole] = generate(tiny_model(max_positions=2**30), [[1, 2, 3]], config)
    assert long.token_ids == whole.token_ids and torch.equal(long.logits, whole.logits)
    copy = dataclasses.replace(model, name="copy")
    PagedKVCache(model, 100, 16)
    assert copy.weights.cos.size(1) == 1600 and torch.equal(copy.weights.cos, rope_tables(model.config, 1600)[0])


def test_tables_are_never_longer_than_the_model(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model()
    PagedKVCache(model, 10_000, 16)
    assert model.weights.cos.size(1) == model.config.max_positions


def test_yarn_needs_a_base_above_one():
    fields = {field.name: getattr(tiny_model().config, field.name) for field in dataclasses.fields(ModelConfig)}
    with pytest.raises(ValueError, match="rope_theta must be above 1 with yarn"):
        ModelConfig(**{**fields, "rope_theta": 1.0, "rope_scaling": RopeScaling("yarn", 2.0)})
