"""filter_logits: temperature, top-k, top-p and min-p over a vocabulary."""

import pytest
import torch

from shapes import logits


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0), (50, 0.9, 0.05)])
def bench_filter_logits(measure, config, rows, top_k, top_p, min_p):
    measure(
        "filter_logits",
        {},
        lambda rows: {
            "scores": logits(rows, config.vocab_size),
            "temperatures": torch.full((rows,), 0.8),
            "top_ks": torch.full((rows,), top_k),
            "top_ps": torch.full((rows,), top_p, dtype=torch.float64),
            "min_ps": torch.full((rows,), min_p),
        },
        rows,
        reads=("scores",),
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
