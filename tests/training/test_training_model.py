"""The training forward: which layer an exit reads, and what dropped samples skip."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig

from layerskip_kernels.training.model import IGNORED, EarlyExitTraining, ExitPlan, trainable_class

LAYERS, VOCAB = 5, 61

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> EarlyExitTraining:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=LAYERS)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2)
    return trainable_class("llama")(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).train()


def batch(rows: int = 4, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def padded(rows: int = 4) -> dict[str, Tensor]:
    """The second half of the rows end three tokens early, and the first tokens of all are not learnt."""
    inputs = batch(rows)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][rows // 2 :, -3:] = 0
    inputs["labels"][inputs["attention_mask"] == 0] = IGNORED
    inputs["labels"][:, :2] = IGNORED
    return inputs


@pytest.mark.parametrize("make", [batch, padded])
def test_the_exit_of_layer_l_reads_what_layer_l_puts_out(model: EarlyExitTraining, make) -> None:  # type: ignore[no-untyped-def]
    inputs = make()
    plan = ExitPlan(dict.fromkeys(range(LAYERS), 1.0))
    found = model(**inputs, exit_plan=plan)
    with torch.no_grad():
        theirs = model.model(
            inputs["input_ids"], inputs.get("attention_mask"), output_hidden_states=True, use_cache=False
        )
    # Transformers keeps the embedding first, and the last layer's output after the final norm
    outputs = [*(model.model.norm(state) for state in theirs.hidden_states[1:-1]), theirs.last_hidden_state]
    for layer, state in enumerate(outputs):
        logits = model.lm_head(state)[:, :-1].reshape(-1, VOCAB)
        expected = cross_entropy(logits, inputs["labels"][:, 1:].reshape(-1), ignore_index=IGNORED)
        torch.testing.assert_close(found.exit_cross_entropy[layer], expected)
    torch.testing.assert_close(found.loss, found.exit_cross_entropy.sum())


def test_without_a_plan_it_is_transformers_own(model: EarlyExitTraining) -> None:
    inputs = batch()
    ours = model(**inputs, exit_plan=ExitPlan({LAYERS - 1: 1.0})).loss
    torch.testing.assert_close(ours, model(**inputs).loss)


def test_an_exit_trains_the_layers_before_it_and_none_after(model: EarlyExitTraining) -> None:
    model.zero_grad()
    model(**batch(), exit_plan=ExitPlan({2: 1.0, LAYERS - 1: 0.0})).loss.backward()
    used = [layer.mlp.up_proj.weight.grad.abs().sum() > 0 for layer in model.model.layers]
    assert used == [True, True, True, False, False]


def test_layers_above_the_last_exit_do_not_run(model: EarlyExitTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model(**batch(), exit_plan=ExitPlan({2: 1.0, LAYERS - 1: 0.0})).loss
    for layer in model.model.layers[3:]:
        monkeypatch.setattr(layer, "forward", None)
    found = model(**batch(), exit_plan=ExitPlan({2: 1.0}))
    assert torch.equal(found.loss, whole) and len(found.exit_cross_entropy) == 1


@pytest.mark.parametrize("make", [batch, padded])
def test_dropped_samples_skip_the_layer(model: EarlyExitTraining, make) -> None:  # type: ignore[no-untyped-def]
    inputs = make()
    dropped = torch.zeros(LAYERS, 4, dtype=torch.bool)
    dropped[1, 0] = dropped[1, 2] = dropped[3] = dropped[4, 3] = True
    seen: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, out: seen.append(len(args[0]))) for layer in model.model.layers
    ]
    with torch.no_grad():
        found = model(**inputs, exit_plan=ExitPlan({LAYERS - 1: 1.0}, dropped=dropped), num_items_in_batch=1).loss
    for hook in hooks:
        hook.remove()
    assert seen == [4, 2, 4, 3]  # the samples that each layer computed; the fourth was not called at all
    torch.testing.assert_close(found, sum(alone(model, inputs, row, dropped[:, row]) for row in range(4)))


def alone(model: EarlyExitTraining, inputs: dict[str, Tensor], row: int, dropped: Tensor) -> Tensor:
    """The summed loss of one sample through a model that lacks its dropped layers."""
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(layer for layer, skip in zip(layers, dropped, strict=True) if not skip)
    try:
        with torch.no_grad():
            one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            last = len(model.model.layers) - 1
            return model(**one, exit_plan=ExitPlan({last: 1.0}), num_items_in_batch=1).loss
    finally:
        model.model.layers = layers


def test_residual_scale_multiplies_what_a_layer_adds(model: EarlyExitTraining) -> None:
    inputs, ones = batch(), [1.0] * LAYERS

    def loss(scales: list[float] | None) -> float:
        return model(**inputs, exit_plan=ExitPlan({LAYERS - 1: 1.0}, residual_scale=scales)).loss.item()

    assert loss(ones) == loss(None)
    dropped = torch.zeros(LAYERS, 4, dtype=torch.bool)
    dropped[2] = True
    without = model(**inputs, exit_plan=ExitPlan({LAYERS - 1: 1.0}, dropped=dropped)).loss.item()
    assert loss([1.0, 1.0, 0.0, 1.0, 1.0]) == pytest.approx(without, rel=1e-5)
    assert loss([1.0, 1.0, 1.5, 1.0, 1.0]) != pytest.approx(loss(None), rel=1e-3)


def test_gradients_by_finite_differences(model: EarlyExitTraining) -> None:
    """With dropped samples, several exits and padding, through the whole model; its norms and RoPE stay in fp32."""
    double = trainable_class("llama")(model.config).double()
    double.load_state_dict(model.state_dict())
    dropped = torch.zeros(LAYERS, 4, dtype=torch.bool)
    dropped[2, :2] = True
    plan = ExitPlan({1: 0.3, LAYERS - 1: 0.7}, dropped=dropped)
    inputs = padded()
    double(**inputs, exit_plan=plan).loss.backward()
    generator = torch.Generator().manual_seed(3)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight", "model.norm.weight"):
        weight = double.get_parameter(name)
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        expected, losses = (weight.grad * direction).sum().item(), []
        for step in (1e-3, -2e-3):
            weight.data += step * direction
            with torch.no_grad():
                losses.append(double(**inputs, exit_plan=plan).loss.item())
        weight.data += 1e-3 * direction
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(expected, rel=1e-3), name


@pytest.mark.parametrize("make", [batch, padded])
def test_the_anchor_is_how_far_adapters_move_a_state(model: EarlyExitTraining, make) -> None:  # type: ignore[no-untyped-def]
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    inputs, plans = make(), {anchor: ExitPlan({2: 0.5, LAYERS - 1: 0.5}, anchor=anchor) for anchor in (0.0, 3.0)}
    assert adapted(**inputs, exit_plan=plans[3.0]).loss == adapted(**inputs, exit_plan=plans[0.0]).loss  # B is 0 yet
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    moved = (adapted(**inputs, exit_plan=plans[3.0]).loss - adapted(**inputs, exit_plan=plans[0.0]).loss) / 3.0

    def state(llama: EarlyExitTraining) -> Tensor:  # the exit of layer 2, where it is no padding
        mask = inputs.get("attention_mask")
        found = llama.model(inputs["input_ids"], mask, output_hidden_states=True, use_cache=False).hidden_states[3]
        return found.flatten(0, 1) if mask is None else found[mask.bool()]

    before, after = state(model), state(adapted.get_base_model())
    labels = (inputs["labels"][:, 1:] != IGNORED).sum()
    expected = ((after - before).square().sum(-1) / before.square().sum(-1)).sum() / labels
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)
    assert all(p.requires_grad == ("lora" in name) for name, p in adapted.named_parameters())
    alone = [adapted(**inputs, exit_plan=ExitPlan({LAYERS - 1: 1.0}, anchor=anchor)).loss for anchor in (0.0, 3.0)]
    assert alone[0] == alone[1], "the whole model's own state goes where it likes"


def test_the_anchor_pulls_adapters_back(model: EarlyExitTraining) -> None:
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    distances = []
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    for _ in range(20):
        loss = adapted(**batch(), exit_plan=ExitPlan({2: 0.0, LAYERS - 1: 0.0}, anchor=1.0)).loss
        distances.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distances[-1] < 0.5 * distances[0]
