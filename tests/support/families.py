"""A tiny random model of each family, as Transformers makes and saves it: odd sizes, every switch on."""

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = dict(
    vocab_size=101, hidden_size=60, intermediate_size=75, num_hidden_layers=4, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4,
    "partial_rotary_factor": 0.6, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 4.0],
}  # fmt: skip
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
# By model_type; a second variant of a family has a suffix after a space.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": dict(attention_bias=True, mlp_bias=True, head_dim=18, rope_parameters=LLAMA3),
    "mistral": dict(sliding_window=100, head_dim=18),
    "qwen2": dict(rope_parameters=YARN, use_sliding_window=True, sliding_window=70, max_window_layers=2),
    "qwen3": dict(head_dim=18, attention_bias=True, tie_word_embeddings=True),
    "smollm3": dict(
        attention_bias=True, mlp_bias=True, no_rope_layers=[1, 0, 1, 0], use_sliding_window=True, sliding_window=130
    ),
    "granite": dict(
        attention_bias=True, mlp_bias=True, embedding_multiplier=6.5, residual_multiplier=0.22,
        attention_multiplier=0.4, logits_scaling=3.0,
    ),
    "olmo2": dict(attention_bias=True),
    "phi3": dict(sliding_window=90, original_max_position_embeddings=512, rope_parameters=LONGROPE),
    "phi3 whole": dict(sliding_window=None),
    "gemma": dict(head_dim=18, attention_bias=True),
    "gemma2": dict(
        head_dim=18, attention_bias=True, query_pre_attn_scalar=40, sliding_window=100, attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3_text": dict(
        head_dim=18, query_pre_attn_scalar=40, sliding_window=50, rope_parameters=TWO_ROPES,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        final_logit_softcapping=5.0,
    ),
}  # fmt: skip


def spelled(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` as the Transformers that is installed spells RoPE's: ``rope_parameters`` is Transformers 5's."""
    import transformers

    if not transformers.__version__.startswith("4.") or "rope_parameters" not in settings:
        return settings
    settings = dict(settings)
    rope = settings.pop("rope_parameters")
    main = dict(rope.get("full_attention", rope))
    settings["rope_theta"] = main.pop("rope_theta")
    if "partial_rotary_factor" in main:
        settings["partial_rotary_factor"] = main.pop("partial_rotary_factor")
    if "sliding_attention" in rope:
        settings["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if main["rope_type"] == "longrope":
        main["type"] = main.pop("rope_type")
    return settings | ({} if main.get("rope_type") == "default" else {"rope_scaling": main})


def transformers_model(variant: str, folder: Path, plain: bool = False, **changes: Any) -> Any:
    """The model in fp32, its norms and biases random as well, saved to ``folder``; ``plain``: without VARIANTS."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = spelled({**SIZES, **({} if plain else VARIANTS[variant]), **changes})
    config = AutoConfig.for_model(variant.split()[0], **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.3)
            if name.endswith("norm.weight") and "gemma" not in variant:
                parameter.data += 1.0
    model.save_pretrained(folder)
    return model
