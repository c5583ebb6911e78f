"""The longest agreeing prefix of each sequence's drafts, and the token that follows it.

    accepted = the first j with draft[j] != target[j], or all;  next = target[accepted]

In a step the targets come from the head's candidates, in the same kernel. Moves 2 V / C candidates of each judged row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .errors import NAN_LOGITS, new_error
from .launch import OPTIONS
from .norm_head_argmax import COMPARED, Candidates, best_token

__all__ = ["accept_candidates", "accept_draft"]


@triton.jit
def _accept_draft_kernel(
    tokens_ptr, ends_ptr, first_judged_ptr, num_drafts_ptr, judged_ptr, best_ptr, candidates_ptr, targets_ptr,
    num_accepted_ptr, next_ptr, error_ptr, num_blocks,
    CANDIDATES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, NAN_LOGITS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    drafts = tl.load(num_drafts_ptr + sequence)
    if tl.load(judged_ptr + sequence) == 0:
        tl.store(num_accepted_ptr + sequence, 0)
        tl.store(next_ptr + sequence, -1)
    else:
        j = tl.arange(0, ROWS)
        judged_row = tl.load(first_judged_ptr + sequence) + j
        if CANDIDATES:
            rows = judged_row.to(tl.int64)
            target = best_token(best_ptr, candidates_ptr, rows, j <= drafts, num_blocks, ROWS, TILE).to(tl.int64)
            tl.store(targets_ptr + judged_row, target, mask=j <= drafts)
            if tl.min(tl.where(j <= drafts, target, 0)) < 0:
                tl.atomic_max(error_ptr, NAN_LOGITS)
        else:
            target = tl.load(targets_ptr + judged_row, mask=j <= drafts, other=-1)
        end = tl.load(ends_ptr + sequence)
        draft = tl.load(tokens_ptr + end - drafts + j, mask=j < drafts, other=-1)
        accepted = tl.min(tl.where((j < drafts) & (draft == target), ROWS, j).to(tl.int64))
        tl.store(num_accepted_ptr + sequence, accepted)
        tl.store(next_ptr + sequence, tl.sum(tl.where(j == accepted, target, 0)))


def _launch(
    tokens: Tensor, ends: Tensor, first_judged: Tensor, num_drafts: Tensor, judged: Tensor,
    candidates: Candidates | None, targets: Tensor, num_accepted: Tensor, next_tokens: Tensor, error: Tensor,
    most_drafts: int,
) -> None:  # fmt: skip
    _accept_draft_kernel[(len(num_drafts),)](
        tokens_ptr=tokens,
        ends_ptr=ends,
        first_judged_ptr=first_judged,
        num_drafts_ptr=num_drafts,
        judged_ptr=judged,
        best_ptr=targets if candidates is None else candidates.best,
        candidates_ptr=targets if candidates is None else candidates.tokens,
        targets_ptr=targets,
        num_accepted_ptr=num_accepted,
        next_ptr=next_tokens,
        error_ptr=error,
        num_blocks=0 if candidates is None else candidates.num_blocks,
        CANDIDATES=candidates is not None,
        ROWS=triton.next_power_of_2(most_drafts + 1),
        TILE=COMPARED,
        NAN_LOGITS=NAN_LOGITS,
        num_warps=4,
        **OPTIONS,
    )


def accept_candidates(
    tokens: Tensor, ends: Tensor, first_judged: Tensor, num_drafts: Tensor, judged: Tensor,
    candidates: Candidates | None, targets: Tensor, num_accepted: Tensor, next_tokens: Tensor, error: Tensor,
    most_drafts: int,
) -> None:  # fmt: skip
    """accept_draft, the targets int64 being written here, out of the candidates of all judged rows; None: they are.

    ends int32 [B]: where each sequence's rows end among tokens; first_judged int32 [B]: its first judged row.
    Writes num_accepted and next_tokens int64 [B].
    """
    _launch(
        tokens, ends, first_judged, num_drafts, judged, candidates, targets, num_accepted, next_tokens, error,
        most_drafts,
    )  # fmt: skip


def accept_draft(
    tokens: Tensor, targets: Tensor, query_start_loc: Tensor, num_drafts: Tensor, judged: Tensor
) -> tuple[Tensor, Tensor]:
    """reference.accept_draft -> num_accepted, next_tokens int64 [B]. Waits for num_drafts, to know the most."""
    judged_rows = torch.where(judged, num_drafts + 1, 0)
    first_judged = (judged_rows.cumsum(0) - judged_rows).int()
    error, most = new_error(tokens.device), int(num_drafts.max())
    num_accepted, next_tokens = torch.empty_like(num_drafts), torch.empty_like(num_drafts)
    ends = query_start_loc[1:].int()
    _launch(tokens, ends, first_judged, num_drafts, judged, None, targets, num_accepted, next_tokens, error, most)
    return num_accepted, next_tokens
