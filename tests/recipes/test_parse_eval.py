"""Scoring parses: what counts as right, and that the drafts are counted."""

import json
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="needs the extra 'train'")

from layerskip_kernels import GenerationConfig, generate, load_model
from layerskip_kernels.cli import main as cli
from layerskip_kernels.recipes.parse_eval import evaluate_parses, read_examples
from layerskip_kernels.training.config import read_config
from layerskip_kernels.training.run import train
from support.training import write_config

CONFIG = GenerationConfig(exit_layer=2, num_speculations=3, max_new_tokens=6)
PROMPTS = [f"{letter} b" for letter in "acdefghijklmnopqrst"]  # more than are decoded together


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trained = train(read_config(write_config(tmp_path_factory.mktemp("toy"), training={"max_steps": 30})))
    assert trained is not None
    return trained


def test_a_parse_is_right_when_it_is_the_whole_completion(folder: Path) -> None:
    model = load_model(folder)
    found = generate(model, PROMPTS, CONFIG)
    said = [(prompt, " " + (generation.text or "")) for prompt, generation in zip(PROMPTS, found, strict=True)]
    scores = evaluate_parses(model, said, CONFIG)
    assert (scores.count, scores.exact_match) == (len(PROMPTS), 1.0)
    assert scores.acceptance_rate == sum(g.accepted for g in found) / sum(g.drafted for g in found)
    assert scores.tokens_per_cycle == sum(len(g.token_ids) - 1 for g in found) / sum(g.cycles for g in found)
    changed = [(prompt, text + "]" if index % 2 else text) for index, (prompt, text) in enumerate(said)]
    assert evaluate_parses(model, changed, CONFIG).exact_match == 10 / 19
    plain = evaluate_parses(model, said, GenerationConfig("autoregressive", max_new_tokens=6))
    assert (plain.exact_match, plain.acceptance_rate, plain.tokens_per_cycle) == (1.0, None, 1.0)


def test_the_command_scores_the_first_lines(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": " no"}) + "\n" for prompt in PROMPTS))
    assert read_examples(path, 1) == [(PROMPTS[0], " no")]
    options = ["--model", str(folder), "--limit", "2", "--exit-layer", "2", "--max-new-tokens", "4"]
    assert cli.main(["parse-eval", str(path), *options]) == 0
    assert capsys.readouterr().out.startswith("2 utterances: 0.0% exactly right, ")
    path.write_text("")
    assert cli.main(["parse-eval", str(path), *options]) == 2
    assert "has no utterances" in capsys.readouterr().err
