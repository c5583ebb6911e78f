"""What kernels note instead of raising: they can't, and the host does not wait for them.

``error`` is int32 [1] on the device; the greatest code stays. Whoever waits for a step's results calls check_error.
"""

import torch
from torch import Tensor

__all__ = ["BAD_PAGE", "BAD_POSITION", "BAD_TOKEN", "NAN_LOGITS", "check_error", "new_error"]

BAD_PAGE, BAD_POSITION, BAD_TOKEN, NAN_LOGITS = 1, 2, 3, 4

MESSAGES = {
    BAD_PAGE: "block_table names a page outside the cache",
    BAD_POSITION: "positions holds one outside the model's or the block table's",
    BAD_TOKEN: "tokens holds one outside the vocabulary",
}
NAN_MESSAGE = (
    "norm_head_argmax: a logit is NaN, so no token can be chosen: the activations overflowed "
    "(fp16 holds at most 65504; try dtype=torch.bfloat16) or the weights are damaged"
)


def new_error(device: torch.device | str) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def check_error(error: Tensor) -> None:
    """Wait for the device; raise what its kernels noted, and forget it: RuntimeError for NaN, ValueError else."""
    code = int(error)
    if code == 0:
        return
    error.zero_()
    if code == NAN_LOGITS:
        raise RuntimeError(NAN_MESSAGE)
    raise ValueError(MESSAGES[code])
