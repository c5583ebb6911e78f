"""What every layer would say: a text's hidden states after each layer, through the final norm and the LM head.

Made of the moves that decoding is made of, run_layers to each depth in turn and norm_head_argmax on the kept hidden
states, so these are the bits of decoding: layer L says what plain decoding says, layer E what draft_step drafts there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip_kernels.decoding.kv_cache import CachedSequence, PagedKVCache
from layerskip_kernels.decoding.steps import prefill
from layerskip_kernels.model.exit_adapter import ExitAdapter
from layerskip_kernels.model.model import Model
from layerskip_kernels.operands import PendingRows
from layerskip_kernels.ops.adapting import adapt_rows

__all__ = ["ExitRows", "each_exit"]

EXIT_ROWS = 64  # rows whose logits exist at a time


@dataclass(frozen=True)
class ExitRows:
    """What layer ``layer`` (1..L) says after some positions of a text, of which the first is ``position``.

    tokens int64 [n]: its best token; logits fp32 [n, V]; both on the host. A draft vocabulary does not restrict them.
    ``adapted``: the exit adapter after that layer says it, by its own head if it has one; logits outside are -inf.
    """

    layer: int
    position: int
    tokens: Tensor
    logits: Tensor
    adapted: bool = False


def each_exit(
    model: Model, token_ids: Sequence[int], start: int = 0, exits: Sequence[int] | None = None, adapters: bool = False
) -> Iterator[ExitRows]:
    """What each layer says after each of ``token_ids[start:]``: runs of rows, each from the first layer to the last.

    ``exits``: the layers that are asked, in 1..L (None: all). ``adapters``: the model's exit adapters are asked as
    well, each after the bare layer at its exit. Raises ValueError for another layer, for an empty text, one that is
    too long for the model, and ``start`` outside it.
    """
    num_layers = model.config.num_layers
    exits = range(1, num_layers + 1) if exits is None else sorted(set(exits))
    if not exits or exits[0] < 1 or exits[-1] > num_layers:
        raise ValueError(f"exits must be layers in 1..{num_layers}, got {list(exits)}")
    if not 0 <= start < len(token_ids):
        raise ValueError(f"start must be in 0..{len(token_ids) - 1}, the positions of the text, got {start}")
    model = model if adapters else model.with_exit_adapters([])
    cache = PagedKVCache.with_room_for(model, [len(token_ids)])
    cache.check_prompt(token_ids)
    sequence = cache.add_sequence(token_ids[: start or 1])
    if start:
        cache.commit(prefill(model, cache, [sequence]))
    sequence.tokens[:] = token_ids
    for first in range(start, len(token_ids), EXIT_ROWS):
        yield from _through_layers(model, cache, sequence, first, min(first + EXIT_ROWS, len(token_ids)), exits)


def _through_layers(
    model: Model, cache: PagedKVCache, sequence: CachedSequence, start: int, stop: int, exits: Sequence[int]
) -> Iterator[ExitRows]:
    """Raise the rows of positions start..stop - 1 from exit to exit; then commit them, for the rows that follow."""
    count = stop - start
    cache.pool.append([sequence.id], [count])
    tokens, positions = torch.tensor(sequence.tokens[start:stop]), torch.arange(start, stop)
    table = torch.from_numpy(cache.pool.block_table([sequence.id]))
    page_of = table[0, positions // cache.pool.page_size].long()
    page, offset = model.ops.to_device(page_of, positions % cache.pool.page_size)
    weights, sizes, adapters = model.weights, model.sizes, {a.exit_layer: a for a in model.exit_adapters}
    start_loc = torch.tensor([0, count], dtype=torch.int32)
    depth = 0
    for layer in sorted({*exits, model.config.num_layers, *adapters}):
        depths = torch.full((count,), depth, dtype=torch.int32)
        rows = PendingRows(tokens, positions, depths, start_loc, table)
        model.ops.run_layers(weights, sizes, cache.tensors, rows, layer)
        cache.pool.raise_rows([sequence.id], [stop], layer)
        depth = layer
        if layer in exits:
            best, logits = model.ops.norm_head_argmax(
                cache.hidden[page, offset], weights.final_norm, weights.lm_head, sizes.vocab_size, *sizes.head
            )
            best, logits = model.ops.to_host(cache.k, best, logits)
            yield ExitRows(layer, start, best, logits)
        if layer in adapters:
            yield ExitRows(layer, start, *_adapter_says(model, cache, adapters[layer], rows), adapted=True)
    cache.pool.commit([sequence.id], [stop])


def _adapter_says(model: Model, cache: PagedKVCache, adapter: ExitAdapter, rows: PendingRows) -> tuple[Tensor, Tensor]:
    """Of rows at its exit: each one's best token int64 [T], and logits fp32 [T, V], -inf outside a head of its own; on
    the host. Writes the adapter's K and V."""
    own = cache.adapters_to(adapter.exit_layer)[-1] if adapter.num_layers else None
    hidden = adapt_rows(model.ops, cache.hidden, own, rows)
    weights, sizes, head = adapter.draft_weights, model.sizes, adapter.head
    weight, size = (weights.lm_head, sizes.vocab_size) if head is None else (head.weight, len(head.ids))
    found = model.ops.norm_head_argmax(hidden, weights.final_norm, weight, size, *sizes.head)
    tokens, logits = model.ops.to_host(cache.k, *found)
    if head is None:
        return tokens, logits
    everywhere = torch.full((len(tokens), sizes.vocab_size), -torch.inf)
    everywhere[:, head.ids] = logits
    return head.ids[tokens], everywhere
