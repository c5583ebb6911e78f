"""Hidden states of texts after some layers, computed once by the backend that will draft and kept in files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from layerskip_kernels.decoding.kv_cache import PagedKVCache
from layerskip_kernels.model.files import open_regular
from layerskip_kernels.model.model import Model
from layerskip_kernels.operands import PendingRows

__all__ = ["ExitStates", "choices_after", "states_at_exits"]

ROWS = 64  # whose logits exist at a time


class ExitStates:
    """Those of ``texts`` (token ids) after each of ``exits`` layers, 1..L, made in one pass: ``states-<layers>.bin`` in
    ``folder``, in the model's dtype, made or completed here.

    Each text's states are the bits that drafting would see: ``at(exit_layer, i)`` [tokens, D] of text i.
    """

    def __init__(
        self, model: Model, exits: Iterable[int], texts: Sequence[Sequence[int]], folder: Path, show: bool = False
    ) -> None:
        self._starts = [0, *accumulate(len(tokens) for tokens in texts)]
        exits = sorted(set(exits))
        paths = {exit_layer: folder / f"states-{exit_layer}.bin" for exit_layer in exits}
        width = model.config.hidden_size
        row = width * model.dtype.itemsize
        for path in paths.values():
            if os.path.lexists(path):
                open_regular(path).close()  # or a pipe there would be waited for
            path.touch()
        # A text that a kill has cut short in one of them is computed again.
        kept = min(path.stat().st_size for path in paths.values())
        done = max(i for i, start in enumerate(self._starts) if start * row <= kept)
        for path in paths.values():
            os.truncate(path, self._starts[done] * row)
        for tokens in tqdm(texts[done:], desc="states at exits", unit=" texts", disable=not show):
            for exit_layer, states in zip(exits, states_at_exits(model, exits, tokens), strict=True):
                with paths[exit_layer].open("ab") as file:
                    file.write(states.contiguous().view(torch.uint8).numpy().tobytes())
        total = self._starts[-1] * width
        self._states = {
            exit_layer: torch.from_file(str(path), size=total, dtype=model.dtype).view(-1, width)
            for exit_layer, path in paths.items()
        }

    def at(self, exit_layer: int, text: int) -> Tensor:
        return self._states[exit_layer][self._starts[text] : self._starts[text + 1]]


def states_at_exits(model: Model, exits: Iterable[int], tokens: Sequence[int]) -> list[Tensor]:
    """Hidden states [T, D] of a text after each of some numbers of layers, ascending, on the CPU."""
    count = len(tokens)
    cache = PagedKVCache.with_room_for(model, [count])
    sequence = cache.add_sequence(tokens)
    cache.pool.append([sequence.id], [count])
    positions = torch.arange(count)
    ids, on_device, table = model.ops.to_device(
        torch.tensor(tokens), positions, torch.from_numpy(cache.pool.block_table([sequence.id]))
    )
    starts = torch.tensor([0, count], dtype=torch.int32)
    slots = table[0, on_device // cache.pool.page_size].long(), on_device % cache.pool.page_size
    depth, found = 0, []
    for exit_layer in exits:
        rows = PendingRows(ids, on_device, torch.full((count,), depth, dtype=torch.int32), starts, table)
        model.ops.run_layers(model.weights, model.sizes, cache.tensors, rows, exit_layer)
        cache.pool.raise_rows([sequence.id], [count], exit_layer)
        depth = exit_layer
        [states] = model.ops.to_host(cache.k, cache.hidden[slots])
        found.append(states)
    return found


def choices_after(model: Model, last: Tensor) -> list[int]:
    """The token that the model chooses after each of the states [T, D] that its last layer put out."""
    tokens: list[int] = []
    for rows in last.split(ROWS):
        [on_device] = model.ops.to_device(rows)
        best, _ = model.ops.norm_head_argmax(
            on_device, model.weights.final_norm, model.weights.lm_head, model.sizes.vocab_size, *model.sizes.head
        )
        tokens += best.tolist()
    return tokens
