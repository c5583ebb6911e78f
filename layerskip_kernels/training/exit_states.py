"""Hidden states of texts at an exit, computed once by the backend that will draft and kept in a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from layerskip_kernels.decoding.kv_cache import PagedKVCache
from layerskip_kernels.model.files import open_regular
from layerskip_kernels.model.model import Model
from layerskip_kernels.operands import PendingRows

__all__ = ["ExitStates", "states_at_exit"]


class ExitStates:
    """Those of ``texts`` (token ids) after ``exit_layer`` layers; a file in the model's dtype, made or completed here.

    Each text's states are the bits that drafting would see: [tokens, D] of a text is ``self[i]``.
    """

    def __init__(
        self, model: Model, exit_layer: int, texts: Sequence[Sequence[int]], path: Path, show: bool = False
    ) -> None:
        self._starts = [0, *accumulate(len(tokens) for tokens in texts)]
        self._size, self._dtype, self._path = model.config.hidden_size, model.dtype, path
        row = self._size * self._dtype.itemsize
        if os.path.lexists(path):
            open_regular(path).close()  # or a pipe there would be waited for
        with path.open("ab") as file:
            # A text that a kill has cut short is computed again.
            done = max(i for i, start in enumerate(self._starts) if start * row <= file.tell())
            file.truncate(self._starts[done] * row)
            shown = tqdm(texts[done:], desc=f"states at exit {exit_layer}", unit=" texts", disable=not show)
            for tokens in shown:
                states = states_at_exit(model, exit_layer, tokens)
                file.write(states.contiguous().view(torch.uint8).numpy().tobytes())
        total = self._starts[-1] * self._size
        self._states = torch.from_file(str(path), size=total, dtype=self._dtype).view(-1, self._size)

    def __getitem__(self, text: int) -> Tensor:
        return self._states[self._starts[text] : self._starts[text + 1]]


def states_at_exit(model: Model, exit_layer: int, tokens: Sequence[int]) -> Tensor:
    """Hidden states [T, D] of a text after the first layers, on the CPU."""
    count = len(tokens)
    cache = PagedKVCache.with_room_for(model, [count])
    sequence = cache.add_sequence(tokens)
    cache.pool.append([sequence.id], [count])
    positions = torch.arange(count)
    ids, on_device, table = model.ops.to_device(
        torch.tensor(tokens), positions, torch.from_numpy(cache.pool.block_table([sequence.id]))
    )
    starts = torch.tensor([0, count], dtype=torch.int32)
    rows = PendingRows(ids, on_device, torch.zeros(count, dtype=torch.int32), starts, table)
    model.ops.run_layers(model.weights, model.sizes, cache.tensors, rows, exit_layer)
    size = cache.pool.page_size
    [states] = model.ops.to_host(cache.k, cache.hidden[table[0, on_device // size].long(), on_device % size])
    return states
