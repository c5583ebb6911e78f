"""The real model: SmolLM2-135M-Instruct on HumanEval prompts."""

import re
from pathlib import Path

import pytest
import torch

from layerskip_kernels import GenerationConfig, generate, load_model
from layerskip_kernels.evaluation.prompts import human_eval_prompts
from layerskip_kernels.model.gguf_cache import converted_directory
from layerskip_kernels.model.sources import default_model_path

KEEP = dict(return_logits=True, return_kv=True)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def model(request):
    return load_model(dtype=request.param)


def same_bits(a, b) -> bool:
    return (
        a.token_ids == b.token_ids
        and torch.equal(a.logits, b.logits)
        and all(torch.equal(x, y) for x, y in zip(a.kv, b.kv, strict=True))
    )


@pytest.mark.parametrize("exit_layer", [1, 5, 10, 20, 29])
def test_speculation_changes_no_bit(model, exit_layer):
    prompts = [prompt for _, prompt in human_eval_prompts(2)]
    plain = generate(model, prompts, GenerationConfig("autoregressive", max_new_tokens=24, **KEEP))
    drafted = generate(model, prompts, GenerationConfig(exit_layer=exit_layer, max_new_tokens=24, **KEEP))
    assert all(same_bits(a, b) for a, b in zip(drafted, plain, strict=True))
    assert all(generation.drafted > 0 for generation in drafted)


def test_the_reference_agrees(model):
    """Few tokens: the reference takes about a second for each."""
    reference = load_model(dtype=model.dtype, backend="reference")
    config = GenerationConfig("autoregressive", max_new_tokens=2, **KEEP)
    prompt = model.tokenizer.encode("def add(a, b):")
    assert same_bits(generate(model, [prompt], config)[0], generate(reference, [prompt], config)[0])


def test_transformers_agrees():
    """fp32, the same weights: after each prefix of 20 texts of 64 new tokens, the same next token.

    Given our own text as input, so that one pass of Transformers checks all 64 greedy choices.
    """
    from transformers import AutoModelForCausalLM

    directory = converted_directory(default_model_path(), torch.float32)
    transformers_model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = load_model(dtype=torch.float32, weights="16bit")
    config = GenerationConfig("autoregressive", max_new_tokens=64, return_logits=True, eos_token_ids=())
    worst = 0.0
    for _, prompt in human_eval_prompts(20):
        ids = model.tokenizer.encode(prompt)
        ours = generate(model, [ids], config)[0]
        with torch.no_grad():
            theirs = transformers_model(torch.tensor([ids + ours.token_ids[:-1]])).logits[0, len(ids) - 1 :]
        assert theirs.argmax(dim=1).tolist() == ours.token_ids
        worst = max(worst, (theirs - ours.logits).abs().max().item())
    print(f"largest difference of a logit: {worst:.2e}")
    assert worst < 1e-3


def test_the_page_on_serving_runs(capsys):
    """Each block of Python that uses the engine, in order; the second one with requests to serve."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    *_, first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)  # those before are a client's and Ray's
    sent = []
    names = {"send": lambda *told: sent.append(told)}
    exec(first, names)
    [plain] = generate(names["engine"].model, ["def fibonacci(n):"], GenerationConfig("autoregressive"))
    printed = capsys.readouterr().out
    assert printed.startswith(f"{plain.text}\nlength ") and names["generations"][names["free"]].text in printed
    request_id = names["engine"].add_request("def fibonacci(n):", GenerationConfig(exit_layer=10, num_speculations=4))
    exec(second, names)
    assert "".join(told[1] for told in sent) == plain.text
    assert {told[0] for told in sent} == {request_id} and sent[-1][2:] == ("length", None)
