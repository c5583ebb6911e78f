"""paged_attention: one sequence's last rows over one layer's pages."""

import torch

from conftest import MAX_ROWS, hidden

PAGE_SIZE = 16


def bench_paged_attention(measure, config, rows, context):
    H, G, K = config.num_heads, config.num_kv_heads, config.head_dim
    num_pages = -(-(context + MAX_ROWS) // PAGE_SIZE)

    def inputs(rows):
        generator = torch.Generator().manual_seed(0)
        k, v = torch.randn(2, num_pages, G, K, PAGE_SIZE, generator=generator).bfloat16()
        return {
            "q": hidden(rows, H * K).view(rows, H, K),
            "k_pages": k,
            "v_pages": v.transpose(2, 3).contiguous(),
            "block_table": torch.randperm(num_pages, generator=generator).int()[None],
            "query_start_loc": torch.tensor([0, rows], dtype=torch.int32),
            "positions": torch.arange(context, context + rows),
            "scale": config.softmax_scale,
        }

    measure("paged_attention", {}, inputs, rows, reads=("k_pages", "v_pages"), context=context)
