"""The one cache of drafting and verification: pages of K and V, and a kept hidden state per position.

Which page holds what is decided by ``_kv.PagePool`` (csrc/kv/page_pool.h); this class owns the tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from layerskip_kernels._kv import PagePool
from layerskip_kernels.decoding.swap import SwappedKV, read_swapped, write_swapped
from layerskip_kernels.decoding.types import CachedSequence, Verdict
from layerskip_kernels.model.model import Model
from layerskip_kernels.operands import AdapterLayers, CacheTensors
from layerskip_kernels.ops import Backend, cache_ops
from layerskip_kernels.ops.staging import Staging

__all__ = ["CacheStats", "PagedKVCache"]


@dataclass(frozen=True)
class CacheStats:
    """Pages by state, and what happened since the cache was made."""

    num_free: int  # pages that hold nothing
    num_cached: int  # published pages that no sequence holds: reused by prompts that begin alike, or evicted
    num_owned: int  # pages of sequences
    num_shared: int  # of the owned ones: of several sequences
    num_sequences: int
    used_positions: int  # of the owned pages; a shared one counts once
    unused_positions: int  # of the owned pages: less than a page per sequence
    queried_tokens: int  # of prompts looked up for sharing
    hit_tokens: int  # of these, found in the cache and not computed again
    num_evictions: int
    num_copies: int  # of shared pages, before a write

    @property
    def hit_rate(self) -> float | None:
        """Found over looked-up tokens; None where nothing was looked up."""
        return self.hit_tokens / self.queried_tokens if self.queried_tokens else None

    @property
    def fragmentation(self) -> float:
        """The part of the owned pages' positions that holds nothing."""
        positions = self.used_positions + self.unused_positions
        return self.unused_positions / positions if positions else 0.0


