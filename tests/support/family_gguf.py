"""A family's tiny model as a GGUF file, laid out as llama.cpp's converter does it, written from its description: names,
interleaved rows, norms with their 1 added, and what metadata says. Nothing here is read from the package's own
tables."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from support.gguf_files import interleave

# What a GGUF file can say of each family, beside support.families.SIZES: its layers are those of the published models.
GGUF_VARIANTS: dict[str, dict[str, Any]] = {
    "llama": dict(attention_bias=True, head_dim=18),
    "qwen2": {},
    "qwen3": dict(head_dim=18, tie_word_embeddings=True),
    "smollm3": dict(tie_word_embeddings=False),
    "granite": dict(
        embedding_multiplier=6.5, residual_multiplier=0.22, attention_multiplier=0.4, logits_scaling=3.0
    ),
    "olmo2": {},
    "phi3": dict(
        sliding_window=None,
        original_max_position_embeddings=512,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.6,
            "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 4.0],
        },
    ),
    "gemma": dict(head_dim=18),
    "gemma2": dict(
        head_dim=18, query_pre_attn_scalar=18, sliding_window=100, attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3_text": dict(
        head_dim=18, query_pre_attn_scalar=18, sliding_window=50, num_hidden_layers=7,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}  # fmt: skip
ARCHITECTURES = {"gemma3_text": "gemma3"}
PAIRED = ("llama", "granite", "smollm3")  # their rows are interleaved for RoPE over neighbours
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_family_gguf(path: Path, folder: Path) -> None:
    """The model in ``folder``, as Transformers saved it."""
    fields = json.loads((folder / "config.json").read_text())
    kind = fields["model_type"]
    tensors = load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(kind, kind))
    _add_metadata(writer, fields)
    _add_vocabulary(writer, fields["vocab_size"])
    for name, tensor in tensors.items():
        writer.add_tensor(_gguf_name(name, tensors), _rows(name, tensor, fields))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str, tensors: dict[str, Tensor]) -> str:
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.(weight|bias)", name):
        part = PARTS[match[2]]
        has_post_norms = any("post_feedforward" in other for other in tensors)
        if match[2] == "post_attention_layernorm" and has_post_norms:
            part = "post_attention_norm"
        return f"blk.{match[1]}.{part}.{match[3]}"
    stem, suffix = name.rsplit(".", 1)
    return f"{OUTER[stem]}.{suffix}"


def _rows(name: str, tensor: Tensor, fields: dict[str, Any]) -> np.ndarray:
    if fields["model_type"] in PAIRED and ".q_proj." in name:
        tensor = interleave(tensor, fields["num_attention_heads"])
    if fields["model_type"] in PAIRED and ".k_proj." in name:
        tensor = interleave(tensor, fields["num_key_value_heads"])
    if fields["model_type"].startswith("gemma") and name.endswith("norm.weight"):
        tensor = tensor + 1
    return tensor.contiguous().numpy()


def _add_metadata(writer: gguf.GGUFWriter, fields: dict[str, Any]) -> None:
    head_dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    rope = _rope(fields)
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "longrope":
        original = fields["original_max_position_embeddings"]
        scale = fields["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors((1 + np.log(scale) / np.log(original)) ** 0.5)
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))
    if fields.get("sliding_window") and fields["model_type"].startswith("gemma"):
        writer.add_sliding_window(fields["sliding_window"])
    for field, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("attention_multiplier", writer.add_attention_scale),
        ("logits_scaling", writer.add_logit_scale),
    ):
        if fields.get(field):
            add(fields[field])


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Of most layers, however the Transformers that wrote the config spells it."""
    if (rope := fields.get("rope_parameters")) is not None:
        return rope.get("full_attention", rope)
    partial = fields.get("partial_rotary_factor", 1.0)
    scaling = fields.get("rope_scaling") or {"rope_type": "default"}
    kind = scaling.get("rope_type", scaling.get("type"))
    return {**scaling, "rope_type": kind, "rope_theta": fields["rope_theta"], "partial_rotary_factor": partial}


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Byte tokens, as many as fit: llama.cpp wants a vocabulary to run at all."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(0x0A, 0x0A + size - 3))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([2, 3, 3] + [6] * (size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
