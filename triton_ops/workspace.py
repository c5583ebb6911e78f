"""What a move of the staircase needs besides its inputs: the rows' order, and buffers that all layers share."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .integer_rows import Rows
from .paged_attention import AttentionScratch, ScratchMemory
from .transfer import to_device

__all__ = ["BufferSizes", "Level", "Move", "int32"]


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
    """Rows of known depths, and their buffers.

    Rows stand in the buffers by depth, so that those on their way through a layer are always the first: ``order`` int32
    [T] says which given row each is, ``sequence_of_row`` int32 [T] whose. Depends on depths and query_start_loc alone,
    not on tokens, positions or pages: one Move serves every step of its kind.
    """

    def __init__(
        self, sizes: BufferSizes, depths: list[int], starts: list[int], max_positions: int, scratch: ScratchMemory
    ) -> None:
        num_rows, device = len(depths), sizes.device
        sequence_of = [b for b in range(len(starts) - 1) for _ in range(starts[b], starts[b + 1])]
        order = sorted(range(num_rows), key=depths.__getitem__)
        self.num_rows = num_rows
        self.place = {given: row for row, given in enumerate(order)}
        levels = {depth: self._level(depth, depths, starts) for depth in sorted(set(depths))}
        self.order, self.sequence_of_row, *of_levels = to_device(
            device,
            int32(order),
            int32([sequence_of[given] for given in order]),
            *(int32(values) for level in levels.values() for values in level),
        )
        pairs = zip(levels, of_levels[::2], of_levels[1::2], strict=True)
        self.levels = [Level(depth, len(rows), rows, level_starts) for depth, rows, level_starts in pairs]

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
        self.arrivals = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.scratch = AttentionScratch(
            num_rows, len(starts) - 1, max(stop - start for start, stop in pairwise(starts)),
            sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, max_positions, device, scratch,
        )  # fmt: skip

    def _level(self, depth: int, depths: list[int], starts: list[int]) -> tuple[list[int], list[int]]:
        """Of each sequence the rows that are no deeper, its last ones; and where each sequence's begin."""
        rows, level_starts = [], [0]
        for start, stop in pairwise(starts):
            rows += [self.place[given] for given in range(start, stop) if depths[given] <= depth]
            level_starts.append(len(rows))
        return rows, level_starts


def int32(values: list[int]) -> Tensor:
    """On the host."""
    return torch.tensor(values, dtype=torch.int32)
