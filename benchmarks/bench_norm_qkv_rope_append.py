"""norm_qkv_rope_append: the first half of a layer's attention. Its time does not depend on the context."""

import torch

from conftest import hidden
from layerskip_kernels.model.rope import inverse_frequencies
from layerskip_kernels.ops.reference import rope_tables
from shapes import random_weight

PAGE_SIZE, POSITION = 16, 100


def bench_norm_qkv_rope_append(measure, config, rows):
    D, K = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_heads * K, config.num_kv_heads * K
    cos, sin = rope_tables(inverse_frequencies(config), 256)

    def inputs(rows):
        pages = torch.zeros(2, 16, config.num_kv_heads, K, PAGE_SIZE, dtype=torch.bfloat16)
        return {
            "hidden": hidden(rows, D),
            "qkv_bias": None,
            "cos": cos,
            "sin": sin,
            "positions": torch.arange(POSITION, POSITION + rows),
            "slot_mapping": torch.arange(POSITION, POSITION + rows),
            "k_pages": pages[0],
            "v_pages": pages[1].transpose(2, 3).contiguous(),
            "num_heads": config.num_heads,
            "eps": config.rms_norm_eps,
        }

    weights = {
        "norm_weight": random_weight(D),
        "wq": random_weight(q_size, D),
        "wk": random_weight(kv_size, D),
        "wv": random_weight(kv_size, D),
    }
    measure("norm_qkv_rope_append", weights, inputs, rows)
