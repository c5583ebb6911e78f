"""What sets the families apart, by the Triton kernels: the bits of the CPU's plain decoding, drafts and all."""

from pathlib import Path
from typing import Any

import pytest
import torch

from layerskip_kernels import GenerationConfig, generate, load_model
from layerskip_kernels.model.families import FAMILIES
from support.families import transformers_model
from support.models import DTYPES, random_tokens

SMALL: dict[str, Any] = dict(
    hidden_size=20, intermediate_size=21, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
)
# Small variants that have every switch; what Triton's interpreter goes through in a few seconds.
CHANGES: dict[str, dict[str, Any]] = {
    "llama": dict(head_dim=6),
    "mistral": dict(head_dim=6, sliding_window=5),
    "qwen2": dict(sliding_window=5, max_window_layers=1),
    "qwen3": dict(head_dim=6),
    "smollm3": dict(no_rope_layers=[1, 0], sliding_window=5),
    "granite": {},
    "olmo2": {},
    "phi3": dict(sliding_window=5),
    "gemma": dict(head_dim=6),
    "gemma2": dict(head_dim=6, sliding_window=5),
    "gemma3_text": dict(head_dim=6, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
}


def test_every_family_is_compared():
    assert set(CHANGES) == set(FAMILIES)


@pytest.mark.parametrize("number", range(len(CHANGES)), ids=list(CHANGES))
def test_drafting_and_verifying_is_plain_decoding_on_the_cpu(number: int, tmp_path: Path):
    variant, dtype = list(CHANGES)[number], DTYPES[number % len(DTYPES)]
    transformers_model(variant, tmp_path, **SMALL, **CHANGES[variant])
    settings: dict[str, Any] = dict(max_new_tokens=3, eos_token_ids=(), return_logits=True, return_kv=True)
    prompt = random_tokens(9)
    [plain] = generate(load_model(tmp_path, dtype), [prompt], GenerationConfig("autoregressive", **settings))
    drafting = GenerationConfig(exit_layer=1, num_speculations=2, **settings)
    [drafted] = generate(load_model(tmp_path, dtype, "triton"), [prompt], drafting)
    assert torch.equal(drafted.logits, plain.logits)
    assert all(map(torch.equal, drafted.kv, plain.kv))
    assert drafted.drafted > 0
