"""Rule 7's Triton kernels against the reference, bit for bit: on a GPU where there is one, else interpreted."""

import pytest
import torch

from layerskip_kernels import triton_ops
from layerskip_kernels.operands import LogitEdits
from layerskip_kernels.ops import reference
from layerskip_kernels.ops.cpu import CpuOps
from support.models import GPU
from support.triton_arguments import DEVICE, assert_equal, on_device


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 0x123456789ABCDEF, -0x123456789ABCDEF])
def test_random_words(seed):
    counters = torch.randint(0, 2**32, (2000, 4), generator=torch.Generator().manual_seed(0))
    counters[:2] = torch.tensor([[0] * 4, [2**32 - 1] * 4])
    assert_equal(triton_ops.philox(counters.to(DEVICE), seed), reference.philox(counters, seed))


def test_noise():
    powers = [word for n in range(33) for word in (2**n - 1, 2**n, 2**n + 1) if word < 2**32]
    random = torch.randint(0, 2**32, (1_000_000 if GPU else 20_000,), generator=torch.Generator().manual_seed(1))
    words = torch.cat([torch.tensor(powers), random])
    assert_equal(triton_ops.gumbel(words.to(DEVICE)), reference.gumbel(words))


SETTINGS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (0.9, 0, 1.0, 0.1),
    (0.8, 40, 0.95, 0.02),
    (2.5, 1, 0.5, 0.9),
    (1.0, 0, 0.0, 0.0),
    (0.0, 3, 0.5, 0.5),
    (1e-4, 0, 0.9, 0.0),
    (1e4, 7, 0.123, 0.0),
    (1.0, 0, 0.999999, 0.0),
]


def settings_tensors(settings):
    columns = list(zip(*settings, strict=True))
    dtypes = (torch.float32, torch.int64, torch.float64, torch.float32)
    return [torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True)]


def rows_of_logits(count, vocab_size, seed=0):
    """Logits that spread, some of them equal, some excluded."""
    logits = torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed)) * 4
    logits[:, 1::7] = logits[:, 0::7][:, : logits[:, 1::7].size(1)]
    logits[:, 3::11] = -torch.inf
    logits[:, 5::13] = torch.copysign(torch.zeros([]), logits[:, 5::13])  # both zeros, many alike
    return logits


def places(count, first_position=5, seed=7, sample=0):
    return (
        torch.arange(first_position, first_position + count),
        torch.full((count,), seed),
        torch.full((count,), sample),
    )


def test_filters_and_draws():
    """Every setting on a row of its own; on a GPU over several blocks."""
    logits = rows_of_logits(len(SETTINGS), 2999 if GPU else 101)
    settings = settings_tensors(SETTINGS)
    scores = reference.filter_logits(logits, *settings)
    assert_equal(triton_ops.filter_logits(*on_device(logits, *settings)), scores)
    noisy = torch.arange(len(scores)) % 3 > 0
    arguments = (scores, *places(len(scores), seed=-5, sample=2), noisy)
    assert_equal(triton_ops.gumbel_argmax(*on_device(*arguments)), reference.gumbel_argmax(*arguments))


def test_equal_scores_over_several_blocks():
    """The last tokens that are kept equal others, behind and before the borders of blocks."""
    rows = torch.stack([torch.zeros(1030), torch.linspace(0, 1e-3, 1030), -torch.ones(1030)])
    rows[2, ::3] = 2.0
    settings = settings_tensors([(1.0, 0, 0.9999, 0.0), (1.0, 1000, 0.99, 0.0), (1.0, 1028, 1.0, 0.0)])
    expected = reference.filter_logits(rows, *settings)
    kept = expected.isfinite().sum(1).tolist()
    assert kept[0] > 1024 and kept[2] == 1028 and kept[1] == 990
    assert_equal(triton_ops.filter_logits(*on_device(rows, *settings)), expected)
    arguments = (expected[1:2], *places(1), torch.tensor([True]))
    assert_equal(triton_ops.gumbel_argmax(*on_device(*arguments)), reference.gumbel_argmax(*arguments))


@pytest.mark.parametrize("most", [0, 1, 5])
@pytest.mark.parametrize("listed", [1, 300])
def test_edits(listed, most):
    """Lists of several blocks, some of them not full; drafts that are listed, that are not, and that recur."""
    generator, rows, size = torch.Generator().manual_seed(listed), 5, 997
    logits = rows_of_logits(rows, size)
    ids = torch.stack([torch.randperm(size, generator=generator)[:listed] for _ in range(3)])
    ids[1, listed // 2 :] = -1
    counts = torch.randint(-1, 4, ids.shape, generator=generator)
    biases = torch.randn(ids.shape, generator=generator).where(counts % 2 > 0, -0.0)
    penalties = torch.tensor([[1.7, 1.0, 0.3], [0.3, 0.0, -0.7], [0.9, 0.0, 0.1]])
    ends = torch.rand(ids.shape, generator=generator) < 0.3
    edits = LogitEdits(*penalties, torch.tensor([8, 0, 6]), ids, biases, counts, ends)
    preceding = torch.randint(size, (rows, most), generator=generator)
    preceding[:, ::2] = ids[0, 0]
    preceding[:, 3:] = preceding[:, 1:2]
    for row in range(rows):
        preceding[row, row + 1 :] = -1
    arguments = logits, torch.tensor([0, 1, 2, 0, 2]), torch.arange(5, 10), preceding
    expected = reference.edit_logits(*arguments, edits)
    assert not torch.equal(expected, logits)
    assert_equal(triton_ops.edit_logits(*on_device(*arguments), LogitEdits(*on_device(*edits.flat))), expected)
    assert_equal(CpuOps().edit_logits(*arguments, edits), expected)


@pytest.mark.parametrize("vocab_size", [3, 1030])
def test_rejection(vocab_size):
    """Drafts that are kept, that are not, and p = q, of which nothing is left."""
    scores = rows_of_logits(5, vocab_size)
    draft_scores = rows_of_logits(5, vocab_size, seed=1)
    scores[4, 2] = -torch.inf
    draft_scores[4] = scores[4]
    drafts = torch.tensor([0, 1, 2, 2, 2])
    arguments = (draft_scores, scores, drafts, *places(5, seed=2**40 + 3))
    expected = reference.rejection_sample(*arguments)
    assert {True, False} == set((expected == drafts).tolist())
    assert_equal(triton_ops.rejection_sample(*on_device(*arguments)), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, None])
def test_scores_that_leave_no_choice(bad):
    good, row = torch.zeros(2, 5), torch.zeros(2, 5)
    if bad is None:
        row[1] = -torch.inf
    else:
        row[1, 4] = bad
    settings = settings_tensors([(0.7, 0, 1.0, 0.1)] * 2)
    drafts = torch.zeros(2, dtype=torch.int64)
    for call in (
        lambda: triton_ops.filter_logits(*on_device(row, *settings)),
        lambda: triton_ops.gumbel_argmax(*on_device(row, *places(2), torch.tensor([True, False]))),
        lambda: triton_ops.rejection_sample(*on_device(row, good, drafts, *places(2))),
        lambda: triton_ops.rejection_sample(*on_device(good, row, drafts, *places(2))),
    ):
        with pytest.raises(RuntimeError, match="no token can be chosen"):
            call()
