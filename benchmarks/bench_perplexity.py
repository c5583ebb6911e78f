"""What weights cost: perplexity of HumanEval's solutions, given their prompts, in bf16, with int8 and as in the file.

Per token of the solutions, which are judged as ``layerskip quality`` judges them; the last layer alone is asked.
"""

from typing import Any

import torch

from layerskip_kernels import GenerationConfig, Model, generate, load_model
from layerskip_kernels.decoding.exits import each_exit
from layerskip_kernels.evaluation.quality import perplexities, solution_texts
from timing import BitsDiffer, arguments, finish

NAMES = {"16bit": "bf16", "int8": "int8", None: "as in the file (Q4_1)"}


def main() -> None:
    args = arguments(__doc__, problems=40)
    found = {}
    for weights in ("16bit", "int8", None):
        model = load_model(weights=weights)
        texts = solution_texts(model, args.problems)
        check_bits(model, *texts[0])
        found[NAMES[weights]] = perplexities(model, texts, exits=[])
    perplexity = {name: judged["exits"][-1]["perplexity"] for name, judged in found.items()}
    facts: dict[str, Any] = {"model": "SmolLM2-135M-Instruct", "problems": args.problems}
    facts["tokens"] = found["bf16"]["tokens"]
    finish("perplexity", {**facts, "bits_equal": True, "perplexity": perplexity}, args.save)


def check_bits(model: Model, tokens: list[int], start: int) -> None:
    """Raise BitsDiffer unless logits judged in one pass are those of plain decoding."""
    config = GenerationConfig("autoregressive", max_new_tokens=8, eos_token_ids=(), return_logits=True)
    [plain] = generate(model, [tokens[:start]], config)
    [judged] = each_exit(model, tokens[:start] + plain.token_ids[:-1], start - 1, [model.config.num_layers])
    if not torch.equal(judged.logits, plain.logits):
        raise BitsDiffer("logits judged in one pass differ from plain decoding's")


if __name__ == "__main__":
    main()
