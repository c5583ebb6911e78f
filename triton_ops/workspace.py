"""What a move of the staircase needs besides its inputs: the rows' order, and buffers that all layers share."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .packing import row_stride
from .paged_attention import AttentionScratch

__all__ = ["Level", "Move", "Shape"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: what buffers are made from."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


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

    def __init__(self, shape: Shape, depths: list[int], starts: list[int], max_positions: int) -> None:
        num_rows, device = len(depths), shape.device
        sequence_of = [b for b in range(len(starts) - 1) for _ in range(starts[b], starts[b + 1])]
        order = sorted(range(num_rows), key=depths.__getitem__)
        self.num_rows = num_rows
        self.place = {given: row for row, given in enumerate(order)}
        self.order = _int32(order, device)
        self.sequence_of_row = _int32([sequence_of[given] for given in order], device)
        self.levels = [self._level(depth, depths, starts, device) for depth in sorted(set(depths))]

        self.positions = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.slots = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.hidden = torch.empty(num_rows, shape.hidden_size, dtype=shape.dtype, device=device)
        self.q = torch.empty(num_rows, shape.num_heads, shape.head_dim, dtype=shape.dtype, device=device)
        # Zeros, for what fills the segments up is never written.
        widths = shape.hidden_size, shape.num_heads * shape.head_dim, shape.intermediate_size
        self.x, self.attention, self.activation = (
            torch.zeros(num_rows, row_stride(width), device=device) for width in widths
        )
        self.arrivals = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.scratch = AttentionScratch(
            num_rows, len(starts) - 1, max(stop - start for start, stop in pairwise(starts)),
            shape.num_heads, shape.num_kv_heads, shape.head_dim, max_positions, device,
        )  # fmt: skip

    def _level(self, depth: int, depths: list[int], starts: list[int], device: torch.device) -> Level:
        """Of each sequence the rows that are no deeper: its last ones."""
        rows, level_starts = [], [0]
        for start, stop in pairwise(starts):
            rows += [self.place[given] for given in range(start, stop) if depths[given] <= depth]
            level_starts.append(len(rows))
        return Level(depth, len(rows), _int32(rows, device), _int32(level_starts, device))


def _int32(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
