"""Early exit alone: tokens chosen after the first layers, never verified. Lossy: it is the text of a smaller model.

The bits are those of the model cut off after ``exit_layer`` layers, with the same final norm and LM head. A sequence
decoded like this has K and V of those layers only, so no other sequence may share its pages.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip_kernels.decoding.kv_cache import PagedKVCache
from layerskip_kernels.decoding.sampling import judge_drafts
from layerskip_kernels.decoding.steps import RollbackOnError, Samplers, append_rows, pending_rows
from layerskip_kernels.decoding.types import CachedSequence, Draft, Verdict
from layerskip_kernels.model.model import Model

__all__ = ["early_exit_salt", "early_exit_step"]

_SECRET = secrets.token_bytes(32)  # no salt of a caller's can name the pages of an early exit


def early_exit_salt(exit_layer: int, salt: bytes | None) -> bytes:
    """What to add sequences with: texts of one exit layer share prefixes with each other and with nobody else."""
    return _SECRET + exit_layer.to_bytes(4, "little") + (b"" if salt is None else b"\1" + salt)


def early_exit_step(
    model: Model,
    cache: PagedKVCache,
    sequences: Sequence[CachedSequence],
    exit_layer: int,
    num_waiting: Sequence[int],
    samplers: Samplers | None = None,
) -> Verdict:
    """Pass the known tokens of each sequence through ``exit_layer`` layers, and say what follows. To be committed.

    ``num_waiting``: known tokens at a sequence's end that wait for a later step, as in Draft. A sequence where none
    wait gains the token that those layers choose; logits fp32 [such sequences, V]. The sequences must have been added
    with early_exit_salt where the cache shares prefixes. Raises as verify_step does.
    """
    draft = Draft.joined(sequences, [], num_waiting)
    with RollbackOnError(cache, sequences):
        append_rows(cache, draft)
        rows = pending_rows(model, cache, draft)
        model.ops.run_layers(model.weights, model.sizes, cache.tensors, rows, exit_layer)
        best, logits = _after_exit(model, cache, [s for s, n in zip(sequences, num_waiting, strict=True) if not n])
        next_tokens = torch.full((len(sequences),), -1)
        next_tokens[draft.judged] = best
        num_accepted = torch.zeros_like(next_tokens)
        judge_drafts(model.ops, draft, logits, samplers or [None] * len(sequences), num_accepted, next_tokens)
        # The cache counts layers it has; those above the exit stay empty and are never read.
        ids = [s.id for s in sequences]
        cache.pool.raise_rows(ids, cache.pool.lengths(ids).tolist(), cache.pool.num_layers)
    return Verdict(draft, num_accepted, next_tokens, logits)


def _after_exit(model: Model, cache: PagedKVCache, sequences: Sequence[CachedSequence]) -> tuple[Tensor, Tensor]:
    """Best tokens int64 [n] and logits fp32 [n, V] by the last row of each sequence, on the host."""
    weights, sizes = model.weights, model.sizes
    if not sequences:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, sizes.vocab_size)
    ids, size = [s.id for s in sequences], cache.pool.page_size
    positions = torch.from_numpy(cache.pool.lengths(ids)).long() - 1
    page = torch.from_numpy(cache.pool.block_table(ids))[torch.arange(len(ids)), positions // size].long()
    hidden = cache.hidden[model.ops.to_device(page, positions % size)]
    found = model.ops.norm_head_argmax(hidden, weights.final_norm, weights.lm_head, sizes.vocab_size, *sizes.head)
    best, logits = model.ops.to_host(cache.k, *found)
    return best, logits
