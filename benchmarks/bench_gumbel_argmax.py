"""gumbel_argmax: noise for every token id of a vocabulary, and the best token."""

import torch

from shapes import logits, places


def bench_gumbel_argmax(measure, config, rows):
    measure(
        "gumbel_argmax",
        {},
        lambda rows: {
            "scores": logits(rows, config.vocab_size),
            **places(rows),
            "noisy": torch.ones(rows, dtype=torch.bool),
        },
        rows,
        reads=("scores",),
    )
