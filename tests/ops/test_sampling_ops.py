"""filter_logits, gumbel_argmax, rejection_sample: the bits of the reference, the distributions they promise."""

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from layerskip_kernels.ops import reference
from support.models import threads

cpu = torch.ops.layerskip
SETTINGS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (0.9, 0, 1.0, 0.1),
    (0.8, 40, 0.95, 0.02),
    (2.5, 1, 0.5, 0.9),
    (1.0, 0, 0.0, 0.0),
    (0.0, 3, 0.5, 0.5),
]


def settings_tensors(settings):
    columns = list(zip(*settings, strict=True))
    dtypes = (torch.float32, torch.int64, torch.float64, torch.float32)
    return [torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True)]


def rows_of_logits(count: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """Logits that spread, some of them equal, some excluded."""
    logits = torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed)) * 4
    logits[:, 1::7] = logits[:, 0::7][:, : logits[:, 1::7].size(1)]
    logits[:, 3::11] = -torch.inf
    return logits


def places(count: int, first_position: int = 5, seed: int = 7, sample: int = 0):
    return (
        torch.arange(first_position, first_position + count),
        torch.full((count,), seed),
        torch.full((count,), sample),
    )


@pytest.mark.parametrize("vocab_size", [1, 3, 64, 101, 2999])
def test_same_bits_as_the_reference(isa, vocab_size):
    logits = rows_of_logits(len(SETTINGS), vocab_size)
    settings = settings_tensors(SETTINGS)
    scores = reference.filter_logits(logits, *settings)
    assert torch.equal(cpu.filter_logits(logits, *settings), scores)
    for noisy in (True, False):
        arguments = (scores, *places(len(scores)), torch.full((len(scores),), noisy))
        tokens = reference.gumbel_argmax(*arguments)
        assert torch.equal(cpu.gumbel_argmax(*arguments), tokens)
    other = rows_of_logits(len(SETTINGS), vocab_size, seed=1)
    for drafts in (tokens, torch.zeros_like(tokens)):
        arguments = (other, scores, drafts, *places(len(scores)))
        assert torch.equal(cpu.rejection_sample(*arguments), reference.rejection_sample(*arguments))


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 12.0])
def test_tokens_that_are_passed_over_are_never_the_ones(isa, spread):
    """Kernels make no noise where it could not decide: rows of every spread, and choices against the odds."""
    count, vocab_size = 48, 1500
    scores = torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(3)) * spread
    arguments = (scores, *places(count), torch.ones(count, dtype=torch.bool))
    tokens = cpu.gumbel_argmax(*arguments)
    assert torch.equal(tokens, reference.gumbel_argmax(*arguments))
    assert (tokens // 64 != scores.argmax(1) // 64).sum() > count // 16


def test_equal_rows_and_tiny_temperatures(isa):
    """All tokens alike, differences below a filter's classes, and above them."""
    rows = torch.stack([torch.zeros(500), torch.linspace(0, 1e-3, 500), torch.linspace(-5e3, 5e3, 500)])
    for setting in ((1.0, 7, 0.5, 0.0), (1e-4, 0, 0.9, 0.0), (1e4, 0, 0.123, 0.0), (1.0, 0, 0.999999, 0.0)):
        settings = settings_tensors([setting] * 3)
        assert torch.equal(cpu.filter_logits(rows, *settings), reference.filter_logits(rows, *settings))


@pytest.mark.parametrize("count", [1, 2])
def test_rows_and_threads_do_not_matter(count):
    logits, settings = rows_of_logits(len(SETTINGS), 777), settings_tensors(SETTINGS)
    with threads(count):
        together = cpu.filter_logits(logits, *settings)
        for i in range(len(logits)):
            assert torch.equal(
                cpu.filter_logits(logits[i : i + 1], *(s[i : i + 1] for s in settings)), together[i : i + 1]
            )


# ---- filters ----


def transformers_filter(logits, temperature, top_k, top_p, min_p):
    """What Transformers' generate makes of logits, in its order."""
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        logits = warper(None, logits)
    return logits


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s[0] > 0], ids=str)
@pytest.mark.parametrize("backend", [cpu, reference], ids=["cpu", "reference"])
def test_filters_equal_those_of_transformers(backend, setting):
    logits = torch.randn(20, 1003, generator=torch.Generator().manual_seed(3)) * 3
    ours = backend.filter_logits(logits, *settings_tensors([setting] * len(logits)))
    assert torch.equal(ours, transformers_filter(logits, *setting))


@pytest.mark.parametrize(("setting", "kept"), [
    ((1.0, 3, 1.0, 0.0), [0, 1, 2]),
    ((1.0, 0, 0.5, 0.0), [0, 1, 2]),  # 2.5 of 5 alike: the third reaches it
    ((1.0, 2, 0.4, 0.0), [0]),
    ((1.0, 0, 1.0, 1.0), [0, 1, 2, 3, 4]),
])  # fmt: skip
@pytest.mark.parametrize("backend", [cpu, reference], ids=["cpu", "reference"])
def test_among_equals_the_lowest_ids_are_kept(backend, setting, kept):
    row = torch.tensor([[2.0, 2.0, 2.0, 2.0, 2.0, -40.0]])
    assert backend.filter_logits(row, *settings_tensors([setting])).isfinite()[0].nonzero()[:, 0].tolist() == kept


