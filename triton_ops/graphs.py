"""Passes, kept and replayed: the second step of a kind is captured in a CUDA graph, later ones replay it.

A kind is everything that decides which kernels run on which buffers: draft counts, depths, rows per sequence, exit
layer, the block table's width. Tokens, positions and pages are copied into the pass's own inputs first. On the CPU
(interpreted) a pass is kept, too, and run kernel by kernel.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels.operands import (
    AdapterLayers,
    CacheTensors,
    DraftHead,
    DraftRows,
    DraftSampling,
    JudgeSampling,
    LogitEdits,
    ModelSizes,
    ModelWeights,
    PendingRows,
)

from .contract import CHUNK
from .edit_logits import columns_of_ids, with_room
from .launch import blocks
from .paged_attention import ScratchMemory
from .steps import Adapter, DraftPass, Drawing, Llama, PagedCache, VerifyPass, head_of
from .transfer import to_device

__all__ = ["KeptPasses"]

MAX_PASSES = 64  # for each cache
MAX_KEPT_ROWS = 64  # more rows are a prompt: its pass is large, seldom met again, and longer to run than to launch


class Recorded:
    """A function of fixed inputs: called the first time, captured the second, replayed from then on.

    Where the capture fails (no memory for it, say), the function is called every time.
    """

    def __init__(self, run: Callable[[], Any], capture: bool) -> None:
        self._run, self._capture = run, capture
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def __call__(self) -> Any:
        self._calls += 1
        if self._capture and self._calls > 1 and self._graph is None:
            self._try_to_capture()
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._result

    def _try_to_capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # What other threads do with the device meanwhile is their own affair. torch's own stream for captures is
            # that of the first device which captured anything.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                self._result = self._run()
        except RuntimeError as error:
            self._capture = False
            warnings.warn(
                f"a step could not be captured in a CUDA graph and is launched kernel by kernel instead, which is "
                f"slower: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            self._graph = graph


class StaticInputs:
    """Where a pass reads tokens, positions int64 [N], block_table int32 [B, width] and ``others`` from."""

    def __init__(
        self, num_tokens: int, num_sequences: int, width: int, device: torch.device, others: Sequence[Tensor] = ()
    ) -> None:  # fmt: skip
        self.tokens = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self.positions = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self.block_table = torch.full((num_sequences, width), -1, dtype=torch.int32, device=device)
        self.others = [torch.empty(other.shape, dtype=other.dtype, device=device) for other in others]

    def copy(self, tokens: Tensor, positions: Tensor, block_table: Tensor, *others: Tensor) -> None:
        """The inputs of a step. Pages of an earlier one, of other sequences perhaps, do not stay behind the table's."""
        width = block_table.size(1)
        self.tokens.copy_(tokens, non_blocking=True)
        self.positions.copy_(positions, non_blocking=True)
        self.block_table[:, :width].copy_(block_table, non_blocking=True)
        self.block_table[:, width:].fill_(-1)
        for kept, other in zip(self.others, to_device(self.tokens.device, *others), strict=True):
            kept.copy_(other)


def table_width(max_blocks: int, page_size: int) -> int:
    """Pages of a block table, filled up to a power of two of attention chunks: few kinds as a text grows."""
    chunks = blocks(max_blocks * page_size, CHUNK)
    return blocks((1 << max(0, chunks - 1).bit_length()) * CHUNK, page_size)


class OfCache:
    """What steps on a cache share: their passes, the least recently used first, and attention's memory."""

    def __init__(self) -> None:
        self.passes: OrderedDict[Hashable, tuple[StaticInputs, Recorded]] = OrderedDict()
        self.scratch = ScratchMemory()


