"""Rows through a model's exit adapter: for drafts, and for rows that no draft has taken there.

Each row of a sequence leaves K and V of the adapter's layers when it reaches the exit: drafts do in draft_step, all
others in verify_step, before they go on. The kept hidden state of a row stays that of the exit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from layerskip_kernels.decoding.kv_cache import PagedKVCache
from layerskip_kernels.model.model import Model
from layerskip_kernels.operands import AdapterLayers, PendingRows

__all__ = ["adapt_rows", "adapter_layers", "raise_to_exit"]


def adapter_layers(model: Model, cache: PagedKVCache) -> AdapterLayers | None:
    """The layers of the model's exit adapter with their pages of the cache; None: there are none."""
    adapter = model.exit_adapter
    if adapter is None or not adapter.num_layers:
        return None
    return AdapterLayers(adapter.weights, adapter.sizes, cache.adapter_tensors)


def _slots_of(model: Model, cache: PagedKVCache, rows: PendingRows) -> tuple[Tensor, Tensor]:
    """Page and offset of each row, int64 [T] both, on the cache's device."""
    sequence_of_row = torch.repeat_interleave(rows.query_start_loc.diff().long())
    sequence_of_row, positions, table = model.ops.to_device(sequence_of_row, rows.positions, rows.block_table)
    size = cache.pool.page_size
    return table[sequence_of_row, positions // size].long(), positions % size


def adapt_rows(model: Model, cache: PagedKVCache, rows: PendingRows) -> Tensor:
    """Pass rows whose kept hidden states are those of the exit through the adapter's layers, if there are any.

    Writes the adapter's K and V. Returns the hidden states [T, D] that the head is to see.
    """
    slots, layers = _slots_of(model, cache, rows), adapter_layers(model, cache)
    at_exit = cache.hidden[slots]
    if layers is None:
        return at_exit
    placed = replace(rows, depths=torch.ones(len(rows.tokens), dtype=torch.int32))
    model.ops.run_layers(*layers, placed, layers.depth)
    adapted = cache.hidden[slots]
    cache.hidden[slots] = at_exit
    return adapted


def raise_to_exit(model: Model, cache: PagedKVCache, rows: PendingRows) -> PendingRows:
    """Raise pending rows below the exit of a model's adapter to it, and leave their K and V of the adapter.

    Returns all rows, at their new depths. Rows of drafts are at the exit and have been adapted.
    """
    adapter = model.exit_adapter
    if adapter is None or not adapter.num_layers:
        return rows
    below = rows.depths < adapter.exit_layer
    if not below.any():
        return rows
    starts = torch.nn.functional.pad(below.cumsum(0), (1, 0))[rows.query_start_loc.long()]
    [chosen] = model.ops.to_device(below.nonzero()[:, 0])
    lower = replace(
        rows, tokens=rows.tokens[chosen], positions=rows.positions[chosen], depths=rows.depths[below],
        query_start_loc=starts.int(),
    )  # fmt: skip
    model.ops.run_layers(model.weights, model.sizes, cache.tensors, lower, adapter.exit_layer)
    adapt_rows(model, cache, lower)
    return replace(rows, depths=rows.depths.clamp(min=adapter.exit_layer))
