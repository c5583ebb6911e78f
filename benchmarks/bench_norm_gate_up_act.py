"""norm_gate_up_act: the first half of a layer's MLP."""

from conftest import hidden
from shapes import random_weight


def bench_norm_gate_up_act(measure, config, rows):
    D, F = config.hidden_size, config.intermediate_size
    measure(
        "norm_gate_up_act",
        {"norm_weight": random_weight(D), "w_gate": random_weight(F, D), "w_up": random_weight(F, D)},
        lambda rows: {"hidden": hidden(rows, D), "intermediate_size": F, "eps": config.rms_norm_eps},
        rows,
    )
