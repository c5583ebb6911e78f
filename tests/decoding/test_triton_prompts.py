"""Whole prompts by the Triton kernels, through tiles of rows (triton_ops/prompt_dot.py): the bits of the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from layerskip_kernels import Engine, GenerationConfig, PagedKVCache, generate, load_model
from layerskip_kernels.triton_ops import launch
from support.families import transformers_model
from support.generations import KEEP, drafts_accepted, same_bits
from support.models import DTYPES, GPU, SMALL, agreeing_model, random_tokens, tiny_model
from support.prompt_tiles import count_integer_tiles, count_tiles

PROMPT = random_tokens(70)
# Between them: biases, windows, norms of q and k and after what is added, caps, multipliers, gelu; each dtype.
FAMILIES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "qwen2": (DTYPES[0], dict(sliding_window=5, max_window_layers=1)),
    "granite": (DTYPES[1], {}),
    "gemma3_text": (DTYPES[0], dict(head_dim=6, sliding_window=5, layer_types=["sliding_attention", "full_attention"])),
    "qwen3": (DTYPES[2], dict(head_dim=6)),
}
SIZES: dict[str, Any] = dict(
    hidden_size=20, intermediate_size=21, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
)


@pytest.fixture
def tiles(monkeypatch):
    return count_tiles(monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path, tiles):
    """Logits, K and V after a prompt of two groups of rows, the second one not full; then drafts from there."""
    dtype, changes = FAMILIES[family]
    transformers_model(family, tmp_path, **SIZES, **changes)
    settings: dict[str, Any] = dict(max_new_tokens=3, eos_token_ids=(), return_logits=True, return_kv=True)
    [plain] = generate(load_model(tmp_path, dtype), [PROMPT], GenerationConfig("autoregressive", **settings))
    drafting = GenerationConfig(exit_layer=1, num_speculations=2, **settings)
    [drafted] = generate(load_model(tmp_path, dtype, "triton"), [PROMPT], drafting)
    assert torch.equal(drafted.logits, plain.logits)
    assert all(map(torch.equal, drafted.kv, plain.kv))
    assert drafted.drafted > 0
    assert tiles == {1: 4, 2: 4}  # two layers: qkv, gate and up; output and down projection


@pytest.mark.parametrize("weights", ["q4_0", "int8"])
def test_quantised_weights(weights: str, monkeypatch):
    """The same where weights are quantised; tiles are small where they are interpreted."""
    if not GPU:
        monkeypatch.setattr(launch, "PROMPT_ROWS", 9)
        monkeypatch.setattr(launch, "INTEGER_TILES", ((8, 32),))
    taken = count_integer_tiles(monkeypatch)
    prompt = PROMPT if GPU else PROMPT[:10]
    settings: dict[str, Any] = dict(max_new_tokens=3, eos_token_ids=(), return_logits=True, return_kv=True)
    plain, drafted = (
        generate(tiny_model(backend=backend, weights=weights, **dict(SMALL, num_layers=2)), [prompt], config)[0]
        for backend, config in (
            ("cpu", GenerationConfig("autoregressive", **settings)),
            ("triton", GenerationConfig(exit_layer=1, num_speculations=2, **settings)),
        )
    )
    assert torch.equal(drafted.logits, plain.logits)
    assert all(map(torch.equal, drafted.kv, plain.kv))
    assert drafted.drafted > 0
    assert taken == {1: 4, 2: 4}


def test_on_a_device_beside_another_request(two_devices, tiles):
    """Through an engine: chunks of 40 rows of two prompts, with a sequence that decodes meanwhile."""

    def run(model):
        engine = Engine(model, PagedKVCache(model, 16), max_batch=3, chunk_size=40, drafts="fixed")
        config = GenerationConfig(exit_layer=1, num_speculations=2, max_new_tokens=4, eos_token_ids=())
        for prompt in (random_tokens(3, seed=1), random_tokens(50, seed=2), PROMPT):
            engine.add_request(prompt, config)
        found = engine.run()
        return [found[key] for key in sorted(found)] if isinstance(found, dict) else found

    generations = [run(agreeing_model(backend=backend, **dict(SMALL, num_layers=2))) for backend in ("triton", "cpu")]
    device, cpu = ([found.token_ids for found in made] for made in generations)
    assert device == cpu
    assert sum(found.accepted for found in generations[0]) > 0
    assert tiles[1] == tiles[2] >= 2 * 2 * 2  # two layers, two products, two chunks at least


def test_a_prompt_of_several_chunks_on_a_device(two_devices, tiles):
    """300 tokens: two passes of at most 256 rows, and two chunks of attention."""
    prompt, sizes = random_tokens(300, seed=4), dict(SMALL, hidden_size=16, head_dim=16, num_layers=2)
    config = GenerationConfig(exit_layer=1, num_speculations=2, max_new_tokens=4, eos_token_ids=(), **KEEP)
    device, cpu = (
        generate(agreeing_model(backend=backend, **sizes), [prompt], config) for backend in ("triton", "cpu")
    )
    assert all(map(same_bits, device, cpu)) and drafts_accepted(device) > 0
    assert [(g.drafted, g.accepted) for g in device] == [(g.drafted, g.accepted) for g in cpu]
    assert tiles == {1: 2 * 2 * 2, 2: 2 * 2 * 2}  # two layers, two products, two chunks
