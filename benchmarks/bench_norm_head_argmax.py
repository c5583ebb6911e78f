"""norm_head_argmax: final norm, LM head, and the best token."""

from conftest import hidden
from shapes import random_weight


def bench_norm_head_argmax(measure, config, rows):
    D, V = config.hidden_size, config.vocab_size
    measure(
        "norm_head_argmax",
        {"norm_weight": random_weight(D), "lm_head": random_weight(V, D)},
        lambda rows: {"hidden": hidden(rows, D), "vocab_size": V, "eps": config.rms_norm_eps},
        rows,
    )
