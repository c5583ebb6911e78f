"""Made-up function heads: they parse, end with their docstring, and are the same for the same seed."""

import ast
import json
import random
import sys
from itertools import islice

import pytest
import torch

from layerskip_kernels import Model, load_model
from layerskip_kernels.evaluation.prompts import human_eval_prompts, read_jsonl_prompts
from layerskip_kernels.recipes import function_heads as recipe


@pytest.fixture(scope="module")
def model() -> Model:
    """The shipped tiny model: it ends most docstrings."""
    return load_model("layerskip-tiny-code", torch.float32)


@pytest.fixture
def few(monkeypatch):
    for name, value in (("DRAWN", 12), ("BATCH", 12)):
        monkeypatch.setattr(recipe, name, value)


def test_heads_are_functions():
    drawn = random.Random(0)
    for text, name in (recipe.head(drawn) for _ in range(500)):
        *_, function = ast.parse(f'{text}"""').body
        assert isinstance(function, ast.FunctionDef) and function.name == name


def test_prompts_end_with_their_docstring(model, few):
    prompts = [*recipe.function_heads(model, 10, seed=1)]
    assert len({*prompts}) == len(prompts) == 10
    for prompt in prompts:
        *_, function = ast.parse(prompt).body
        assert ast.get_docstring(function) and prompt.endswith('"""')
    with_doctest = [prompt for prompt in prompts if ">>> " in prompt]
    assert 0 < len(with_doctest) < 10
    assert [*islice(recipe.function_heads(model, 5, seed=1), 5)] == prompts[:5]
    assert [*islice(recipe.function_heads(model, 5, seed=2), 5)] != prompts[:5]
    assert not {*prompts} & {text for _, text in human_eval_prompts()}


def test_the_command_writes_what_adapt_reads(few, tmp_path, monkeypatch):
    output = tmp_path / "heads.jsonl"
    monkeypatch.setattr(sys, "argv", ["function_heads", str(output), "--count", "3", "--model", "layerskip-tiny-code"])
    recipe.main()
    found = [text for _, text in read_jsonl_prompts(output.read_text(encoding="utf-8"))]
    assert len(found) == 3
    assert found == [json.loads(line)["prompt"] for line in output.read_text(encoding="utf-8").splitlines()]
