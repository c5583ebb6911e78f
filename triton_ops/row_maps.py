"""Which row of a pass's buffers is which given row: numbers of rows in buckets, and the rest as data on the device.

A pass that is launched for a bucket serves every step whose rows, sequences and drafts the bucket holds. Rows beyond a
step's own are padding: no map names them but as -1, and they write no K, V or hidden state and note no error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

__all__ = [
    "MoveKind", "VerifyKind", "bucket", "draft_rows", "draft_steps", "move_rows", "packed", "packed_length", "split",
    "verify_rows",
]  # fmt: skip

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
FEW = 16  # rows for which a smaller bucket would save little
MOST_TOGETHER = 8  # rows of a sequence that attention takes together
LEAST_ROOM = 8  # for sequences that draft, and for their drafts
ALIGNED = 4  # int32 in 16 bytes: Triton compiles kernels again for pointers that are aligned to less


def bucket(count: int) -> int:
    """The least of BUCKETS that holds ``count``; none and more than the largest stay as they are."""
    return next((size for size in BUCKETS if count <= size), count) if count else 0


def draft_steps(counts: Sequence[int], max_drafts: int) -> list[int]:
    """Room for sequences and for their drafts, and the rows of each step."""
    steps = [bucket(sum(count > i for count in counts)) for i in range(max(counts, default=0))]
    return [max(LEAST_ROOM, bucket(len(counts))), max(LEAST_ROOM, bucket(max_drafts)), *steps]


def draft_rows(counts: Sequence[int], size: int) -> tuple[list[int], list[list[int]]]:
    """The sequences by how much they draft, the most first; for ``size`` rows the maps that DraftPass takes, and the
    row of each given sequence."""
    order = sorted(range(len(counts)), key=lambda b: -counts[b])
    rows = [row if counts[b] else -1 for row, b in enumerate(order)]
    maps = [rows, [counts[b] for b in order], [0] * len(order), [order.index(b) for b in range(len(order))]]
    return order, [[*part, *[fill] * (size - len(part))] for part, fill in zip(maps, (-1, 0, 0, 0), strict=True)]


@dataclass(frozen=True)
class MoveKind:
    """What decides the launches of a move: at which depths rows join, and how many rows of the buffers are on their
    way from there on; the number of sequences, and the most rows that one of them has."""

    levels: tuple[tuple[int, int], ...]
    num_sequences: int
    most_rows: int

    @property
    def num_rows(self) -> int:
        return self.levels[-1][1]

    def lengths(self) -> list[int]:
        """Of the maps that move_rows makes."""
        of_levels = (length for _, rows in self.levels for length in (rows, self.num_sequences + 1))
        return [self.num_rows, self.num_rows, *of_levels]


def move_rows(
    depths: Sequence[int], starts: Sequence[int], size: Callable[[int], int] = bucket
) -> tuple[MoveKind, list[list[int]], dict[int, int]]:
    """Rows stand in the buffers by depth, so that those on their way through a layer are always the first.

    The maps: which given row each row of the buffers is, and whose; for each level its given rows' places, by sequence,
    and where each sequence's begin. Also the place of each given row. ``size``: how many rows there are room for.
    """
    sequence_of = [b for b, (start, stop) in enumerate(pairwise(starts)) for _ in range(start, stop)]
    order: list[int] = []
    levels: list[tuple[int, int]] = []
    for depth, joining in groupby(sorted(range(len(depths)), key=depths.__getitem__), depths.__getitem__):
        order += joining
        levels.append((depth, size(len(order))))
        order += [-1] * (levels[-1][1] - len(order))
    place = {given: row for row, given in enumerate(order) if given >= 0}
    num_sequences = size(len(starts) - 1)
    maps = [order, [sequence_of[given] if given >= 0 else 0 for given in order]]
    for depth, num_rows in levels:
        rows, begins = [], [0]
        for start, stop in pairwise(starts):
            rows += [place[given] for given in range(start, stop) if depths[given] <= depth]
            begins.append(len(rows))
        maps += [rows + [-1] * (num_rows - len(rows)), begins + begins[-1:] * (num_sequences + 1 - len(begins))]
    most_rows = size(max(stop - start for start, stop in pairwise(starts)))
    if size is bucket and most_rows > MOST_TOGETHER:  # a chunk of a prompt
        most_rows = levels[-1][1]
    return MoveKind(tuple(levels), num_sequences, most_rows), maps, place


@dataclass(frozen=True)
class VerifyKind:
    """What decides the launches of a verification besides: rows that are judged, the most drafts of a sequence, and
    drafts that the rejection rule judges."""

    move: MoveKind
    num_judged: int
    most_drafts: int
    num_rejecting: int

    def lengths(self) -> list[int]:
        """Of the maps that verify_rows makes."""
        judged, sequences, rejecting = self.num_judged, self.move.num_sequences, self.num_rejecting
        return [*self.move.lengths(), *[judged] * 5, *[sequences] * 4, rejecting, rejecting]


def verify_rows(
    depths: Sequence[int], starts: Sequence[int], num_drafts: Sequence[int], judged: Sequence[bool],
    rejecting: Sequence[bool] = (), size: Callable[[int], int] = bucket,
) -> tuple[VerifyKind, list[list[int]]]:  # fmt: skip
    """The maps of the move; of the judged rows their places, their numbers, their sequences, where these's drafts begin
    among the given rows and how many stand before the row; of each sequence where its rows end
    among the given, its first judged row, its drafts and whether it is judged; of the drafts that the rejection rule
    judges, the judged row and the given row."""
    move, maps, place = move_rows(depths, starts, size)
    places: list[int] = []
    judged_of: list[tuple[int, int, int]] = []
    first_judged: list[int] = []
    rejecting_rows: list[int] = []
    draft_rows: list[int] = []
    for b, drafts in enumerate(num_drafts):
        first_judged.append(len(places))
        if judged[b]:
            if any(rejecting[b : b + 1]):
                rejecting_rows += range(len(places), len(places) + drafts)
                draft_rows += range(starts[b + 1] - drafts, starts[b + 1])
            places += [place[given] for given in range(starts[b + 1] - drafts - 1, starts[b + 1])]
            judged_of += [(b, starts[b + 1] - drafts, i) for i in range(drafts + 1)]
    num_judged, most_drafts = size(len(places)), max(num_drafts, default=0)
    if size is bucket:  # as few kinds as cost little
        num_judged = max(num_judged, min(move.num_rows, FEW)) if places else 0
        most_drafts = max(most_drafts, min(move.most_rows, MOST_TOGETHER) - 1)
    most_drafts = (1 << most_drafts.bit_length()) - 1
    kind = VerifyKind(move, num_judged, most_drafts, size(len(rejecting_rows)))
    unjudged, sequences = kind.num_judged - len(places), move.num_sequences - len(num_drafts)
    more = [-1] * (kind.num_rejecting - len(rejecting_rows))
    return (
        kind,
        [
            *maps,
            places + places[:1] * unjudged,  # computed again, to the same bits
            [*range(len(places)), *[-1] * unjudged],
            *([*(row[i] for row in judged_of), *[-1] * unjudged] for i in range(3)),
            [*starts[1:], *[0] * sequences],
            [*first_judged, *[0] * sequences],
            [*num_drafts, *[0] * sequences],
            [*map(int, judged), *[0] * sequences],
            rejecting_rows + more,
            draft_rows + more,
        ],
    )


def _room(length: int) -> int:
    return -(-length // ALIGNED) * ALIGNED


def packed_length(lengths: Sequence[int]) -> int:
    """Of what ``packed`` makes of maps of these lengths."""
    return sum(map(_room, lengths))


def packed(maps: Sequence[Sequence[int]]) -> Tensor:
    """int32 on the host, each map from an aligned place on: one copy brings them to a device."""
    return torch.tensor([i for part in maps for i in (*part, *[0] * (_room(len(part)) - len(part)))], dtype=torch.int32)


def split(numbers: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The maps of these lengths, of what ``packed`` packed."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + _room(length))
    return [numbers[begin : begin + length] for begin, length in zip(ends, lengths, strict=False)]
