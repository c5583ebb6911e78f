"""Tiny random models of odd shapes, and the switches the tests turn."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# Kernels run on a GPU where there is one; elsewhere Triton's interpreter runs them, which must be said before it loads.
GPU = torch.cuda.is_available()
os.environ["TRITON_INTERPRET"] = "0" if GPU else "1"

from layerskip_kernels import Model, ModelConfig, PagedKVCache
from layerskip_kernels.loading import Checkpoint

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INSTRUCTION_SETS = torch.ops.layerskip.instruction_sets()


def config(**changes: object) -> ModelConfig:
    """Nothing here is a multiple of anything: 3 layers, hidden 50, heads of 18, a vocabulary of 101."""
    values = dict(
        vocab_size=101,
        hidden_size=50,
        intermediate_size=75,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=18,
        max_positions=1024,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
    )
    return ModelConfig(**{**values, **changes})


def checkpoint(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> Checkpoint:
    """Random weights under their Hugging Face names, scaled so that logits spread and layers matter."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float | None = None) -> torch.Tensor:
        scale = shape[-1] ** -0.5 if scale is None else scale
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    def norm() -> torch.Tensor:
        return (1 + 0.2 * torch.randn(config.hidden_size, generator=generator)).to(dtype)

    c, q_size, kv_size = config, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors = {
        "model.embed_tokens.weight": random(c.vocab_size, c.hidden_size, scale=1.0),
        "model.norm.weight": norm(),
    }
    if not c.tie_word_embeddings:
        tensors["lm_head.weight"] = random(c.vocab_size, c.hidden_size)
    for layer in range(c.num_layers):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = norm()
        tensors[prefix + "post_attention_layernorm.weight"] = norm()
        for name, out, size in (
            ("self_attn.q_proj", q_size, c.hidden_size),
            ("self_attn.k_proj", kv_size, c.hidden_size),
            ("self_attn.v_proj", kv_size, c.hidden_size),
            ("self_attn.o_proj", c.hidden_size, q_size),
            ("mlp.gate_proj", c.intermediate_size, c.hidden_size),
            ("mlp.up_proj", c.intermediate_size, c.hidden_size),
            ("mlp.down_proj", c.hidden_size, c.intermediate_size),
        ):
            tensors[f"{prefix}{name}.weight"] = random(out, size)
            if c.attention_bias and name.startswith("self_attn"):
                tensors[f"{prefix}{name}.bias"] = random(out, scale=0.3)
    return Checkpoint(config=c, tensors=tensors, tokenizer=None, name="tiny", dtype=dtype)


def tiny_model(
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "cpu",
    seed: int = 0,
    weights: str | None = None,
    **changes: object,
) -> Model:
    return Model.from_checkpoint(checkpoint(config(**changes), dtype, seed), backend, weights)


def random_tokens(count: int, vocab_size: int = 101, seed: int = 0) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def cache_for(model: Model, positions: int, page_size: int = 16, prefix_sharing: bool = False) -> PagedKVCache:
    """A cache whose memory starts as NaN, so that reading what nobody wrote shows."""
    cache = PagedKVCache.with_room_for(model, [positions], page_size, prefix_sharing)
    for tensor in cache.tensors:
        tensor.fill_(torch.nan)
    return cache


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = torch.ops.layerskip.instruction_set()
    torch.ops.layerskip.set_instruction_set(name)
    try:
        yield
    finally:
        torch.ops.layerskip.set_instruction_set(before)


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


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set this machine has."""
    with instruction_set(request.param):
        yield request.param
