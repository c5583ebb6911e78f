"""What a move of the staircase needs besides its inputs: the rows' order, and buffers that all layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .integer_rows import Rows
from .launch import split_memory
from .paged_attention import AttentionScratch, ScratchMemory
from .row_maps import MoveKind

__all__ = ["BufferSizes", "Buffers", "Level", "Move", "Workspace"]


@dataclass(frozen=True)
class BufferSizes:
    """Sizes of a model: what buffers are made from."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    # What integers the model's weights want of a layer's input, of attention's and of the activation's.
    forms: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] = ((), (), ())


class Buffers:
    """Up to ``num_rows`` rows on their way through the layers."""

    def __init__(self, sizes: BufferSizes, num_rows: int) -> None:
        device, self.num_rows = sizes.device, num_rows
        self.positions = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.slots = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.hidden = torch.empty(num_rows, sizes.hidden_size, dtype=sizes.dtype, device=device)
        self.q = torch.empty(num_rows, sizes.num_heads, sizes.head_dim, dtype=sizes.dtype, device=device)
        # K and what is added to hidden, before their norms, in models that have these.
        self.k = torch.empty(num_rows, sizes.num_kv_heads, sizes.head_dim, dtype=sizes.dtype, device=device)
        self.projected = torch.empty_like(self.hidden)
        widths = sizes.hidden_size, sizes.num_heads * sizes.head_dim, sizes.intermediate_size
        self.x, self.attention, self.activation = (
            Rows(num_rows, width, forms, device) for width, forms in zip(widths, sizes.forms, strict=True)
        )
        self.arrivals, self.partials = split_memory(num_rows, sizes.hidden_size, device)


class Workspace:
    """Memory that steps use one after the other, as much as the largest of them needs: of one cache, or of one step.

    scratch: attention's and, when that is done, logits. scores: what drafts were drawn from, kept through a draft_pass,
    and, in a verify_pass, what they are judged by.
    """

    def __init__(self) -> None:
        self.scratch, self.scores = ScratchMemory(), ScratchMemory()
        self._buffers: dict[BufferSizes, Buffers] = {}

    def buffers(self, sizes: BufferSizes, num_rows: int) -> Buffers:
        """Those of earlier calls while they suffice. Graphs keep what they were captured with."""
        found = self._buffers.get(sizes)
        if found is None or found.num_rows < num_rows:
            held = 0 if found is None else found.num_rows
            found = self._buffers[sizes] = Buffers(sizes, max(num_rows, 2 * held))
        return found


@dataclass(frozen=True)
class Level:
    """The rows that are on their way from ``depth`` on: the first ``num_rows`` of the buffers.

    rows int32 [num_rows]: them, by sequence; starts int32 [B+1]: where each sequence's begin.
    """

    depth: int
    num_rows: int
    rows: Tensor
    starts: Tensor


class Move:
    """Rows of a kind on their way: maps that are on the device (row_maps.move_rows), and buffers.

    ``order`` int32 [T] says which given row each row of the buffers is, -1 none; ``sequence_of_row`` int32 [T] whose.
    One Move serves every step of its kind: which rows these are, tokens, positions and pages are data.
    """

    def __init__(
        self, sizes: BufferSizes, kind: MoveKind, maps: Sequence[Tensor], max_positions: int, workspace: Workspace
    ) -> None:
        self.order, self.sequence_of_row, *of_levels = maps
        levels = zip(kind.levels, of_levels[::2], of_levels[1::2], strict=True)
        self.levels = [Level(depth, num_rows, rows, starts) for (depth, num_rows), rows, starts in levels]
        self.buffers = workspace.buffers(sizes, kind.num_rows)
        self.scratch = AttentionScratch(
            kind.num_rows, kind.num_sequences, kind.most_rows, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim,
            max_positions, sizes.dtype, sizes.device, workspace.scratch,
        )  # fmt: skip
