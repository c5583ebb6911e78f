"""Log-probabilities of a prompt's own tokens, which ``echo`` and ``prompt_logprobs`` ask for."""

from __future__ import annotations

from collections.abc import Sequence

from layerskip_kernels.decoding.exits import each_exit
from layerskip_kernels.decoding.sampling import TokenLogprobs, top_logprobs
from layerskip_kernels.model.model import Model

__all__ = ["layers_at_the_end", "prompt_logprobs"]


def prompt_logprobs(
    model: Model, token_ids: Sequence[int], top: int, exit_layer: int | None = None
) -> list[TokenLogprobs | None]:
    """Each token's log-probability after those before it; None for the first.

    ``top``: how many of the likeliest tokens stand beside it. ``exit_layer``: the layer that is asked (None: the last).
    Raises ValueError for an empty prompt or one longer than the model.
    """
    layer = model.config.num_layers if exit_layer is None else exit_layer
    scores: list[TokenLogprobs | None] = [None]
    for rows in each_exit(model, token_ids, exits=[layer]):
        following = token_ids[rows.position + 1 : rows.position + 1 + len(rows.logits)]
        if following:
            scores += top_logprobs(model.ops, rows.logits[: len(following)], following, top)
    return scores


def layers_at_the_end(model: Model, token_ids: Sequence[int]) -> list[tuple[int, int, float]]:
    """What each layer would say after a text: (layer, its best token, that token's probability), from 1 to L.

    Raises ValueError for an empty text or one longer than the model.
    """
    if not token_ids:
        raise ValueError("tokens must hold at least one token id")
    return [
        (rows.layer, int(rows.tokens[0]), float(rows.logits[0].softmax(-1)[rows.tokens[0]]))
        for rows in each_exit(model, token_ids, start=len(token_ids) - 1)
    ]
