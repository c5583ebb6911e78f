"""Perplexity of every exit, and pass@1."""

import json
import math
from dataclasses import replace

import pytest
import torch

from layerskip_kernels import Draft, Generation, Model, load_model, prefill, verify_step
from layerskip_kernels.cli.main import main
from layerskip_kernels.evaluation import quality
from layerskip_kernels.evaluation.prompts import human_eval_solutions
from layerskip_kernels.evaluation.quality import as_text, completion, pass_at_1, perplexities, solution_texts, texts_of
from support.commands import error_of
from support.exit_adapters import cut_model, own_checkpoint, random_adapter
from support.models import cache_for, random_tokens, tiny_model
from support.tokenizers import Letters

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [(random_tokens(21, seed=5), 6), (random_tokens(9, seed=6), 1)]


def judged_by_verification(model: Model, tokens: list[int], start: int) -> float:
    """Negative log-likelihood of ``tokens[start:]``, with the steps of decoding alone."""
    cache = cache_for(model, len(tokens))
    sequence = cache.add_sequence(tokens[:start])
    first = prefill(model, cache, [sequence])
    cache.commit(first)
    sequence.tokens[-1] = tokens[start]  # in the place of the model's own choice
    rest = tokens[start + 1 :]
    draft = Draft.of_tokens([sequence], [rest])
    logits = torch.cat([first.logits, verify_step(model, cache, draft).logits[:-1]]).double()
    return -logits.log_softmax(-1)[torch.arange(len(tokens) - start), torch.tensor(tokens[start:])].sum().item()


def test_the_last_layer_is_judged_as_verification_judges():
    model = tiny_model()
    found = perplexities(model, TEXTS)
    assert found["tokens"] == 15 + 8
    loss = sum(judged_by_verification(model, *text) for text in TEXTS)
    assert found["exits"][-1]["perplexity"] == pytest.approx(math.exp(loss / 23), rel=1e-12)
    assert found["exits"][-1]["agreement"] == 1.0


@pytest.mark.parametrize("exit_layer", [1, 2])
def test_an_exit_is_a_model_of_so_many_layers(exit_layer):
    model = tiny_model()
    shorter = replace(
        model,
        config=replace(model.config, num_layers=exit_layer),
        weights=replace(model.weights, layers=model.weights.layers[:exit_layer]),
    )
    whole, short = perplexities(model, TEXTS), perplexities(shorter, TEXTS)
    assert whole["exits"][exit_layer - 1]["perplexity"] == short["exits"][-1]["perplexity"]
    assert whole["exits"][exit_layer - 1]["agreement"] < 1.0


def test_some_exits_and_the_last_layer():
    model = tiny_model()
    every = {row["exit_layer"]: row for row in perplexities(model, TEXTS)["exits"]}
    assert perplexities(model, TEXTS, [1])["exits"] == [every[1], every[3]]


def test_an_exit_adapter_is_judged_beside_the_exits():
    """As the model that it makes of the first layers; where its head lacks words of the texts, without a perplexity."""
    found = own_checkpoint(torch.bfloat16)
    plain = Model.from_checkpoint(own_checkpoint(torch.bfloat16))
    every = {**random_adapter(plain, 1), "head.weight": found.tensors["lm_head.weight"]}
    words = torch.arange(plain.config.vocab_size)
    model = plain.with_exit_adapter(2, {**every, "head.ids": words})
    judged, expected = perplexities(model, TEXTS), perplexities(plain, TEXTS)
    assert judged["exits"] == expected["exits"] and "adapters" not in expected
    cut = perplexities(cut_model(own_checkpoint(torch.bfloat16), 2, every), TEXTS)["exits"][-1]
    assert judged["adapters"][0]["exit_layer"] == 2
    assert judged["adapters"][0]["perplexity"] == cut["perplexity"] != judged["exits"][1]["perplexity"]
    assert 0 < judged["adapters"][0]["agreement"] < 1
    assert perplexities(model, TEXTS, [2])["adapters"] == judged["adapters"]
    assert "adapters" not in perplexities(model, TEXTS, [1])
    both = model.with_exit_adapter(1, random_adapter(plain, "mlp", seed=9))
    first, second = perplexities(both, TEXTS)["adapters"]
    assert first["exit_layer"] == 1 and first["agreement"] > 0 and [second] == judged["adapters"]
    assert perplexities(both, TEXTS, [1])["adapters"] == [first]
    few = {**every, "head.weight": every["head.weight"][::2].contiguous(), "head.ids": words[::2]}
    restricted = perplexities(plain.with_exit_adapter(2, few), TEXTS)
    assert restricted["adapters"][0]["perplexity"] is None and restricted["adapters"][0]["agreement"] > 0
    shown = as_text({"model": "m", "perplexity": restricted})
    assert "2 +             -" in shown and "(with the exit adapter)" in shown


