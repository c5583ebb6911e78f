"""Plans of steps, kept and replayed: the second step of a kind is captured in a CUDA graph, later ones replay it.

A kind is everything that decides which kernels run on which buffers: draft counts, depths, rows per sequence, exit
layer, the block table's width. Tokens, positions and pages are copied into the plan's own inputs first. On the CPU
(interpreted) a plan is kept, too, and run kernel by kernel.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .contract import CHUNK
from .launch import blocks
from .steps import Cache, DraftPlan, Llama, VerifyPlan

__all__ = ["PlannedSteps"]

MAX_PLANS = 64  # for each cache
MAX_KEPT_ROWS = 64  # more rows are a prompt: its plan is large, seldom met again, and longer to run than to launch


class Recorded:
    """A function of fixed inputs: called the first time, captured the second, replayed from then on."""

    def __init__(self, run: Callable[[], Any], capture: bool) -> None:
        self._run, self._capture = run, capture
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None

    def __call__(self) -> Any:
        self._calls += 1
        if not self._capture or self._calls == 1:
            return self._run()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = self._run()
        self._graph.replay()
        return self._result


class StaticInputs:
    """Where a plan reads tokens, positions int64 [N] and block_table int32 [B, width] from."""

    def __init__(self, num_tokens: int, num_sequences: int, width: int, device: torch.device) -> None:
        self.tokens = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self.positions = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self.block_table = torch.full((num_sequences, width), -1, dtype=torch.int32, device=device)

    def copy(self, tokens: Tensor, positions: Tensor, block_table: Tensor) -> None:
        self.tokens.copy_(tokens, non_blocking=True)
        self.positions.copy_(positions, non_blocking=True)
        self.block_table[:, : block_table.size(1)].copy_(block_table, non_blocking=True)


def table_width(max_blocks: int, page_size: int) -> int:
    """Pages of a block table, filled up to a power of two of attention chunks: few kinds as a text grows."""
    chunks = blocks(max_blocks * page_size, CHUNK)
    return blocks((1 << max(0, chunks - 1).bit_length()) * CHUNK, page_size)


class PlannedSteps:
    """draft_step and verify_step with plans; their arguments and results as in steps.py.

    num_drafts, depths and query_start_loc are read on the host. Results are buffers of the plan: the next step of the
    same kind on the same cache overwrites them.
    """

    def __init__(self) -> None:
        self._plans: dict[int, OrderedDict[Hashable, Any]] = {}

    def draft_step(
        self, weights: list[Tensor], k_cache: Tensor, v_cache: Tensor, hidden_cache: Tensor, tokens: Tensor,
        positions: Tensor, num_drafts: Tensor, block_table: Tensor, draft_head: Tensor | None,
        draft_ids: Tensor | None, exit_layer: int, max_drafts: int, *sizes: Any,
    ) -> Tensor:  # fmt: skip
        counts = num_drafts.tolist()
        head, head_size = (weights[2], sizes[2]) if draft_ids is None else (draft_head, len(draft_ids))
        width = table_width(block_table.size(1), hidden_cache.size(1))

        def make() -> tuple[StaticInputs, Recorded]:
            inputs = StaticInputs(len(counts), len(counts), width, k_cache.device)
            llama, cache = Llama(weights, *sizes), _weak_cache(k_cache, v_cache, hidden_cache, inputs)
            plan = DraftPlan(llama, cache(), counts, max_drafts, head_size)
            ids = None if draft_ids is None else draft_ids.to(k_cache.device)
            return inputs, Recorded(
                lambda: plan.run(llama, cache(), inputs.tokens, inputs.positions, head, head_size, ids, exit_layer),
                k_cache.is_cuda,
            )

        key = ("draft", id(weights), head.data_ptr(), head_size, tuple(counts), max_drafts, exit_layer, width, sizes)
        inputs, recorded = self._plan(k_cache, key, make)
        inputs.copy(tokens, positions, block_table)
        return recorded()

    def verify_step(
        self, weights: list[Tensor], k_cache: Tensor, v_cache: Tensor, hidden_cache: Tensor, tokens: Tensor,
        positions: Tensor, depths: Tensor, query_start_loc: Tensor, num_drafts: Tensor, block_table: Tensor,
        *sizes: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        kind = depths.tolist(), query_start_loc.tolist(), num_drafts.tolist()
        width = table_width(block_table.size(1), hidden_cache.size(1))

        def make() -> tuple[StaticInputs, Recorded]:
            inputs = StaticInputs(len(tokens), len(num_drafts), width, k_cache.device)
            llama, cache = Llama(weights, *sizes), _weak_cache(k_cache, v_cache, hidden_cache, inputs)
            plan = VerifyPlan(llama, cache(), *kind)
            return inputs, Recorded(lambda: plan.run(llama, cache(), inputs.tokens, inputs.positions), k_cache.is_cuda)

        key = ("verify", id(weights), *map(tuple, kind), width, sizes)
        inputs, recorded = make() if len(tokens) > MAX_KEPT_ROWS else self._plan(k_cache, key, make)
        inputs.copy(tokens, positions, block_table)
        return recorded()

    def _plan(self, k_cache: Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
        """The plan of a kind, the least recently used one making room; all go when their cache goes."""
        plans = self._plans.get(id(k_cache))
        if plans is None:
            plans = self._plans[id(k_cache)] = OrderedDict()
            weakref.finalize(k_cache, self._plans.pop, id(k_cache), None)
        if key not in plans:
            plans[key] = make()
            if len(plans) > MAX_PLANS:
                plans.popitem(last=False)
        plans.move_to_end(key)
        return plans[key]


def _weak_cache(k: Tensor, v: Tensor, hidden: Tensor, inputs: StaticInputs) -> Callable[[], Cache]:
    """The cache's tensors with the plan's own block table, not kept alive by the plan."""
    references = [weakref.ref(tensor) for tensor in (k, v, hidden)]

    def cache() -> Cache:
        k, v, hidden = (reference() for reference in references)
        return Cache(k, v, hidden, inputs.block_table)

    return cache
