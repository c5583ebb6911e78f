"""Passes, kept and replayed: the second step of a kind is captured in a CUDA graph, later ones replay it.

A kind is everything that decides which kernels run on which buffers: exit layer, the block table's width, and, in
buckets, how many rows, sequences and drafts there are. Which rows these are, tokens, positions and pages are data,
which is copied into the pass's own inputs first, so that ragged batches seldom are of a new kind. On the CPU
(interpreted) a pass is kept, too, and run kernel by kernel.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
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
from .row_maps import bucket, draft_rows, draft_steps, packed, packed_length, split, verify_rows
from .steps import DraftPass, Drawing, Leg, Llama, PagedCache, VerifyPass, head_of
from .transfer import to_device
from .workspace import Workspace

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
    """Where a pass reads tokens, positions int64 [N], block_table int32 [B, width], maps and ``others`` from.

    maps: int32 of these lengths (row_maps.packed). others: how many rows there is room for, and the first step's.
    """

    def __init__(
        self, num_tokens: int, num_sequences: int, width: int, maps: Sequence[int], device: torch.device,
        others: Sequence[tuple[int, Tensor]] = (),
    ) -> None:  # fmt: skip
        self.tokens = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self.positions = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self.block_table = torch.full((num_sequences, width), -1, dtype=torch.int32, device=device)
        self._maps = torch.zeros(packed_length(maps), dtype=torch.int32, device=device)
        self.maps = split(self._maps, maps)
        self.others = [torch.zeros(n, *like.shape[1:], dtype=like.dtype, device=device) for n, like in others]

    def copy(self, tokens: Tensor, positions: Tensor, block_table: Tensor, maps: Tensor, *others: Tensor) -> None:
        """The inputs of a step. Pages of an earlier one, of other sequences perhaps, do not stay beside the table's."""
        self.block_table.fill_(-1)
        table = self.block_table[: len(block_table), : block_table.size(1)]
        targets = [table, self.tokens, self.positions, self._maps, *self.others]
        given = to_device(self.tokens.device, block_table, tokens, positions, maps, *others)
        for target, tensor in zip(targets, given, strict=True):
            target[: len(tensor)].copy_(tensor, non_blocking=True)


def table_width(max_blocks: int, page_size: int) -> int:
    """Pages of a block table, filled up to a power of two of attention chunks: few kinds as a text grows."""
    chunks = blocks(max_blocks * page_size, CHUNK)
    return blocks((1 << max(0, chunks - 1).bit_length()) * CHUNK, page_size)


class Kept:
    """A pass's inputs, and what it launches: one function, or one for each number of rows."""

    def __init__(self, inputs: StaticInputs, step_of: Callable[[int], Callable[[], Any]]) -> None:
        self.inputs, self._step_of = inputs, step_of
        self._steps: dict[int, Recorded] = {}

    def run(self, num_rows: int) -> Any:
        if num_rows not in self._steps:
            self._steps[num_rows] = Recorded(self._step_of(num_rows), self.inputs.tokens.is_cuda)
        return self._steps[num_rows]()

    @property
    def captured(self) -> int:
        return sum(step.captured for step in self._steps.values())


class KeptDraft(Kept):
    """With the memory of its steps, which is read and written between them."""

    def __init__(self, inputs: StaticInputs, draft: DraftPass, step_of: Callable[[int], Callable[[], Any]]) -> None:
        super().__init__(inputs, step_of)
        self.draft = draft


class OfCache:
    """What steps on a cache share: their passes, the least recently used first, and memory."""

    def __init__(self) -> None:
        self.passes: OrderedDict[Hashable, Kept] = OrderedDict()
        self.workspace = Workspace()


