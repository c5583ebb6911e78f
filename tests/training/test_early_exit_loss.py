"""The early-exit weights and curricula against values worked out by hand."""

import pytest

from layerskip_kernels.training.early_exit import EarlyExitLoss, layer_weight


def test_layer_weight_by_hand() -> None:
    # L = 5, scale 0.2: 0.2 * (0, 0+1, 0+1+2, 0+1+2+3), then 4 + 0.2 * (0+1+2+3)
    weights = [layer_weight(layer, 5, 0.2) for layer in range(5)]
    assert weights == pytest.approx([0.0, 0.2, 0.6, 1.2, 5.2])
    assert layer_weight(4, 5, 0.0) == 4.0


def test_weights_are_normalised_over_the_exits_that_count() -> None:
    # 0.2 + 0.6 + 1.2 + 5.2 = 7.2; the first layer has no weight
    weights = EarlyExitLoss(scale=0.2).normalised(5, step=0, num_steps=10)
    assert weights == pytest.approx({1: 0.2 / 7.2, 2: 0.6 / 7.2, 3: 1.2 / 7.2, 4: 5.2 / 7.2})


def test_rotation_takes_every_rth_layer_and_always_the_last() -> None:
    loss = EarlyExitLoss(scale=1.0, curriculum="rotational", rotation=3)
    counted = [set(loss.normalised(8, step, 100)) for step in range(4)]
    # layer 0 weighs nothing; the last, 7, is in every step, whether its turn or not
    assert counted == [{3, 6, 7}, {1, 4, 7}, {2, 5, 7}, {3, 6, 7}]
    # e(3) = 6, e(6) = 21, e(7) = 7 + 21
    assert loss.normalised(8, 0, 100) == pytest.approx({3: 6 / 55, 6: 21 / 55, 7: 28 / 55})


def test_gradual_adds_a_layer_every_t_over_2l_steps() -> None:
    loss = EarlyExitLoss(curriculum="gradual")
    # L = 4, T = 80: from the last layer down, one more every 10 steps; layer 0 weighs nothing
    counted = {step: set(loss.normalised(4, step, 80)) for step in (0, 9, 10, 19, 20, 79)}
    assert counted == {0: {3}, 9: {3}, 10: {2, 3}, 19: {2, 3}, 20: {1, 2, 3}, 79: {1, 2, 3}}


def test_given_weights_replace_the_formula() -> None:
    loss = EarlyExitLoss(weights={2: 0.5, 3: 0.25, 6: 1.25})
    assert loss.normalised(6, 0, 10) == pytest.approx({1: 0.25, 2: 0.125, 5: 0.625})


def test_draft_steps_leave_out_the_whole_model() -> None:
    loss = EarlyExitLoss(weights={2: 0.5, 3: 0.25, 6: 1.25}, draft_steps=2)
    assert loss.normalised(6, 0, 10) == loss.normalised(6, 3, 10) == pytest.approx({1: 0.25, 2: 0.125, 5: 0.625})
    for step in (1, 2, 4, 5):
        assert loss.normalised(6, step, 10) == pytest.approx({1: 0.5 / 0.75, 2: 0.25 / 0.75})


@pytest.mark.parametrize("weights", [None, {6: 1.0}, {2: 0.0, 6: 1.0}])
def test_draft_steps_need_an_exit_to_draft_with(weights: dict[int, float] | None) -> None:
    with pytest.raises(ValueError, match=r"early_exit.draft_steps .* needs early_exit.weights"):
        EarlyExitLoss(weights=weights, draft_steps=1)


def test_draft_steps_go_with_no_curriculum() -> None:
    with pytest.raises(ValueError, match=r"early_exit.draft_steps .* no curriculum"):
        EarlyExitLoss(weights={2: 1.0, 6: 1.0}, draft_steps=1, curriculum="gradual")


@pytest.mark.parametrize("weights", [{2: 1.0}, {2: 1.0, 6: 0.0}, {7: 1.0, 6: 1.0}])
def test_given_weights_must_name_exits_and_the_whole_model(weights: dict[int, float]) -> None:
    with pytest.raises(ValueError, match=r"early_exit.weights must name exits in 1\.\.6, the whole model"):
        EarlyExitLoss(weights=weights).normalised(6, 0, 10)


@pytest.mark.parametrize(
    ("field", "value"),
    [("scale", -1.0), ("curriculum", "random"), ("rotation", 0), ("distillation", 1.5), ("draft_steps", -1)],
)
def test_bad_settings_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"early_exit.{field}.*{value}"):
        EarlyExitLoss(**{field: value})
