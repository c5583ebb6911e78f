"""Bias, penalties and a least length: edits of a few tokens' logits, before all else (reference.edit_logits).

    s + bias;  seen: s < 0 ? s * repetition : s / repetition;  generated n times: (s - frequency * n) - presence;
    an end too early: -inf

A program has a block of a sequence's listed tokens, each of which stands there once; the last has the drafts that are
not listed. What was drafted since the list was made is counted here: drafts are on the device. Moves 21 bytes of each
listed token and 8 of its logit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerskip_kernels.operands import LogitEdits

from .contract import device_function
from .launch import OPTIONS, blocks

__all__ = ["Preceding", "columns_of_ids", "edit_logits", "edit_rows", "with_room"]

BLOCK = 256  # listed tokens of a program
LEAST_ROOM = 64  # for listed tokens; then powers of two, so that few kinds of steps differ in it


@device_function
def _edited(score, seen, generated, repetition, frequency, presence):
    """A score under the penalties."""
    penalised = tl.where(score < 0.0, score * repetition, tl.div_rn(score, repetition))
    score = tl.where(seen, penalised, score)
    return tl.where(generated > 0, (score - frequency * generated.to(tl.float32)) - presence, score)


@triton.jit
def _edit_kernel(
    logits_ptr, sequence_ptr, places_ptr, positions_ptr, tokens_ptr, first_ptr, drafted_ptr, columns_ptr,
    repetitions_ptr, frequencies_ptr, presences_ptr, least_ptr, ids_ptr, biases_ptr, counts_ptr, ends_ptr, N, V, E,
    position_step,
    HAS_COLUMNS: tl.constexpr, DRAFTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    sequence = tl.load(sequence_ptr + row).to(tl.int64)
    if sequence < 0:
        return
    repetition = tl.load(repetitions_ptr + sequence)
    frequency, presence = tl.load(frequencies_ptr + sequence), tl.load(presences_ptr + sequence)
    drafted, drafts_ptr = tl.load(drafted_ptr + row), tokens_ptr + tl.load(first_ptr + row)
    if pid * BLOCK < E:
        listed = pid * BLOCK + tl.arange(0, BLOCK)
        place = sequence * E + listed
        token = tl.load(ids_ptr + place, mask=listed < E, other=-1)
        mask = token >= 0
        times = tl.zeros([BLOCK], tl.int64)
        for i in range(0, drafted):
            times += (token == tl.load(drafts_ptr + i)).to(tl.int64)
        count = tl.load(counts_ptr + place, mask=mask, other=-1)
        column = token
        if HAS_COLUMNS:
            column = tl.load(columns_ptr + token, mask=mask, other=-1).to(tl.int64)
            mask = column >= 0
        score = tl.load(logits_ptr + row * N + column, mask=mask, other=0.0)
        score = score + tl.load(biases_ptr + place, mask=mask, other=0.0)
        generated = tl.maximum(count, 0) + times
        score = _edited(score, (count >= 0) | (times > 0), generated, repetition, frequency, presence)
        position = tl.load(positions_ptr + tl.load(places_ptr + row)) + position_step
        too_early = position < tl.load(least_ptr + sequence)
        ends = tl.load(ends_ptr + place, mask=mask, other=0) != 0
        score = tl.where(ends & too_early, -float("inf"), score)
        tl.store(logits_ptr + row * N + column, score, mask=mask)
    else:
        nth = tl.arange(0, DRAFTS)
        draft = tl.load(drafts_ptr + nth, mask=nth < drafted, other=-1)
        is_new = (draft >= 0) & (draft < V)
        often = tl.zeros([DRAFTS], tl.int64)
        for j in range(0, drafted):
            same = draft == tl.load(drafts_ptr + j)
            often += same.to(tl.int64)
            is_new = is_new & ~(same & (j < nth))
        for start in range(0, E, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            known = tl.load(ids_ptr + sequence * E + entry, mask=entry < E, other=-1)
            is_new = is_new & (tl.max((known[None, :] == draft[:, None]).to(tl.int32), axis=1) == 0)
        where = draft
        if HAS_COLUMNS:
            where = tl.load(columns_ptr + draft, mask=is_new, other=-1).to(tl.int64)
            is_new = is_new & (where >= 0)
        logit = tl.load(logits_ptr + row * N + where, mask=is_new, other=0.0)
        logit = _edited(logit, often > 0, often, repetition, frequency, presence)
        tl.store(logits_ptr + row * N + where, logit, mask=is_new)


class Preceding:
    """Which drafts stand before each of T rows: ``drafted`` of them, from ``first`` on among tokens; int32 [T] both.

    most: at least the greatest of ``drafted``, on the host.
    """

    def __init__(self, first: Tensor, drafted: Tensor, most: int) -> None:
        self.first, self.drafted, self.most = first, drafted, most


def edit_rows(
    logits: Tensor, sequences: Tensor, places: Tensor, positions: Tensor, tokens: Tensor, preceding: Preceding,
    edits: LogitEdits, vocab_size: int, columns: Tensor | None = None, position_step: int = 0,
) -> None:  # fmt: skip
    """Edit rows of logits fp32 [T, N] in place: row r is sequences[r]'s (-1: nobody's), at positions[places[r]] +
    position_step.

    sequences, places int32 [T]; positions, tokens int64; columns int32 [V]: where each token stands in a row, -1 for
    nowhere (None: token n is column n).
    """
    width = edits.ids.size(1)
    _edit_kernel[(blocks(width, BLOCK) + (preceding.most > 0), len(sequences))](
        logits_ptr=logits,
        sequence_ptr=sequences,
        places_ptr=places,
        positions_ptr=positions,
        tokens_ptr=tokens,
        first_ptr=preceding.first,
        drafted_ptr=preceding.drafted,
        columns_ptr=sequences if columns is None else columns,
        repetitions_ptr=edits.repetitions,
        frequencies_ptr=edits.frequencies,
        presences_ptr=edits.presences,
        least_ptr=edits.least_positions,
        ids_ptr=edits.ids,
        biases_ptr=edits.biases,
        counts_ptr=edits.counts,
        ends_ptr=edits.ends,
        N=logits.size(1),
        V=vocab_size,
        E=width,
        position_step=position_step,
        HAS_COLUMNS=columns is not None,
        DRAFTS=triton.next_power_of_2(max(1, preceding.most)),
        BLOCK=BLOCK,
        num_warps=4,
        **OPTIONS,
    )


def columns_of_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """Where each token stands among ids int64 [N], -1 for nowhere: int32 [V]."""
    columns = torch.full((vocab_size,), -1, dtype=torch.int32, device=ids.device)
    return columns.scatter_(0, ids, torch.arange(len(ids), dtype=torch.int32, device=ids.device))


def with_room(edits: LogitEdits) -> LogitEdits:
    """The same with lists of one of few lengths."""
    width = edits.ids.size(1)
    more = max(LEAST_ROOM, triton.next_power_of_2(width)) - width

    def longer(tensor: Tensor, filling: float) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, more), value=filling)

    return LogitEdits(
        edits.repetitions, edits.frequencies, edits.presences, edits.least_positions, longer(edits.ids, -1),
        longer(edits.biases, -0.0), longer(edits.counts, -1), longer(edits.ends, False),
    )  # fmt: skip


def edit_logits(
    logits: Tensor, sequences: Tensor, positions: Tensor, preceding: Tensor, edits: LogitEdits
) -> Tensor:  # fmt: skip
    """reference.edit_logits of tensors on the device."""
    edited, (rows, most) = logits.clone(memory_format=torch.contiguous_format), preceding.shape
    places = torch.arange(rows, dtype=torch.int32, device=logits.device)
    before = Preceding(places * most, (preceding >= 0).sum(1, dtype=torch.int32), most)
    edit_rows(
        edited, sequences.int(), places, positions, preceding.contiguous(), before, edits, logits.size(1)
    )  # fmt: skip
    return edited