class KeptPasses:
    """draft_pass and verify_pass, kept by kind; their arguments and results as in Backend.

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
        adapters: Sequence[AdapterLayers] = (),
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The drafts, and the scores that they were drawn from [B, max_drafts, V] ([0, ...] if not kept)."""
        counts = rows.num_drafts.tolist()
        size, room, *steps = draft_steps(counts, max_drafts)
        order, maps = draft_rows(counts, size)
        weight, head_size, ids = head_of(weights, sizes, head)
        width = table_width(rows.block_table.size(1), cache.hidden.size(1))
        edits = with_room(sampling.edits) if sampling and sampling.edits else None
        drawing, settings = Drawing.of(sampling, edits), replace(sampling, edits=edits).flat if sampling else []

        def make() -> KeptDraft:
            lengths, others = [size] * (DraftPass.MAPS + 1), [(size, tensor) for tensor in settings]
            inputs = StaticInputs(size, size, width, lengths, cache.k.device, others)
            workspace, llama = self._shared(cache.k).workspace, Llama(weights, sizes)
            paged = _weak_cache(cache, inputs, workspace)
            # How a row comes to the exit: to what depth, and through whose layers there.
            passed = [(a.exit_layer, Llama(a.weights, a.sizes), _weak_cache(a.cache, inputs, workspace))
                      for a in adapters]  # fmt: skip
            device_ids = None if ids is None else ids.to(inputs.tokens.device)
            columns = None if device_ids is None else columns_of_ids(device_ids, sizes.vocab_size)
            draft = DraftPass(
                llama, paged(), inputs.maps[: DraftPass.MAPS], inputs.tokens, inputs.positions, room, weight, head_size,
                drawing, keep_scores, columns,
            )  # fmt: skip
            draws = DraftSampling.of_flat(inputs.others) if drawing else None

            def step_of(num_rows: int) -> Callable[[], None]:
                legs, depth = [], 0
                for at, onward, pages in passed:
                    legs.append(Leg(llama, paged, draft.move(llama, paged(), num_rows, depth), at))
                    move, stop = draft.move(onward, pages(), num_rows, depth=1), len(onward.weights.layers)
                    legs.append(Leg(onward, pages, move, stop, keep=False))
                    depth = at
                if depth < exit_layer:
                    legs.append(Leg(llama, paged, draft.move(llama, paged(), num_rows, depth), exit_layer))
                return lambda: draft.step(legs, device_ids, draws)

            return KeptDraft(inputs, draft, step_of)

        key = ("draft", id(weights), weight.data_ptr(), head_size, size, room, exit_layer, width, sizes, drawing,
               keep_scores, *((a.exit_layer, id(a.weights), a.sizes) for a in adapters))  # fmt: skip
        given = [rows.tokens, rows.positions, rows.block_table, *settings]
        tokens, positions, table, *settings = given if order == sorted(order) else [tensor[order] for tensor in given]
        with self._turn(cache.k):
            kept = self._pass_of(cache.k, key, make)
            draft = kept.draft
            kept.inputs.copy(tokens, positions, table, packed(maps), *settings)
            draft.begin()
            for num_rows in steps:
                kept.run(num_rows)
            back = kept.inputs.maps[-1][: len(counts)]
            scores = draft.scores.index_select(0, back) if keep_scores else draft.scores
            return draft.drafts.index_select(0, back)[:, :max_drafts], scores[:, :max_drafts]

    def verify_pass(
        self, weights: ModelWeights, sizes: ModelSizes, cache: CacheTensors, rows: PendingRows, num_drafts: Tensor,
        judged: Tensor, sampling: JudgeSampling | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        size = bucket if len(rows.tokens) <= MAX_KEPT_ROWS else int
        edits = with_room(sampling.edits) if sampling and sampling.edits else None
        drawing = Drawing.of(sampling.draws if sampling else None, edits)
        rejecting = sampling.rejecting if sampling else ()
        kind, maps = verify_rows(
            rows.depths.tolist(), rows.query_start_loc.tolist(), num_drafts.tolist(), judged.tolist(), rejecting, size
        )
        width = table_width(rows.block_table.size(1), cache.hidden.size(1))
        settings = [*sampling.draws.flat, sampling.positions, sampling.draft_scores] if sampling else []
        edited = edits.flat if edits else []

        def make() -> Kept:
            rooms = [*[kind.num_judged] * 7, 0, *[kind.move.num_sequences] * 8]
            others = list(zip(rooms, settings + edited, strict=False))
            inputs = StaticInputs(
                kind.move.num_rows, kind.move.num_sequences, width, kind.lengths(), cache.k.device, others
            )
            workspace = self._shared(cache.k).workspace if size is bucket else Workspace()
            if drawing:
                scores = kind.num_rejecting, sizes.vocab_size
                inputs.others[7] = workspace.scores.take(math.prod(scores), cache.k.device).view(scores)
            llama, paged = Llama(weights, sizes), _weak_cache(cache, inputs, workspace)
            verify = VerifyPass(llama, paged(), kind, inputs.maps, drawing)
            draws = DraftSampling.of_flat(inputs.others[:6]) if drawing else None
            drawn = [draws, *(inputs.others[6:8] or (None, None)), LogitEdits(*inputs.others[8:]) if edits else None]
            return Kept(
                inputs, lambda _: lambda: verify.run(llama, paged(), inputs.tokens, inputs.positions, *drawn)
            )  # fmt: skip

        key = ("verify", id(weights), kind, width, sizes, drawing) if size is bucket else None
        with self._turn(cache.k):
            kept = make() if key is None else self._pass_of(cache.k, key, make)
            kept.inputs.copy(rows.tokens, rows.positions, rows.block_table, packed(maps), *settings, *edited)
            num_accepted, next_tokens, logits = kept.run(kind.move.num_rows)
            count, num_judged = len(num_drafts), int(((num_drafts + 1) * judged).sum())
            return num_accepted[:count].clone(), next_tokens[:count].clone(), logits[:num_judged].clone()

    def captured(self) -> int:
        """How many CUDA graphs there are, over all caches that are there."""
        return sum(kept.captured for of in self._of_cache.values() for kept in of.passes.values())

    @contextmanager
    def _turn(self, k_cache: Tensor) -> Iterator[None]:
        """A step, after the one before it. Its results must be copies: its next run overwrites the pass's buffers."""
        with self._lock:
            if self._done is not None:
                torch.cuda.current_stream(k_cache.device).wait_event(self._done)
            yield
            if k_cache.is_cuda:
                self._done = self._done or torch.cuda.Event()
                self._done.record(torch.cuda.current_stream(k_cache.device))

    def _pass_of(self, k_cache: Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
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


def _weak_cache(cache: CacheTensors, inputs: StaticInputs, workspace: Workspace) -> Callable[[], PagedCache]:
    """The cache's tensors with the pass's own block table, not kept alive by the pass."""
    references = [weakref.ref(tensor) for tensor in (cache.k, cache.v, cache.hidden)]

    def paged() -> PagedCache:
        k, v, hidden = (reference() for reference in references)
        assert k is not None and v is not None and hidden is not None  # the passes of a cache go with it
        return PagedCache(k, v, hidden, inputs.block_table, workspace)

    return paged
