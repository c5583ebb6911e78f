"""What weights cost: perplexity of HumanEval's solutions, given their prompts, and how far from fp32 probabilities are.

Per token of the solutions, which are judged as ``layerskip quality`` judges them; the last layer alone is asked.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from layerskip_kernels import GenerationConfig, Model, generate, load_model
from layerskip_kernels.decoding.exits import ExitRows, each_exit
from layerskip_kernels.evaluation.quality import perplexities, solution_texts
from timing import BitsDiffer, arguments, finish

NAMES = {"16bit": "bf16", "int15": "int15", "int8": "int8", "q8_0": "Q8_0", None: "as in the file (Q4_1)"}


def main() -> None:
    args = arguments(__doc__, problems=40)
    exact = load_model(dtype=torch.float32, weights="16bit")
    found, distance = {}, {}
    for weights, name in NAMES.items():
        model = load_model(weights=weights)
        texts = solution_texts(model, args.problems)
        check_bits(model, *texts[0])
        found[name] = perplexities(model, texts, exits=[])
        distance[name] = distances(model, exact, texts)
    perplexity = {name: judged["exits"][-1]["perplexity"] for name, judged in found.items()}
    facts: dict[str, Any] = {"model": "SmolLM2-135M-Instruct", "problems": args.problems}
    facts["tokens"] = found["bf16"]["tokens"]
    finish("perplexity", {**facts, "bits_equal": True, "perplexity": perplexity, "from_fp32": distance}, args.save)


def distances(model: Model, exact: Model, texts: Sequence[tuple[list[int], int]]) -> dict[str, float]:
    """Over the judged tokens: the mean of KL(exact || model), and the part of them for which both say the same."""
    divergence, same, count = 0.0, 0, 0
    for tokens, start in texts:
        for ours, theirs in zip(_judged(model, tokens, start), _judged(exact, tokens, start), strict=True):
            p, q = (rows.logits.double().log_softmax(-1) for rows in (theirs, ours))
            divergence += (p.exp() * (p - q)).sum().item()
            same += int((ours.tokens == theirs.tokens).sum())
            count += len(ours.tokens)
    return {"kl": divergence / count, "agreement": same / count}


def _judged(model: Model, tokens: list[int], start: int) -> Iterator[ExitRows]:
    return each_exit(model, tokens[:-1], start - 1, [model.config.num_layers])


def check_bits(model: Model, tokens: list[int], start: int) -> None:
    """Raise BitsDiffer unless logits judged in one pass are those of plain decoding."""
    config = GenerationConfig("autoregressive", max_new_tokens=8, eos_token_ids=(), return_logits=True)
    [plain] = generate(model, [tokens[:start]], config)
    [judged] = each_exit(model, tokens[:start] + plain.token_ids[:-1], start - 1, [model.config.num_layers])
    if not torch.equal(judged.logits, plain.logits):
        raise BitsDiffer("logits judged in one pass differ from plain decoding's")


if __name__ == "__main__":
    main()
