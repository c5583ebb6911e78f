"""The greedy rule: the longest agreeing prefix, and one token more."""

import pytest
import torch

from layerskip_kernels.ops import reference

cpu = torch.ops.layerskip

#   pending rows (first the last known token, then drafts), what the model says after each, accepted, next
CASES = {
    "all agree": ([9, 1, 2, 3], [1, 2, 3, 4], 3, 4),
    "none agrees": ([9, 1, 2, 3], [5, 2, 3, 4], 0, 5),
    "two agree": ([9, 1, 2, 3], [1, 2, 7, 4], 2, 7),
    "a later agreement does not count": ([9, 1, 2, 3], [1, 8, 3, 4], 1, 8),
    "nothing was drafted": ([9], [5], 0, 5),
}


@pytest.mark.parametrize("op", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_one_sequence(op, case):
    rows, targets, accepted, following = CASES[case]
    got = op.accept_draft(
        torch.tensor(rows),
        torch.tensor(targets),
        torch.tensor([0, len(rows)]).int(),
        torch.tensor([len(rows) - 1]),
        torch.tensor([True]),
    )
    assert [int(x) for x in got] == [accepted, following]


@pytest.mark.parametrize("op", [cpu, reference], ids=["cpu", "reference"])
def test_ragged_batch_with_rows_before_the_drafts(op):
    """All cases at once, each with two more rows (of a prompt) before it."""
    rows, targets, starts, drafts = [], [], [0], []
    for row_tokens, target_tokens, _, _ in CASES.values():
        rows += [7, 7, *row_tokens]
        targets += target_tokens
        starts.append(len(rows))
        drafts.append(len(row_tokens) - 1)
    accepted, following = op.accept_draft(
        torch.tensor(rows),
        torch.tensor(targets),
        torch.tensor(starts).int(),
        torch.tensor(drafts),
        torch.ones(len(drafts), dtype=torch.bool),
    )
    assert accepted.tolist() == [case[2] for case in CASES.values()]
    assert following.tolist() == [case[3] for case in CASES.values()]


@pytest.mark.parametrize("op", [cpu, reference], ids=["cpu", "reference"])
def test_a_chunk_of_a_prompt_is_not_judged(op):
    """A sequence that is not judged between two that are: it has no targets and gains nothing."""
    accepted, following = op.accept_draft(
        torch.tensor([9, 1, 7, 7, 7, 9, 5]), torch.tensor([1, 2, 6, 8]), torch.tensor([0, 2, 5, 7]).int(),
        torch.tensor([1, 0, 1]), torch.tensor([True, False, True]),
    )  # fmt: skip
    assert accepted.tolist() == [1, 0, 0]
    assert following.tolist() == [2, -1, 6]


def test_counts_that_do_not_fit_are_refused():
    def accept(rows, drafts, judged=True):
        starts = torch.tensor([0, rows]).int()
        cpu.accept_draft(
            torch.tensor([1, 2]), torch.tensor([1, 2]), starts, torch.tensor([drafts]), torch.tensor([judged])
        )

    with pytest.raises(ValueError, match=r"num_drafts\[0\] is 2, expected 0..1 for a sequence of 2 rows$"):
        accept(2, 2)
    with pytest.raises(ValueError, match=r"num_drafts\[0\] is -1, expected 0..1"):
        accept(2, -1)
    with pytest.raises(ValueError, match=r"num_drafts\[0\] is 1, expected 0..0 .* not judged"):
        accept(2, 1, judged=False)
    with pytest.raises(ValueError, match="query_start_loc must rise"):
        accept(3, 1)
