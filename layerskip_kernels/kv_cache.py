"""The one cache of drafting and verification: pages of K and V, and a kept hidden state per position.

Which page holds what is decided by ``_kv.PagePool`` (csrc/kv/page_pool.h); this class owns the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerskip_kernels._kv import PagePool
from layerskip_kernels.memory import empty
from layerskip_kernels.model import Model

if TYPE_CHECKING:
    from layerskip_kernels.steps import Verdict

__all__ = ["PagedKVCache", "Sequence"]


@dataclass(eq=False)
class Sequence:
    """One text in a cache.

    ``tokens`` is everything known: the prompt and what was generated. The cache holds K and V of a prefix of it,
    after prefill of all tokens but the last.
    """

    id: int
    tokens: list[int] = field(default_factory=list)


class PagedKVCache:
    """Pages for ``num_pages * page_size`` positions of one model, shared by any number of sequences.

    k [L, P, G, K, S] and v [L, P, G, S, K] in the model's dtype (S = page_size; a page of k is transposed, so
    that its positions are adjacent); hidden [P, S, D]: each pending position's hidden state at its depth.
    Raises CacheFull where pages run short; the call that raised has then changed nothing.
    """

    def __init__(self, model: Model, num_pages: int, page_size: int = 16) -> None:
        c = model.config
        self.pool = PagePool(num_pages, page_size, c.num_layers)
        self.k = empty(c.num_layers, num_pages, c.num_kv_heads, c.head_dim, page_size, dtype=model.dtype)
        self.v = empty(c.num_layers, num_pages, c.num_kv_heads, page_size, c.head_dim, dtype=model.dtype)
        self.hidden = empty(num_pages, page_size, c.hidden_size, dtype=model.dtype)
        self.max_positions = c.max_positions
        self.vocab_size = c.vocab_size

    @classmethod
    def with_room_for(cls, model: Model, lengths: ListLike[int], page_size: int = 16) -> PagedKVCache:
        """A cache that holds sequences of these lengths, and no more."""
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        return cls(model, max(1, sum(-(-length // page_size) for length in lengths)), page_size)

    @classmethod
    def with_memory(cls, model: Model, num_bytes: int, page_size: int = 16, prefix_sharing: bool = False) -> PagedKVCache:
        """A cache of as many pages as fit into ``num_bytes``; raises ValueError where not even one does."""
        c = model.config
        values = 2 * c.num_layers * c.num_kv_heads * c.head_dim + c.hidden_size
        page_bytes = values * page_size * model.dtype.itemsize
        if num_bytes < page_bytes:
            raise ValueError(f"memory must be at least {page_bytes} bytes, one page of this model, got {num_bytes}")
        return cls(model, num_bytes // page_bytes, page_size, prefix_sharing)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.k, self.v, self.hidden

    def add_sequence(self, tokens: ListLike[int]) -> Sequence:
        """A new sequence with its prompt: at least one token, all inside the vocabulary."""
        tokens = list(tokens)
        self.check_prompt(tokens)
        return Sequence(self.pool.add_sequence(), tokens)

    def check_prompt(self, tokens: ListLike[int]) -> None:
        """Raise ValueError for a prompt that add_sequence would refuse."""
        if not tokens:
            raise ValueError("the prompt is empty; give at least one token (a beginning-of-text token will do)")
        for i, token in enumerate(tokens):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"prompt token {i} is {token}, outside the vocabulary 0..{self.vocab_size - 1}")
        if len(tokens) > self.max_positions:
            raise ValueError(f"the prompt has {len(tokens)} tokens; the model has {self.max_positions} positions")

    def free(self, sequence: Sequence) -> None:
        """Give a sequence's pages back; it can't be used any more."""
        self.pool.free_sequence(sequence.id)

    def length(self, sequence: Sequence) -> int:
        """Committed positions of a sequence."""
        return self.pool.committed(sequence.id)

    def commit(self, verdict: Verdict) -> None:
        """Keep what a verification accepted: a length per sequence. Rejected rows vanish."""
        sequences = verdict.draft.sequences
        accepted = verdict.num_accepted.tolist()
        lengths = [len(s.tokens) + a for s, a in zip(sequences, accepted, strict=True)]
        self.pool.commit([s.id for s in sequences], lengths)
        for b, sequence in enumerate(sequences):
            sequence.tokens += verdict.new_tokens(b)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Cut a sequence back to ``length`` positions, known tokens included (one more than the cache holds)."""
        self.pool.truncate(sequence.id, length)
        del sequence.tokens[length + 1 :]

    def rollback(self, sequences: ListLike[Sequence]) -> None:
        """Drop every row that is not committed: the state before the step that failed or was given up."""
        for sequence in sequences:
            self.pool.rollback(sequence.id)

    def export(self, sequence: Sequence) -> tuple[Tensor, Tensor]:
        """Copies of a sequence's committed k and v, both [L, length, G, K], whatever the pages."""
        positions = torch.arange(self.length(sequence))
        pages = torch.tensor(self.pool.pages(sequence.id), dtype=torch.int64)
        page, offset = pages[positions // self.pool.page_size], positions % self.pool.page_size
        return self.k[:, page, :, :, offset].transpose(0, 1), self.v[:, page, :, offset, :].transpose(0, 1)
