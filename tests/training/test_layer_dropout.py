"""Layer dropout's formulas against values worked out by hand, and its draws."""

import math

import pytest
import torch

from layerskip_kernels.training.dropout import LayerDropout, dropped_samples, layer_scale, time_scale


def test_layer_scale_by_hand() -> None:
    # L = 5: exp(l ln2 / 4) - 1 = 2^(l/4) - 1
    expected = [0.0, 0.189207115002721, 0.414213562373095, 0.681792830507429, 1.0]
    assert [layer_scale(layer, 5) for layer in range(5)] == pytest.approx(expected, abs=1e-14)
    assert layer_scale(0, 1) == 0.0


def test_time_scale_by_hand() -> None:
    # T = 3: exp(t ln2 / 2) - 1
    assert [time_scale("exponential", step, 3) for step in range(3)] == pytest.approx([0.0, math.sqrt(2) - 1, 1.0])
    assert [time_scale("decreasing", step, 3) for step in range(3)] == pytest.approx([1.0, 2 - math.sqrt(2), 0.0])
    assert [time_scale("constant", step, 3) for step in range(3)] == [1.0] * 3
    assert time_scale("exponential", 7, 3) == 1.0  # a training that is prolonged stays at its end


def test_probabilities_multiply_the_three() -> None:
    dropout = LayerDropout(p_max=0.2, schedule="exponential")
    assert dropout.probabilities(5, step=1, num_steps=3)[2] == pytest.approx(0.2 * 0.41421356 * 0.41421356)
    assert dropout.probabilities(5, step=2, num_steps=3)[4] == pytest.approx(0.2)
    assert dropout.probabilities(5, step=0, num_steps=3) == [0.0] * 5


def test_draws_follow_the_probabilities() -> None:
    dropout, probabilities = LayerDropout(p_max=0.9), [0.0, 0.3, 0.9]
    draws = torch.stack([dropped_samples(dropout, probabilities, step, rows=8) for step in range(500)]).float()
    # 4,000 draws a layer: three standard deviations are at most 0.022
    assert draws.mean((0, 2)).tolist() == pytest.approx(probabilities, abs=0.022)
    assert draws.sum(2).std(0)[1] > 1.0  # samples draw on their own, not all together


def test_draws_depend_on_seed_step_and_row_alone() -> None:
    probabilities = [0.5] * 6
    draws = dropped_samples(LayerDropout(seed=1), probabilities, step=3, rows=16)
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(draws, dropped_samples(LayerDropout(seed=1), probabilities, step=3, rows=16))
    assert not torch.equal(draws, dropped_samples(LayerDropout(seed=2), probabilities, step=3, rows=16))
    assert not torch.equal(draws, dropped_samples(LayerDropout(seed=1), probabilities, step=4, rows=16))


def test_a_group_repeats_so_that_ranks_drop_equally_many() -> None:
    dropout = LayerDropout(seed=1, group=3)
    whole = dropped_samples(dropout, [0.5] * 6, step=0, rows=8)
    rank = dropped_samples(LayerDropout(seed=1), [0.5] * 6, step=0, rows=3)
    assert torch.equal(whole, torch.cat([rank, rank, rank], 1)[:, :8])


@pytest.mark.parametrize(("field", "value"), [("p_max", 1.0), ("p_max", -0.1), ("schedule", "linear"), ("group", 0)])
def test_bad_settings_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"layer_dropout.{field}.*{value}"):
        LayerDropout(**{field: value})
