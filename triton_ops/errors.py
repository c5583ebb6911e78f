"""What kernels note instead of raising: they can't, and the host does not wait for them.

``error`` is int32 [1] on the device; the greatest code stays. Whoever waits for a step's results calls raise_noted with
a copy, or check_error. Each cache has a record of its own: what one model's steps noted is not raised in another's.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "BAD_PAGE", "BAD_POSITION", "BAD_SCORES", "BAD_TOKEN", "NAN_LOGITS", "check_error", "error_of", "new_error",
    "raise_noted", "share_error",
]  # fmt: skip

BAD_PAGE, BAD_POSITION, BAD_TOKEN, NAN_LOGITS, BAD_SCORES = 1, 2, 3, 4, 5

MESSAGES = {
    BAD_PAGE: "block_table names a page outside the cache",
    BAD_POSITION: "positions holds one outside the model's or the block table's",
    BAD_TOKEN: "tokens holds one outside the vocabulary",
}
NAN_MESSAGE = (
    "norm_head_argmax: a logit is NaN, so no token can be chosen: the activations overflowed "
    "(fp16 holds at most 65504; try dtype=torch.bfloat16) or the weights are damaged"
)

SCORES_MESSAGE = (
    "no token can be chosen: a score is NaN or +infinite, or all are -infinite. The logits overflowed, or every token "
    "was excluded: check temperature, penalties and logit_bias"
)


def new_error(device: torch.device | str) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


_errors = WeakIdKeyDictionary()


def error_of(k_cache: Tensor) -> Tensor:
    """The record of the steps on a cache."""
    if k_cache not in _errors:
        _errors[k_cache] = new_error(k_cache.device)
    return _errors[k_cache]


def share_error(k_cache: Tensor, others: Tensor) -> None:
    """Steps on other pages of the same cache (an exit adapter's) have the record of ``k_cache``."""
    _errors[others] = error_of(k_cache)


def check_error(error: Tensor) -> None:
    """Wait for the device; raise what its kernels noted, and forget it: RuntimeError for numbers, ValueError else."""
    raise_noted(int(error), error)


def raise_noted(code: int, error: Tensor) -> None:
    """Raise what the ``code`` that was read from ``error`` means, and forget it; nothing for 0."""
    if code == 0:
        return
    error.zero_()
    if code == NAN_LOGITS:
        raise RuntimeError(NAN_MESSAGE)
    if code == BAD_SCORES:
        raise RuntimeError(SCORES_MESSAGE)
    raise ValueError(MESSAGES[code])
