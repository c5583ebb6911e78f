"""``layerskip quality``: perplexity of every exit, and the part of HumanEval's problems that a model solves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.decoding.exits import each_exit
from layerskip_kernels.engine.generation import generate
from layerskip_kernels.evaluation.prompts import human_eval_problems, human_eval_solutions
from layerskip_kernels.evaluation.sandbox import run_tests
from layerskip_kernels.model.model import Model

__all__ = ["STOPS", "Text", "as_text", "completion", "pass_at_1", "perplexities", "solution_texts", "texts_of"]

MAX_TOKENS = 512
# What begins after a function, where its solution is over: those of Chen et al. 2021 (arXiv 2107.03374), section 2.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

Text = tuple[list[int], int]  # token ids, and how many of them are given: all others are judged


# ---- perplexity ----


def texts_of(model: Model, texts: Sequence[str], num_problems: int) -> list[Text]:
    """What is judged: given texts in pieces, each from its second token on, or HumanEval's solutions.

    A piece has at most 512 tokens, or as many as the model has positions.
    """
    if not texts:
        return solution_texts(model, num_problems)
    longest = piece_length(model)
    ids = [_tokens(model, text) for text in texts]
    pieces = [text[at : at + longest] for text in ids for at in range(0, len(text), longest)]
    if not any(len(piece) > 1 for piece in pieces):
        raise ValueError("the texts have no token that follows another; give longer ones")
    return [(piece, 1) for piece in pieces if len(piece) > 1]


def _tokens(model: Model, text: str) -> list[int]:
    """Of a text of any length: it is cut afterwards."""
    if model.tokenizer is None:
        raise ValueError("this model came without a tokenizer, which texts need")
    return model.tokenizer.encode(text)


def piece_length(model: Model) -> int:
    """Tokens of a piece: all but its last pass through the model."""
    return min(MAX_TOKENS, model.config.max_positions)


def solution_texts(model: Model, num_problems: int) -> list[Text]:
    """HumanEval's own solutions after their prompts, cut where a text as a whole has the tokens of a piece.

    Problems whose prompt alone is that long are passed over, for as many of those that follow. Raises ValueError where
    none of all fits.
    """
    longest = piece_length(model)
    fitting: list[Text] = []
    for prompt, solution in human_eval_solutions(num_problems) + human_eval_solutions()[num_problems:]:
        tokens, start = _tokens(model, prompt + solution)[:longest], len(_tokens(model, prompt))
        if start < len(tokens):
            fitting.append((tokens, start))
        if len(fitting) == num_problems:
            break
    if not fitting:
        raise ValueError(f"no prompt of HumanEval is shorter than the model's {longest} positions; give texts")
    return fitting


def perplexities(model: Model, texts: Sequence[Text], exits: Sequence[int] | None = None) -> dict[str, Any]:
    """Of each exit in ``exits`` and of the last layer (None: of all layers), over the judged tokens of some texts.

    ``tokens``: how many; ``exits``: for each ``exit_layer`` its ``perplexity`` (exp of the mean negative
    log-likelihood) and its ``agreement``, the part of the tokens for which it says what the last layer says;
    ``adapters``: the same of each of the model's exit adapters whose exit is among those, where there are any. Its
    ``perplexity`` is None where its head has not all the words of the texts.
    """
    last = model.config.num_layers
    asked = range(1, last + 1) if exits is None else sorted({*exits, last})
    model = model.with_exit_adapters(asked)
    places = [(layer, False) for layer in asked] + [(adapter.exit_layer, True) for adapter in model.exit_adapters]
    losses: dict[tuple[int, bool], list[Tensor]] = {place: [] for place in places}
    said: dict[tuple[int, bool], list[Tensor]] = {place: [] for place in places}
    for tokens, start in tqdm(texts, desc="perplexity", unit="text"):
        targets = torch.tensor(tokens)
        for rows in each_exit(model, tokens[:-1], start - 1, asked, adapters=True):
            following = targets[rows.position + 1 : rows.position + 1 + len(rows.tokens)]
            log_probabilities = rows.logits.double().log_softmax(-1)
            losses[rows.layer, rows.adapted].append(-log_probabilities.gather(1, following[:, None])[:, 0])
            said[rows.layer, rows.adapted].append(rows.tokens)
    final = torch.cat(said[last, False])
    results = [
        {
            "exit_layer": place[0],
            "perplexity": math.exp(loss) if math.isfinite(loss := torch.cat(losses[place]).mean().item()) else None,
            "agreement": (torch.cat(said[place]) == final).double().mean().item(),
        }
        for place in places
    ]
    found = {"tokens": len(final), "exits": results[: len(asked)]}
    return {**found, "adapters": results[len(asked) :]} if model.exit_adapters else found


# ---- pass@1 ----


def pass_at_1(model: Model, num_problems: int, max_new_tokens: int = 384) -> dict[str, Any]:
    """The part of HumanEval's first problems whose tests the model's greedy solution passes; see `sandbox`.

    ``outcomes``: how many of them passed, and what stopped the others. Raises ValueError where there is no sandbox.
    """
    problems = human_eval_problems(num_problems)
    outcomes: Counter[str] = Counter()
    passed = 0
    for problem in tqdm(problems, desc="pass@1", unit="problem"):
        prompt = problem["prompt"].rstrip()  # as in human_eval_prompts
        program = prompt + completion(model, prompt, max_new_tokens)
        outcome = run_tests(program, problem["test"], problem["entry_point"], given=problem["prompt"])
        outcomes[outcome.reason] += 1
        passed += outcome.passed
    return {
        "problems": len(problems),
        "passed": passed,
        "pass_at_1": passed / len(problems),
        "outcomes": dict(outcomes.most_common()),
    }


def completion(model: Model, prompt: str, max_new_tokens: int) -> str:
    """What the model writes after a prompt, greedily, up to where something else begins."""
    if model.tokenizer is None:
        raise ValueError("this model came without a tokenizer, so it can write no program")
    ids = model.tokenizer.encode(prompt)
    [generation] = generate(model, [ids], GenerationConfig(max_new_tokens=max_new_tokens, stop=STOPS))
    # Behind the prompt, not by itself: some decoders drop a blank at the start, and here that is indentation.
    written = model.tokenizer.decode(ids + generation.token_ids)[len(model.tokenizer.decode(ids)) :]
    return written[: min((at for stop in STOPS if (at := written.find(stop)) >= 0), default=len(written))]


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    found = report["perplexity"]
    lines = [f"{report['model']}, {found['tokens']} tokens judged", f"{'exit':>6}{'perplexity':>14}{'agreement':>12}"]
    lines += [_line(row, str(row["exit_layer"])) for row in found["exits"]]
    for adapter in found.get("adapters", []):
        lines.append(_line(adapter, f"{adapter['exit_layer']} +") + "  (with the exit adapter)")
    lines.append("agreement: the part of the tokens for which an exit says what the last layer says")
    if solved := report.get("pass_at_1"):
        outcomes = ", ".join(f"{reason} {count}" for reason, count in solved["outcomes"].items())
        lines.append(
            f"HumanEval: {solved['passed']} of {solved['problems']} problems solved, pass@1 "
            f"{solved['pass_at_1']:.1%} ({outcomes})"
        )
    return "\n".join(lines)


def _line(row: dict[str, Any], name: str) -> str:
    perplexity = row["perplexity"]
    shown = "-" if perplexity is None else f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.2g}"
    return f"{name:>6}{shown:>14}{row['agreement']:>12.1%}"
