"""Accepted counts become lengths where they are, without asking the host."""

import pytest
import torch
from cache_case import on_each_device

from layerskip_kernels import cache_ops

pytestmark = on_each_device


def commit(device, accepted, drafts, lengths, max_length=100):
    lengths, error = torch.tensor(lengths, device=device), cache_ops.new_error(device)
    accepted, drafts = torch.tensor(accepted, device=device), torch.tensor(drafts, device=device)
    cache_ops.commit_lengths(accepted, drafts, lengths, max_length, error)
    return lengths.tolist(), error


def test_a_length_grows_by_what_was_accepted_and_one(device):
    lengths, error = commit(device, [0, 3, 2, -1, 0], [4, 3, 5, 2, 0], [10, 0, 97, 7, 99])
    assert lengths == [11, 4, 100, 7, 100]
    cache_ops.check_error(error)


def test_many_sequences(device):
    count = 700
    drafts = torch.randint(0, 9, (count,), generator=torch.Generator().manual_seed(0))
    accepted = drafts // 2
    lengths, error = commit(device, accepted.tolist(), drafts.tolist(), list(range(count)), 10_000)
    assert lengths == (torch.arange(count) + accepted + 1).tolist()
    cache_ops.check_error(error)


@pytest.mark.parametrize(
    ("accepted", "drafts", "length"),
    [(4, 3, 10), (-2, 3, 10), (3, 3, 97), (2**63 - 1, 2**63 - 1, 5), (0, 3, -1), (0, 3, 100)],
    ids=["more than drafted", "negative", "full", "overflow", "length", "already full"],
)
def test_what_no_verification_gives_is_refused(device, accepted, drafts, length):
    lengths, error = commit(device, [1, accepted], [2, drafts], [5, length])
    assert lengths == [7, length]
    with pytest.raises(ValueError, match="commit_lengths: sequence 1 has num_accepted outside"):
        cache_ops.check_error(error)