class PagedKVCache:
    """Pages for ``num_pages * page_size`` positions of one model, shared by any number of sequences.

    It belongs to that model, and to copies of it that differ in the draft vocabulary alone, not in the exit adapters:
    every step, engine and swap that is given the cache with another model raises ValueError.

    k [L, P, G, K, S] and v [L, P, G, S, K] in the model's dtype (S = page_size; a page of k is transposed, so
    that its positions are adjacent); hidden [P, S, D]: each pending position's hidden state at its depth. K and V of
    exit adapters' layers, if they attend, follow in the same pages, adapter by adapter: ``all_k`` and ``all_v`` have
    those of all layers, which swaps, forks and prefix sharing move together. Raises CacheFull where pages run short;
    the call that raised has then changed nothing.

    ``prefix_sharing``: prompts that begin like a text in the cache, under the same salt, take its full pages
    instead of computing them; the pages of freed sequences are kept for that, until they are needed. The bits are
    the same, the time a prompt takes is not: it tells whether someone else sent its beginning, unless their salts
    differ.

    Threads: the pool's calls are atomic. Sequences of different threads may be moved at the same time; one sequence
    belongs to one thread at a time.
    """

    def __init__(self, model: Model, num_pages: int, page_size: int = 16, prefix_sharing: bool = False) -> None:
        c = model.config
        self.model = model
        model.extend_positions(num_pages * page_size)
        empty = model.ops.empty
        layers, own = c.num_layers + model.num_adapter_kv_layers, c.num_layers
        self.all_k = empty(layers, num_pages, c.num_kv_heads, c.head_dim, page_size, dtype=model.dtype)
        self.all_v = empty(layers, num_pages, c.num_kv_heads, page_size, c.head_dim, dtype=model.dtype)
        self.hidden = empty(num_pages, page_size, c.hidden_size, dtype=model.dtype)
        self.k, self.v = self.all_k[:own], self.all_v[:own]
        self._adapters: dict[int, AdapterLayers] = {}  # by exit; before its own each has a layer that is not touched
        end = own
        for adapter in model.exit_adapters:
            start, end = end - 1, end + adapter.num_kv_layers
            tensors = CacheTensors(self.all_k[start:end], self.all_v[start:end], self.hidden)
            layers_there = AdapterLayers(adapter.weights, adapter.sizes, tensors, adapter.exit_layer)
            self._adapters[adapter.exit_layer] = layers_there
        self._staging = Staging()
        self._error = cache_ops.new_error(self.k.device)
        # Of the tensors alone: a pool that referred to its cache could not be collected.
        copy_page = partial(_copy_page, model.ops, self.all_k, self.all_v, self.hidden, self._error)
        identity = b"" if prefix_sharing else None  # all pages are of one model
        self.pool = PagePool(num_pages, page_size, c.num_layers, identity=identity, copy_page=copy_page)
        self.max_positions = c.max_positions
        self.vocab_size = c.vocab_size

    @classmethod
    def with_room_for(
        cls, model: Model, lengths: Sequence[int], page_size: int = 16, prefix_sharing: bool = False
    ) -> PagedKVCache:
        """A cache that holds sequences of these lengths, and no more."""
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        num_pages = max(1, sum(-(-length // page_size) for length in lengths))
        return cls(model, num_pages, page_size, prefix_sharing)

    @classmethod
    def with_memory(
        cls, model: Model, num_bytes: int, page_size: int = 16, prefix_sharing: bool = False
    ) -> PagedKVCache:
        """A cache of as many pages as fit into ``num_bytes``; raises ValueError where not even one does."""
        c = model.config
        values = 2 * (c.num_layers + model.num_adapter_kv_layers) * c.num_kv_heads * c.head_dim + c.hidden_size
        page_bytes = values * page_size * model.dtype.itemsize
        if num_bytes < page_bytes:
            raise ValueError(f"memory must be at least {page_bytes} bytes, one page of this model, got {num_bytes}")
        return cls(model, num_bytes // page_bytes, page_size, prefix_sharing)

    def adapters_to(self, layer: int) -> tuple[AdapterLayers, ...]:
        """The exit adapters that a row passes on its way to a layer (`Model.exit_at`), with their pages here."""
        return tuple(self._adapters[adapter.exit_layer] for adapter in self.model.exit_at(layer).adapters)

    @property
    def tensors(self) -> CacheTensors:
        return CacheTensors(self.k, self.v, self.hidden)

    def check_model(self, model: Model) -> None:
        """Raise ValueError unless this cache was made for ``model``, whose K and V it holds."""
        if not model.has_kv_of(self.model):
            raise ValueError(
                f"this cache was made for another model than the {model.name!r} it is used with (a checkpoint loaded "
                "twice counts as two); make one with PagedKVCache.with_memory(model, ...), or use the model it was "
                "made for"
            )

    @property
    def num_free_pages(self) -> int:
        """Pages that sequences can have: free ones, and cached ones that would be evicted."""
        return self.pool.num_available

    def pages_needed(self, sequences: Sequence[CachedSequence], counts: Sequence[int]) -> int:
        """Pages it takes to append ``counts[i]`` positions to ``sequences[i]``, copies of shared ones included."""
        return self.pool.pages_needed([s.id for s in sequences], list(counts))

    def add_sequence(self, tokens: Sequence[int], salt: bytes | str | None = None) -> CachedSequence:
        """A new sequence with its prompt: at least one token, all inside the vocabulary.

        With prefix sharing, what is found of it under the same ``salt`` is in the cache already (``length``), at
        least the last token excepted; prefill computes the rest.
        """
        tokens = list(tokens)
        self.check_prompt(tokens)
        salt = salt.encode() if isinstance(salt, str) else salt
        return CachedSequence(self.pool.add_sequence(tokens if self.pool.shares_prefixes else [], salt), tokens)

    def check_prompt(self, tokens: Sequence[int]) -> None:
        """Raise ValueError for a prompt that add_sequence would refuse."""
        if not tokens:
            raise ValueError("the prompt is empty; give at least one token (a beginning-of-text token will do)")
        for i, token in enumerate(tokens):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"prompt token {i} is {token}, outside the vocabulary 0..{self.vocab_size - 1}")
        if len(tokens) > self.max_positions:
            raise ValueError(f"the prompt has {len(tokens)} tokens; the model has {self.max_positions} positions")

    def fork(self, sequence: CachedSequence) -> CachedSequence:
        """A new sequence with the same tokens on the same pages; who writes into one first gets a copy of it.

        Raises ValueError where rows are pending: commit or roll back first.
        """
        return CachedSequence(self.pool.fork(sequence.id), list(sequence.tokens))

    def free(self, sequence: CachedSequence) -> None:
        """Give a sequence's pages back; it can't be used any more."""
        self.pool.free_sequence(sequence.id)

    def length(self, sequence: CachedSequence) -> int:
        """Committed positions of a sequence."""
        return self.pool.committed(sequence.id)

    def commit(self, *verdicts: Verdict) -> None:
        """Keep what a verification accepted, or the cycles of decode_cycles: a length per sequence. Rejected rows
        vanish."""
        sequences, waiting = verdicts[0].draft.sequences, verdicts[0].draft.num_waiting
        gained = [[token for verdict in verdicts for token in verdict.new_tokens(b)] for b in range(len(sequences))]
        of_each = zip(sequences, gained, waiting, strict=True)
        lengths = [len(s.tokens) - waits + max(0, len(tokens) - 1) for s, tokens, waits in of_each]
        self.pool.commit([s.id for s in sequences], lengths)
        for sequence, tokens in zip(sequences, gained, strict=True):
            sequence.tokens += tokens
        self._publish(sequences)

    def truncate(self, sequence: CachedSequence, length: int) -> None:
        """Cut a sequence back to ``length`` positions, known tokens included (one more than the cache holds)."""
        self.pool.truncate(sequence.id, length)
        del sequence.tokens[length + 1 :]

    def rollback(self, sequences: Sequence[CachedSequence]) -> None:
        """Drop every row that is not committed: the state before the step that failed or was given up."""
        for sequence in sequences:
            self.pool.rollback(sequence.id)
        self.model.ops.forget_errors(self.k)  # of what a device still computes of it

    def export(self, sequence: CachedSequence) -> tuple[Tensor, Tensor]:
        """Copies of a sequence's committed k and v, both [L, length, G, K], whatever the pages: the model's own."""
        kv = cache_ops.gather_kv(self._pages(sequence), self.length(sequence), self.k, self.v, self._error)
        cache_ops.check_error(self._error)
        return kv

    def swap_out(self, sequence: CachedSequence, to: str | os.PathLike[str] | None = None) -> SwappedKV | Path:
        """Move a sequence's committed k and v to host memory (None) or to a file, and give its pages back.

        Pending rows are dropped. The sequence stays, with its tokens and nothing in the cache: swap_in of what
        this returns brings it back, and so does prefill, by computing. Raises SwapError where the file cannot be
        written; the sequence is then as it was.
        """
        length = self.length(sequence)
        k, v = self._staging.fetch(self._pages(sequence), length, self.all_k, self.all_v, self._error)
        tokens = sequence.tokens[:length]
        swapped = SwappedKV.of(self.model, tokens, k, v)
        moved = swapped if to is None else write_swapped(Path(to), swapped)
        self.pool.truncate(sequence.id, 0)
        return moved

    def swap_in(self, sequence: CachedSequence, swapped: SwappedKV | str | os.PathLike[str]) -> None:
        """Bring a sequence back to where swap_out took it from; a file is left where it is.

        Raises SwapError for a file that cannot be read, for sizes or a checksum that do not fit, and for another
        model or other tokens; CacheFull when pages run short; ValueError where rows are pending. The sequence is
        then as it was: prefill can compute what is missing.
        """
        start, held = self.length(sequence), self.pool.length(sequence.id)
        if held > start:
            raise ValueError(f"sequence {sequence.id} has {held - start} pending rows; commit or roll back first")
        if not isinstance(swapped, SwappedKV):
            swapped = read_swapped(Path(swapped), self.model, self.all_k)
        swapped.check(self.model, sequence.tokens, self.all_k)
        stop = len(swapped.tokens)
        if stop <= start:
            return
        try:
            self.pool.append([sequence.id], [stop - start])
            pages, kv = self._pages(sequence), (swapped.k, swapped.v)
            self._staging.bring(pages, start, *kv, self.all_k, self.all_v, self._error)
            self.pool.raise_rows([sequence.id], [stop], self.pool.num_layers)
            self.pool.commit([sequence.id], [stop])
        except BaseException:
            self.pool.rollback(sequence.id)
            raise
        self._publish([sequence])

    def stats(self) -> CacheStats:
        return CacheStats(**self.pool.stats())

    def check_integrity(self) -> None:
        """Raise RuntimeError, naming what is broken, unless every page is accounted for."""
        self.pool.check_integrity()

    def _publish(self, sequences: Sequence[CachedSequence]) -> None:
        """Let later prompts find the full pages that were committed since the last time."""
        if not self.pool.shares_prefixes:
            return
        size = self.pool.page_size
        for sequence in sequences:
            start = self.pool.num_published(sequence.id) * size
            stop = self.length(sequence) // size * size
            if start < stop:
                # The rows are committed and their tokens known: want of memory for a name must not undo that.
                with suppress(MemoryError):
                    self.pool.publish(sequence.id, sequence.tokens[start:stop])

    def _pages(self, sequence: CachedSequence) -> Tensor:
        """A sequence's pages, int32 [blocks], on the cache's device."""
        [pages] = self.model.ops.to_device(torch.tensor(self.pool.pages(sequence.id), dtype=torch.int32))
        return pages


def _copy_page(ops: Backend, k: Tensor, v: Tensor, hidden: Tensor, error: Tensor, source: int, target: int) -> None:
    [pages] = ops.to_device(torch.tensor([source, target], dtype=torch.int32))
    cache_ops.copy_pages(pages[:1], pages[1:], k, v, hidden, error)