class KeptPasses:
    """draft_pass and verify_pass, kept by kind; their arguments and results as in steps.py.

    num_drafts, judged, depths and query_start_loc are read on the host. Steps of different threads and streams run
    one after the other, since they share the passes' buffers.
    """

    def __init__(self) -> None:
        self._of_cache: dict[int, OfCache] = {}
        self._lock = RLock()
        self._done: torch.cuda.Event | None = None  # when the last step will have been done

    def draft_pass(
        self, weights: ModelWeights, sizes: ModelSizes, cache: CacheTensors, rows: DraftRows, head: DraftHead | None,
        exit_layer: int, max_drafts: int, sampling: DraftSampling | None = None, keep_scores: bool = False,
        adapter: AdapterLayers | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The drafts, and the scores that they were drawn from [B, max_drafts, V] ([0, ...] if not kept)."""
        counts = rows.num_drafts.tolist()
        weight, size, ids = head_of(weights, sizes, head)
        width = table_width(rows.block_table.size(1), cache.hidden.size(1))
        edits = with_room(sampling.edits) if sampling and sampling.edits else None
        drawing, others = Drawing.of(sampling, edits), replace(sampling, edits=edits).flat if sampling else []

        def make() -> tuple[StaticInputs, Recorded]:
            inputs = StaticInputs(len(counts), len(counts), width, cache.k.device, others)
            scratch = self._shared(cache.k).scratch
            llama, paged = Llama(weights, sizes), _weak_cache(cache, inputs, scratch)
            pages = _weak_cache(adapter.cache, inputs, scratch) if adapter else None
            onward = Llama(adapter.weights, adapter.sizes) if adapter else None

            def adapted() -> Adapter | None:
                return Adapter(onward, pages()) if onward is not None and pages is not None else None

            device_ids = None if ids is None else ids.to(inputs.tokens.device)
            columns = columns_of_ids(device_ids, sizes.vocab_size) if device_ids is not None else None
            draft = DraftPass(
                llama, paged(), counts, max_drafts, weight, size, drawing, keep_scores, adapted(), columns
            )  # fmt: skip
            settings = DraftSampling.of_flat(inputs.others) if drawing else None
            return inputs, Recorded(
                lambda: draft.run(
                    llama,
                    paged(),
                    inputs.tokens,
                    inputs.positions,
                    weight,
                    size,
                    device_ids,
                    exit_layer,
                    settings,
                    adapted(),
                ),
                inputs.tokens.is_cuda,
            )

        key = ("draft", id(weights), weight.data_ptr(), size, tuple(counts), max_drafts, exit_layer, width, sizes,
               drawing, keep_scores, adapter and id(adapter.weights), adapter and adapter.sizes)  # fmt: skip
        return self._run(cache.k, key, make, rows.tokens, rows.positions, rows.block_table, *others)

    def verify_pass(
        self, weights: ModelWeights, sizes: ModelSizes, cache: CacheTensors, rows: PendingRows, num_drafts: Tensor,
        judged: Tensor, sampling: JudgeSampling | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        kind = rows.depths.tolist(), rows.query_start_loc.tolist(), num_drafts.tolist(), judged.tolist()
        width = table_width(rows.block_table.size(1), cache.hidden.size(1))

        kept = len(rows.tokens) <= MAX_KEPT_ROWS
        edits = with_room(sampling.edits) if sampling and sampling.edits else None
        drawing, rejecting = (
            Drawing.of(sampling.draws if sampling else None, edits),
            sampling.rejecting if sampling else (),
        )
        others = [*sampling.draws.flat, sampling.positions, sampling.draft_scores] if sampling else []
        others += edits.flat if edits else []

        def make() -> tuple[StaticInputs, Recorded]:
            inputs = StaticInputs(len(rows.tokens), len(num_drafts), width, cache.k.device, others)
            scratch = self._shared(cache.k).scratch if kept else ScratchMemory()
            llama, paged = Llama(weights, sizes), _weak_cache(cache, inputs, scratch)
            verify = VerifyPass(llama, paged(), *kind, drawing, rejecting)
            draws = DraftSampling.of_flat(inputs.others[:6]) if drawing else None
            positions, scores = inputs.others[6:8] if drawing else (None, None)
            own_edits = LogitEdits(*inputs.others[8:]) if edits else None
            return inputs, Recorded(
                lambda: verify.run(
                    llama, paged(), inputs.tokens, inputs.positions, draws, positions, scores, own_edits
                ),
                inputs.tokens.is_cuda,
            )

        key = ("verify", id(weights), *map(tuple, kind), width, sizes, drawing, rejecting) if kept else None
        return self._run(cache.k, key, make, rows.tokens, rows.positions, rows.block_table, *others)

    def captured(self) -> int:
        """How many passes are CUDA graphs, over all caches that are there."""
        return sum(recorded.captured for of in self._of_cache.values() for _, recorded in of.passes.values())

    def _run(
        self, k_cache: Tensor, key: Hashable | None, make: Callable[[], tuple[StaticInputs, Recorded]], *inputs: Tensor
    ) -> Any:
        """A step of a kind (None: of one that is not kept), after the one before it. The results are copies."""
        with self._lock:
            if self._done is not None:
                torch.cuda.current_stream(k_cache.device).wait_event(self._done)
            static, recorded = make() if key is None else self._pass_of(k_cache, key, make)
            static.copy(*inputs)
            results = recorded()  # in buffers of the pass, which its next run overwrites
            copies = tuple(result.clone() for result in results)
            if k_cache.is_cuda:
                self._done = self._done or torch.cuda.Event()
                self._done.record(torch.cuda.current_stream(k_cache.device))
            return copies

    def _pass_of(self, k_cache: Tensor, key: Hashable, make: Callable[[], Any]) -> tuple[StaticInputs, Recorded]:
        """The pass of a kind, the least recently used one making room; all go when their cache goes."""
        passes = self._shared(k_cache).passes
        if key not in passes:
            passes[key] = make()
            if len(passes) > MAX_PASSES:
                passes.popitem(last=False)
        passes.move_to_end(key)
        return passes[key]

    def _shared(self, k_cache: Tensor) -> OfCache:
        found = self._of_cache.get(id(k_cache))
        if found is None:
            found = self._of_cache[id(k_cache)] = OfCache()
            weakref.finalize(k_cache, self._of_cache.pop, id(k_cache), None)
        return found


def _weak_cache(cache: CacheTensors, inputs: StaticInputs, scratch: ScratchMemory) -> Callable[[], PagedCache]:
    """The cache's tensors with the pass's own block table, not kept alive by the pass."""
    references = [weakref.ref(tensor) for tensor in (cache.k, cache.v, cache.hidden)]

    def paged() -> PagedCache:
        k, v, hidden = (reference() for reference in references)
        assert k is not None and v is not None and hidden is not None  # the passes of a cache go with it
        return PagedCache(k, v, hidden, inputs.block_table, scratch)

    return paged
