"""Tiny random models of odd shapes, and the switches the tests turn."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from layerskip_kernels import Model, ModelConfig, PagedKVCache
from layerskip_kernels.model.checkpoint import Checkpoint
from layerskip_kernels.model.tensor_names import NORMS

GPU = torch.cuda.is_available()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# What Triton's interpreter goes through in a second or so.
SMALL = dict(hidden_size=20, intermediate_size=21, num_heads=2, num_kv_heads=1, head_dim=6)
ALL_INSTRUCTION_SETS = ("portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16")  # csrc/cpu/dispatch.cpp
ONLY_INTEGERS = ("avx_vnni", "avx512_vnni")  # sets that have kernels of their own for rule 8 alone
INSTRUCTION_SETS = torch.ops.layerskip.instruction_sets()


def config(**changes: object) -> ModelConfig:
    """All sizes are deliberately odd: 3 layers, hidden 50, heads of 18, a vocabulary of 101."""
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

    def norm(size: int = config.hidden_size) -> torch.Tensor:
        return (1 - config.norm_offset + 0.2 * torch.randn(size, generator=generator)).to(dtype)

    c, q_size, kv_size = config, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors = {
        "model.embed_tokens.weight": random(c.vocab_size, c.hidden_size, scale=1.0),
        "model.norm.weight": norm(),
    }
    if not c.tie_word_embeddings:
        tensors["lm_head.weight"] = random(c.vocab_size, c.hidden_size)
    for layer in range(c.num_layers):
        prefix = f"model.layers.{layer}."
        for name in NORMS[c.norm_placement].values():
            tensors[f"{prefix}{name}.weight"] = norm()
        if c.qk_norm != "none":
            for name, size in (("q_norm", q_size), ("k_norm", kv_size)):
                tensors[f"{prefix}self_attn.{name}.weight"] = norm(size if c.qk_norm == "whole" else c.head_dim)
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
            if c.mlp_bias if name.startswith("mlp") else c.out_bias if name.endswith("o_proj") else c.qkv_bias:
                tensors[f"{prefix}{name}.bias"] = random(out, scale=0.3)
    return Checkpoint(config=c, tensors=tensors, tokenizer=None, name="tiny", dtype=dtype)


def agreeing_model(
    dtype: torch.dtype = torch.bfloat16, backend: str = "cpu", seed: int = 0, late: float = 0.3,
    device: torch.device | None = None, **changes: object,
) -> Model:  # fmt: skip
    """A tiny model whose later layers say mostly what the first says: of its drafts most are accepted, not all."""
    tensors = checkpoint(config(**changes), dtype, seed)
    for name, tensor in tensors.tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and ".layers.0." not in name:
            tensor *= late
    return Model.from_checkpoint(tensors, backend, device=device)


def tiny_model(
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "cpu",
    seed: int = 0,
    weights: str | None = None,
    **changes: object,
) -> Model:
    return Model.from_checkpoint(checkpoint(config(**changes), dtype, seed), backend, weights)


def early_model(exit_layer: int = 1, **changes: object) -> Model:
    """A tiny model whose layers above ``exit_layer`` add nothing: every draft of that exit is accepted."""
    found = checkpoint(config(**changes), torch.bfloat16)
    for layer in range(exit_layer, found.config.num_layers):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            found.tensors[f"model.layers.{layer}.{name}.weight"].zero_()
    return Model.from_checkpoint(found)


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
