"""out_residual: output projection and residual sum."""

from conftest import hidden
from shapes import random_weight


def bench_out_residual(measure, config, rows):
    q_size = config.num_heads * config.head_dim
    measure(
        "out_residual",
        {"wo": random_weight(config.hidden_size, q_size)},
        lambda rows: {
            "attention": hidden(rows, q_size),
            "out_bias": None,
            "residual": hidden(rows, config.hidden_size),
        },
        rows,
    )
