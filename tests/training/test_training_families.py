"""The training forward of every family, against Transformers' own; and trainings whose folders load_model reads."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from layerskip_kernels import GenerationConfig, generate, load_model
from layerskip_kernels.errors import UnsupportedModel
from layerskip_kernels.training.config import read_config
from layerskip_kernels.training.model import ExitPlan, trainable_class
from layerskip_kernels.training.run import build_trainer, train
from support.families import VARIANTS, transformers_model
from support.training import write_config

IDS = torch.randint(3, 101, (3, 90), generator=torch.Generator().manual_seed(0))  # longer than one of the windows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A family's model as it is trained here, and Transformers'."""
    theirs = transformers_model(request.param, tmp_path_factory.mktemp("family"))
    ours = trainable_class(theirs.config.model_type)(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def head_logits(model: Any, state: torch.Tensor) -> torch.Tensor:
    """Logits of a normed state, written out from the configs' descriptions."""
    logits = model.lm_head(state) / getattr(model.config, "logits_scaling", 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def test_exits_read_what_the_familys_layers_put_out(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    mask = torch.ones_like(IDS)
    mask[1, 60:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    inputs = dict(input_ids=IDS, attention_mask=mask, labels=labels)
    layers = theirs.config.num_hidden_layers
    found = ours(**inputs, exit_plan=ExitPlan(dict.fromkeys(range(layers), 1.0)))
    with torch.no_grad():
        states = theirs(**inputs, output_hidden_states=True).hidden_states
        whole = theirs(**inputs).loss
        for layer in range(layers):
            state = states[-1] if layer == layers - 1 else theirs.model.norm(states[layer + 1])
            logits = head_logits(theirs, state)[:, :-1].flatten(0, 1)
            expected = cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
            torch.testing.assert_close(found.exit_cross_entropy[layer], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.exit_cross_entropy[-1], whole, rtol=1e-4, atol=1e-5)
    assert type(ours.model.layers) is torch.nn.ModuleList  # as it was


def test_dropped_samples_are_what_they_would_be_alone(pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    dropped = torch.zeros(len(ours.model.layers), 3, dtype=torch.bool)
    dropped[1, 0] = dropped[2, 2] = dropped[3, 1] = dropped[3, 2] = True

    def loss(rows: slice, plan: ExitPlan) -> torch.Tensor:
        ids = IDS[rows]
        return ours(input_ids=ids, labels=ids.clone(), exit_plan=plan, num_items_in_batch=1).loss

    whole = ExitPlan({len(dropped) - 1: 1.0})
    with torch.no_grad():
        together = loss(slice(0, 3), dataclasses.replace(whole, dropped=dropped))
        rows = [slice(row, row + 1) for row in range(3)]
        alone = [loss(row, dataclasses.replace(whole, dropped=dropped[:, row])) for row in rows]
        torch.testing.assert_close(together, sum(alone), rtol=1e-4, atol=1e-3)
        assert abs(together - loss(slice(0, 3), whole)) > 1e-3


def test_gradients_of_capped_logits(tmp_path: Path) -> None:
    theirs = transformers_model("gemma2", tmp_path, final_logit_softcapping=4.0)
    ours = trainable_class("gemma2")(theirs.config)
    ours.load_state_dict(theirs.state_dict())
    ours(input_ids=IDS, labels=IDS.clone(), exit_plan=ExitPlan({3: 1.0})).loss.backward()
    theirs(input_ids=IDS, labels=IDS.clone()).loss.backward()
    for (name, got), (_, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-4, msg=name)


RECIPE = {"layer_dropout": {"p_max": 0.2}, "early_exit": {"weights": {2: 1.0, 4: 1.0}, "distillation": 0.5}}
STEPS = dict(max_steps=3, logging_steps=1)
SIZES = dict(hidden_size=36, intermediate_size=48, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2)


def reads_as_trained(folder: Path, model: Any) -> None:
    """fp32 logits of the folder are those of the trained model, whose weights were rounded to bf16 in it."""
    prompt = IDS[0, :70].tolist()
    config = GenerationConfig("autoregressive", max_new_tokens=1, return_logits=True, eos_token_ids=())
    [found] = generate(load_model(folder, torch.float32), [prompt], config)
    with torch.no_grad():
        expected = model.eval()(torch.tensor([prompt])).logits[0, -1]
    assert (found.logits[0] - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen3", dict(head_dim=10)),
        ("phi3", dict(sliding_window=30)),
        ("gemma2", dict(head_dim=10, query_pre_attn_scalar=10, sliding_window=30)),
    ],
)
def test_a_family_from_scratch_and_then_adapters(tmp_path: Path, family: str, sizes: dict[str, Any]) -> None:
    model = {"sizes": {**SIZES, "max_position_embeddings": 128, "model_type": family, **sizes}, "vocab_size": 300}
    path = write_config(tmp_path, model=model, **RECIPE, training=STEPS)
    config = read_config(path)
    folder = train(config)
    assert folder is not None
    trainer = build_trainer(config)
    trainer._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-3"))
    reads_as_trained(folder, trainer.model)

    (tmp_path / "lora").mkdir()
    changes = {"model": {"source": str(folder)}, "lora": {"rank": 2, "early_layers": 2, "early_rank": 5}, **RECIPE}
    adapting = read_config(write_config(tmp_path / "lora", **changes, training=STEPS))
    adapted = train(adapting)
    assert adapted is not None and (adapted / "adapter_config.json").exists()
    trainer = build_trainer(adapting)
    trainer._load_from_checkpoint(str(tmp_path / "lora" / "run" / "checkpoint-3"))
    targets = [name for name, _ in trainer.model.named_parameters() if "lora_B" in name]
    assert len(targets) == 4 * (4 if family == "phi3" else 7)
    reads_as_trained(adapted, trainer.model)


def test_what_is_not_trained_is_refused(tmp_path: Path) -> None:
    def config(**changes: Any) -> Any:
        path = write_config(tmp_path, **changes)
        return read_config(path)

    unknown = {"sizes": {**SIZES, "model_type": "mamba"}, "vocab_size": 300}
    with pytest.raises(UnsupportedModel, match=r"model_type is 'mamba'; supported: 'llama', 'mistral'"):
        build_trainer(config(model=unknown))
    qwen = {"sizes": {**SIZES, "model_type": "qwen2"}, "vocab_size": 300}
    with pytest.raises(ValueError, match=r"lora.targets: the model has no linear layer 'q'; it has \['down_proj'"):
        build_trainer(config(model=qwen, lora={"targets": ["q"]}))
    with pytest.raises(UnsupportedModel, match=r"model_type is 'qwen2'; supported: 'llama', for lora.transplants"):
        build_trainer(config(model=qwen, lora={"transplants": [{"head": [3, 0], "to": [0, 0]}]}))
