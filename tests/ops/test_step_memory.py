"""How much memory steps of the Triton backend take at the sizes of Llama-3-8B with 131,072 positions, counted."""

import pytest
import torch

from layerskip_kernels.triton_ops.row_maps import BUCKETS, MoveKind
from layerskip_kernels.triton_ops.workspace import BufferSizes, Move, Workspace

META = torch.device("meta")
SIZES = BufferSizes(4096, 14336, num_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, device=META)
POSITIONS = 131_072
MB = 10**6


def move(workspace, levels, num_sequences, most_rows):
    kind = MoveKind(levels, num_sequences, most_rows)
    maps = [torch.empty(length, dtype=torch.int32, device=META) for length in kind.lengths()]
    return Move(SIZES, kind, maps, POSITIONS, workspace)


def tensors_of(moves):
    for made in moves:
        rows = made.buffers
        yield from (rows.positions, rows.slots, rows.hidden, rows.q, rows.k, rows.projected, rows.arrivals)
        yield from (rows.x.numbers, rows.attention.numbers, rows.activation.numbers)
        yield from (made.scratch.scores, made.scratch.m, made.scratch.l, made.scratch.o)


def held(moves):
    """Bytes of all memory that the moves hold on to, each piece counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors_of(moves)}
    return sum(storages.values())


def test_many_passes_of_a_cache_take_little_more_than_the_largest():
    kinds = [
        (((0, sequences), (8, total)), sequences, most)
        for sequences in BUCKETS
        for total in BUCKETS
        for most in (1, 2, 4, 8)
        if sequences < total
    ]
    assert len(kinds) >= 64
    shared, alone = Workspace(), [held([move(Workspace(), *kind)]) for kind in kinds]
    together = held([move(shared, *kind) for kind in kinds])
    assert together < 3 * max(alone), (together, max(alone))
    assert sum(alone) > 9000 * MB and together < 700 * MB, (together, sum(alone))


@pytest.mark.parametrize(("rows", "sequences"), [(1, 1), (8, 1), (64, 1), (64, 8), (256, 1), (256, 4), (2048, 1)])
def test_what_attention_takes_is_bounded(rows, sequences):
    """Scores: 1 KB for each row and head of each program at work; chunks to be merged: up to 256 MiB."""
    scratch = move(Workspace(), ((0, rows),), sequences, rows // sequences).scratch
    scores = scratch.scores.nbytes
    parts = sum(tensor.nbytes for tensor in (scratch.m, scratch.l, scratch.o))
    assert scores <= max(1024 * 32 * 1024, rows * SIZES.num_heads * 1024)
    assert parts <= 256 << 20
    assert scratch.in_turn == (rows >= 32)  # where a pass has so many rows, a program has all chunks of its own
