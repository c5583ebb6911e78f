"""Every variant of Llama that config.py reads, against Transformers on the same random weights in fp32."""

import pytest
import torch

from layerskip_kernels import GenerationConfig, generate, load_model
from support.families import spelled
from support.models import random_tokens

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "llama 2": dict(num_key_value_heads=4),
    "grouped queries, tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "biased": dict(attention_bias=True),
    "head size of its own": dict(head_dim=22, num_key_value_heads=2),
    "linear scaling": dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "llama3 scaling": dict(rope_parameters=LLAMA3),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree(variant, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101, hidden_size=64, intermediate_size=75, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=512, initializer_range=0.2, **spelled(VARIANTS[variant]),
        )
    )  # fmt: skip
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    theirs.save_pretrained(tmp_path)
    prompt = random_tokens(300)
    config = GenerationConfig("autoregressive", max_new_tokens=20, eos_token_ids=(), return_logits=True)
    ours = generate(load_model(tmp_path), [prompt], config)[0]
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt + ours.token_ids[:-1]])).logits[0, len(prompt) - 1 :]
    assert logits.std() > 0.5, "the logits must spread for this to mean something"
    assert (logits - ours.logits).abs().max() < 1e-3
