"""Rule 7: Philox4x32-10 against the published vectors, and Gumbel noise against float64; the same bits everywhere."""

import numpy as np
import pytest
import torch

from layerskip_kernels.ops import reference

cpu = torch.ops.layerskip

# kat_vectors of Random123 (Salmon et al. 2011), philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def signed(low: int, high: int) -> int:
    value = low | high << 32
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
@pytest.mark.parametrize("philox", [cpu.philox, reference.philox], ids=["cpu", "reference"])
def test_known_answers(philox, counter, key, result):
    assert philox(torch.tensor([words(counter)]), signed(*words(key))).tolist() == [words(result)]


def test_both_backends_agree_on_random_counters():
    counters = torch.randint(0, 2**32, (5000, 4), generator=torch.Generator().manual_seed(0))
    for seed in (0, 1, 2**63 - 1, 0x123456789ABCDEF):
        assert torch.equal(cpu.philox(counters, seed), reference.philox(counters, seed))


def words_of_all_sizes() -> torch.Tensor:
    powers = [2**n + step for n in range(32) for step in (-1, 0, 1)]
    random = torch.randint(0, 2**32, (1_000_000,), generator=torch.Generator().manual_seed(1))
    return torch.cat([torch.tensor([w for w in powers if 0 <= w < 2**32] + [2**32 - 1]), random])


def test_noise_has_the_bits_of_the_reference(isa):
    w = words_of_all_sizes()
    assert torch.equal(cpu.gumbel(w), reference.gumbel(w))


def test_noise_is_the_logarithm_it_claims_to_be():
    """Against float64, as a part of 1 + |noise|: near 0 the outer logarithm cancels."""
    w = words_of_all_sizes()
    v = ((w.numpy() >> 1).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-31)
    true = -np.log(-np.log1p(-np.minimum(v, 1 - 2.0**-24).astype(np.float64)))
    noise = reference.gumbel(w).double().numpy()
    assert np.isfinite(noise).all()
    assert np.max(np.abs(noise - true) / (1 + np.abs(true))) < 4e-7
    assert noise.max() > 22 and noise.min() < -2.8


def test_noise_has_the_distribution_of_gumbel():
    """A million draws in 50 classes of equal probability (chi-square, 49 degrees: 85 has probability 0.001)."""
    noise = reference.gumbel(words_of_all_sizes()[96:]).double().numpy()
    uniform = np.exp(-np.exp(-noise))
    counts, _ = np.histogram(uniform, bins=50, range=(0, 1))
    expected = len(noise) / 50
    assert ((counts - expected) ** 2 / expected).sum() < 85


def test_bad_arguments():
    with pytest.raises(ValueError, match="counters must have the shape"):
        cpu.philox(torch.zeros(3, 5, dtype=torch.int64), 0)
    with pytest.raises(TypeError, match="words must be Long"):
        cpu.gumbel(torch.zeros(3))
