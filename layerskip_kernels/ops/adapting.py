"""Rows at an exit through its adapter, by the ops of any backend."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from layerskip_kernels.operands import AdapterLayers, PendingRows
from layerskip_kernels.ops.backend import Backend

__all__ = ["adapt_rows"]


def adapt_rows(ops: Backend, hidden: Tensor, adapter: AdapterLayers | None, rows: PendingRows) -> Tensor:
    """What the LM head is to see of rows at an exit, [T, D]: their states in ``hidden`` [P, S, D], the cache's, after
    the adapter's layers, if there are any.

    Writes the adapter's K and V; the kept hidden states stay those of the exit.
    """
    sequence_of_row = torch.repeat_interleave(rows.query_start_loc.diff().long())
    sequence_of_row, positions, table = ops.to_device(sequence_of_row, rows.positions, rows.block_table)
    slots = table[sequence_of_row, positions // hidden.size(1)].long(), positions % hidden.size(1)
    at_exit = hidden[slots]
    if adapter is None:
        return at_exit
    placed = replace(rows, depths=torch.ones(len(rows.tokens), dtype=torch.int32))
    ops.run_layers(adapter.weights, adapter.sizes, adapter.cache, placed, adapter.depth)
    adapted = hidden[slots]
    hidden[slots] = at_exit
    return adapted