# ---- choices ----


def chi_square(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic; a token that cannot occur must not."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible].double() * len(tokens)
    return float(((counts[possible] - expected) ** 2 / expected).sum())


P = torch.tensor([0.30, 0.02, 0.25, 0.0, 0.13, 0.05, 0.20, 0.05])
Q = torch.tensor([0.05, 0.40, 0.10, 0.1, 0.13, 0.02, 0.20, 0.00])
DRAWS = 40_000
CRITICAL = 24.3  # of chi-square with 7 degrees of freedom at 0.001


def draws(probabilities: torch.Tensor, seed: int) -> torch.Tensor:
    scores = probabilities.log().repeat(DRAWS, 1)
    return cpu.gumbel_argmax(scores, *places(DRAWS, seed=seed), torch.ones(DRAWS, dtype=torch.bool))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_draws_have_the_distribution_of_the_scores(seed):
    assert chi_square(draws(P, seed), P) < CRITICAL
    assert chi_square(draws(Q, seed), P + 1e-9) > 1000, "the test must tell p from q"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rejection_has_the_distribution_of_the_target(seed):
    drafts = draws(Q, seed)
    p, q = P.log().repeat(DRAWS, 1), Q.log().repeat(DRAWS, 1)
    tokens = cpu.rejection_sample(q, p, drafts, *places(DRAWS, seed=seed))
    assert chi_square(tokens, P) < CRITICAL
    accepted = float((tokens == drafts).double().mean())
    assert abs(accepted - float(torch.minimum(P, Q).sum())) < 0.01  # Leviathan et al. 2023, theorem 3.5


def test_broken_rejection_rules_are_caught():
    """What drafts accepted too gladly, a residual of p alone, or shared noise would look like."""
    drafts, p, q = draws(Q, 0), P.log().repeat(DRAWS, 1), Q.log().repeat(DRAWS, 1)
    right = cpu.rejection_sample(q, p, drafts, *places(DRAWS, seed=0))
    from_p = draws(P, 3)
    possible = P[drafts] > 0
    always = torch.where(possible, drafts, from_p)
    residual_of_p = torch.where(right == drafts, drafts, from_p)
    same_noise = torch.where(right == drafts, drafts, draws((P - Q).clamp(min=0), 0))
    for broken in (always, residual_of_p, same_noise):
        assert chi_square(broken, P) > 3 * CRITICAL


def test_positions_seeds_samples_and_streams_are_independent():
    """Any two of them agree as often as chance would have it."""
    base = draws(P, 0)
    scores, noisy = P.log().repeat(DRAWS, 1), torch.ones(DRAWS, dtype=torch.bool)
    others = [
        draws(P, 1),
        cpu.gumbel_argmax(scores, *places(DRAWS, sample=1, seed=0), noisy),
        cpu.gumbel_argmax(scores, *places(DRAWS, first_position=6, seed=0), noisy),
        # The residual's noise: nothing is accepted, since q holds only token 3, which p excludes.
        cpu.rejection_sample(torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([3]), 0.0), scores,
                             torch.full((DRAWS,), 3), *places(DRAWS, seed=0)),
    ]  # fmt: skip
    for other in others:
        assert abs(float((base == other).double().mean()) - float((P * P).sum())) < 0.01
        assert chi_square(other, P) < CRITICAL


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", [cpu, reference], ids=["cpu", "reference"])
def test_scores_that_leave_no_choice(backend, bad):
    good, rows = torch.zeros(3, 101), [torch.zeros(3, 101), torch.full((3, 101), -torch.inf)]
    rows[0][1, 100] = bad
    for row in rows:
        with pytest.raises(RuntimeError, match="no token can be chosen"):
            backend.filter_logits(row, *settings_tensors([(0.7, 5, 0.5, 0.1)] * 3))
        for noisy in (True, False):
            with pytest.raises(RuntimeError, match="no token can be chosen"):
                backend.gumbel_argmax(row, *places(3), torch.full((3,), noisy))
        for q, p in ((row, good), (good, row)):
            with pytest.raises(RuntimeError, match="no token can be chosen"):
                backend.rejection_sample(q, p, torch.zeros(3, dtype=torch.int64), *places(3))


def test_bad_arguments():
    scores, noisy = torch.zeros(2, 5), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"drafts\[1\] is 5"):
        cpu.rejection_sample(scores, scores, torch.tensor([0, 5]), *places(2))
    with pytest.raises(ValueError, match=r"positions\[0\] is -1"):
        cpu.gumbel_argmax(scores, *places(2, first_position=-1), noisy)
    with pytest.raises(ValueError, match="top_ks"):
        cpu.filter_logits(scores, *settings_tensors([(1.0, -1, 1.0, 0.0)] * 2))
    with pytest.raises(ValueError, match="at least one column"):
        cpu.gumbel_argmax(torch.zeros(2, 0), *places(2), noisy)
