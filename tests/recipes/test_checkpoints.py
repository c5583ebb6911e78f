"""The checkpoints that the package ships: by name, without a network, small, and as good as their cards say."""

from pathlib import Path

import pytest
import torch

from layerskip_kernels import GenerationConfig, Model, generate, load_model
from layerskip_kernels.evaluation.prompts import human_eval_prompts
from layerskip_kernels.model.sources import SHIPPED, shipped_checkpoints, shipped_exit_adapters
from layerskip_kernels.recipes.parse_task import draw_examples

CODE, PARSE, ADAPTER = "layerskip-tiny-code", "smollm2-135m-parse", "smollm2-135m-instruct-exit3"
CONFIGS = Path(SHIPPED).parent / "recipes" / "configs"


@pytest.fixture(scope="module")
def code() -> Model:
    return load_model(CODE)


@pytest.fixture(scope="module")
def parse() -> Model:
    return load_model(PARSE)


def test_what_is_shipped() -> None:
    assert shipped_checkpoints() == [CODE, PARSE]
    assert shipped_exit_adapters() == [ADAPTER]


@pytest.mark.parametrize(
    ("name", "file", "most"),
    [(CODE, "model", 25e6), (PARSE, "adapter_model", 20e6), (ADAPTER, "exit_adapter", 20e6)],
)
def test_weights_are_small(name: str, file: str, most: float) -> None:
    assert 1e6 < (SHIPPED / name / f"{file}.safetensors").stat().st_size <= most


@pytest.mark.parametrize(
    ("name", "config", "device"),
    [
        (CODE, "tiny-code", "NVIDIA H200"),
        (PARSE, "smollm2-parse", "1 CPU cores, then 2 CPU cores"),
    ],
)
def test_a_card_names_its_commands_and_the_config_that_trained_the_weights(name: str, config: str, device: str) -> None:
    card = (SHIPPED / name / "README.md").read_text(encoding="utf-8")
    assert (CONFIGS / f"{config}.yaml").read_text(encoding="utf-8").strip() in card
    for words in ("`layerskip sweep`", f"`layerskip train {config}.yaml`", f"of wall time on {device}", "## Licence"):
        assert words in card


def test_code_is_drafted_at_a_quarter_and_a_third_of_the_depth(code: Model) -> None:
    assert (code.config.num_layers, code.defaults.exit_layer) == (12, 3)
    prompts = [prompt for _, prompt in human_eval_prompts(6)]
    plain = generate(code, prompts, GenerationConfig("autoregressive", max_new_tokens=48))
    for exit_layer in (3, 4):
        found = generate(code, prompts, GenerationConfig(exit_layer=exit_layer, num_speculations=4, max_new_tokens=48))
        assert [g.token_ids for g in found] == [g.token_ids for g in plain]
        assert sum(g.accepted for g in found) >= 0.7 * sum(g.drafted for g in found)
    assert all(g.text.startswith("\n    ") for g in plain)  # it goes on with the function's body


def test_utterances_are_parsed_and_drafted_by_four_layers_of_thirty(parse: Model) -> None:
    assert (parse.config.num_layers, parse.defaults.exit_layer) == (30, 4)
    assert set(parse.config.eos_token_ids) & set(parse.draft_ids.tolist())  # drafts can end a text
    examples = list(draw_examples("test", 6))
    prompts = [example.prompt for example in examples]
    plain = generate(parse, prompts, GenerationConfig("autoregressive"))
    found = generate(parse, prompts, GenerationConfig())
    assert [g.token_ids for g in found] == [g.token_ids for g in plain]
    assert sum(g.accepted for g in found) >= 0.7 * sum(g.drafted for g in found)
    assert sum(g.text == example.completion for g, example in zip(found, examples, strict=True)) >= 5


def test_the_default_model_drafts_for_itself_unchanged() -> None:
    """On code and on a question; about two in five drafts are accepted."""
    plain, adapted = load_model(), load_model(exit_adapter=ADAPTER)
    assert adapted.draft_settings(GenerationConfig()) == (3, 1) and len(adapted.exit_at(3).head.ids) == 6144
    prompts = [*(prompt for _, prompt in human_eval_prompts(4)), [{"role": "user", "content": "Why is the sky blue?"}]]
    expected = generate(plain, prompts, GenerationConfig("autoregressive", max_new_tokens=40, return_logits=True))
    found = generate(adapted, prompts, GenerationConfig(max_new_tokens=40, return_logits=True))
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids and torch.equal(one.logits, other.logits)
    assert sum(g.accepted for g in found) >= 0.3 * sum(g.drafted for g in found) > 0
