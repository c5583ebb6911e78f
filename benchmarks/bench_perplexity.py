"""What int8 weights cost: perplexity of HumanEval's solutions, given their prompts, in bf16 and with int8.

Per token of the solutions, which are appended to their prompts and judged in one pass each, as drafts are.
"""

import math
from typing import Any

import torch
from bench_steps import hand_made
from timing import BitsDiffer, arguments, finish
from torch import Tensor
from tqdm import tqdm

from layerskip_kernels import GenerationConfig, Model, PagedKVCache, generate, load_model, prefill, verify_step
from layerskip_kernels.datasets import human_eval_solutions

MAX_TOKENS = 512


def main() -> None:
    args = arguments(__doc__, problems=40)
    losses, counts = {}, {}
    for weights in (None, "int8"):
        model = load_model(weights=weights)
        assert model.tokenizer is not None
        problems = [encoded(model, *texts) for texts in human_eval_solutions(args.problems)]
        check_bits(model, *problems[0])
        name = weights or "bf16"
        nll = [loss(model, *problem) for problem in tqdm(problems, desc=f"perplexity, {name}", unit="problem")]
        losses[name], counts[name] = sum(nll), sum(len(solution) for _, solution in problems)
    perplexity = {name: math.exp(losses[name] / counts[name]) for name in losses}
    facts: dict[str, Any] = {"model": "SmolLM2-135M-Instruct", "problems": args.problems, "tokens": counts["bf16"]}
    finish("perplexity", {**facts, "bits_equal": True, "perplexity": perplexity}, args.save)


def encoded(model: Model, prompt: str, solution: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and of what follows it, cut where the text as a whole has them."""
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode(prompt + solution)[:MAX_TOKENS]
    start = len(model.tokenizer.encode(prompt))
    return tokens[:start], tokens[start:]


def loss(model: Model, prompt: list[int], solution: list[int]) -> float:
    """Negative log-likelihood of a solution after its prompt."""
    log_probabilities = judged(model, prompt, solution).double().log_softmax(-1)
    return -float(log_probabilities[torch.arange(len(solution)), torch.tensor(solution)].sum())


def judged(model: Model, prompt: list[int], tokens: list[int]) -> Tensor:
    """The logits [tokens, V] that the model has for each of some tokens after a prompt."""
    cache = PagedKVCache.with_room_for(model, [len(prompt) + len(tokens)])
    sequence = cache.add_sequence(prompt)
    first = prefill(model, cache, [sequence])
    cache.commit(first)
    sequence.tokens[-1] = tokens[0]  # in the place of the model's own choice
    rest = verify_step(model, cache, hand_made(sequence, tokens[1:]))
    return torch.cat([first.logits, rest.logits[:-1]])


def check_bits(model: Model, prompt: list[int], _: list[int]) -> None:
    config = GenerationConfig("autoregressive", max_new_tokens=8, eos_token_ids=(), return_logits=True)
    [plain] = generate(model, [prompt], config)
    assert plain.logits is not None
    if not torch.equal(judged(model, prompt, plain.token_ids), plain.logits):
        raise BitsDiffer("logits judged in one pass differ from plain decoding's")


if __name__ == "__main__":
    main()
