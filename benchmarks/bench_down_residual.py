"""down_residual: down projection and residual sum."""

from conftest import hidden
from shapes import random_weight


def bench_down_residual(measure, config, rows):
    measure(
        "down_residual",
        {"w_down": random_weight(config.hidden_size, config.intermediate_size)},
        lambda rows: {
            "activation": hidden(rows, config.intermediate_size),
            "residual": hidden(rows, config.hidden_size),
        },
        rows,
    )