def test_given_texts_are_cut_into_pieces(tiny, monkeypatch):
    monkeypatch.setattr(quality, "MAX_TOKENS", 3)
    ids = tiny.tokenizer.encode("a b c d")
    assert texts_of(tiny, ["a b c d", "e f"], 1) == [(ids[:3], 1), (tiny.tokenizer.encode("e f"), 1)]
    with pytest.raises(ValueError, match="give longer ones"):
        texts_of(tiny, ["a"], 1)


def test_pieces_fit_a_short_context():
    model = replace(tiny_model(max_positions=16), tokenizer=Letters())
    pieces = texts_of(model, ["the quick brown fox jumps over the lazy dog " * 4], 1)
    assert max(len(tokens) for tokens, _ in pieces) == 16
    found = perplexities(model, pieces)
    assert found["tokens"] == sum(len(tokens) - 1 for tokens, _ in pieces)
    loss = sum(judged_by_verification(model, *piece) for piece in pieces)
    assert found["exits"][-1]["perplexity"] == pytest.approx(math.exp(loss / found["tokens"]), rel=1e-12)


def test_problems_too_long_for_the_context_are_passed_over():
    lengths = [len(prompt) for prompt, _ in human_eval_solutions()]
    model = replace(tiny_model(max_positions=sorted(lengths)[2]), tokenizer=Letters())
    assert [start for _, start in solution_texts(model, 1)] == [next(n for n in lengths if n < sorted(lengths)[2])]
    assert len(solution_texts(model, 5)) == 2
    with pytest.raises(ValueError, match="positions; give texts"):
        solution_texts(replace(tiny_model(max_positions=16), tokenizer=Letters()), 5)


def test_solutions_are_judged_after_their_prompts(tiny):
    [(prompt, solution)] = human_eval_solutions(1)
    [(tokens, start)] = solution_texts(tiny, 1)
    assert tokens == tiny.tokenizer.encode(prompt + solution)
    assert start == len(tiny.tokenizer.encode(prompt))


# ---- pass@1 ----


def test_a_completion_ends_where_something_else_begins(monkeypatch):
    model = load_model()
    written = model.tokenizer.encode("    return 1\n\ndef g():\n    pass\n")

    monkeypatch.setattr(quality, "generate", lambda *_: [Generation(1, written)])
    assert completion(model, "def f():\n", 16) == "    return 1\n"


def test_pass_at_1_counts_the_solved(monkeypatch):
    solutions = dict(human_eval_solutions(3))
    second = human_eval_solutions(3)[1][0]
    monkeypatch.setattr(
        quality, "completion", lambda _, prompt, __: "\n    pass\n" if prompt == second else solutions[prompt]
    )
    found = pass_at_1(tiny_model(), 3)
    assert (found["problems"], found["passed"], found["pass_at_1"]) == (3, 2, 2 / 3)
    assert found["outcomes"]["passed"] == 2 and sum(found["outcomes"].values()) == 3


# ---- the command ----


@pytest.mark.parametrize("option", ["--json", "--output"])
def test_the_command(tiny, capsys, tmp_path, option):
    text, numbers = tmp_path / "t.txt", tmp_path / "q.json"
    text.write_text("a b c d e f g", encoding="utf-8")
    assert main(["quality", "--text", str(text), option, str(numbers)]) == 0
    report = json.loads(numbers.read_text())
    assert report["perplexity"] == perplexities(tiny, texts_of(tiny, ["a b c d e f g"], 1))
    assert [row["exit_layer"] for row in report["perplexity"]["exits"]] == [1, 2, 3]
    assert "pass_at_1" not in report and "6 tokens judged" in capsys.readouterr().out


def test_the_command_draws(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    text, picture = tmp_path / "t.txt", tmp_path / "q.svg"
    text.write_text("a b c d e f g", encoding="utf-8")
    assert main(["quality", "--text", str(text), "--plot", str(picture)]) == 0
    assert "perplexity of every exit" in picture.read_text()


def test_the_command_with_the_problems_tests(tiny, capsys, monkeypatch):
    monkeypatch.setattr(quality, "completion", lambda *_: "    return None\n")
    assert main(["quality", "--num-prompts", "2", "--pass-at-1"]) == 0
    assert "0 of 2 problems solved" in capsys.readouterr().out


def test_without_a_sandbox_the_command_does_not_start(monkeypatch, capsys):
    def missing() -> None:
        raise ValueError("needs libseccomp")

    monkeypatch.setattr("layerskip_kernels.evaluation.sandbox.require_sandbox", missing)
    assert "needs libseccomp" in error_of(["quality", "--pass-at-1"], capsys)
