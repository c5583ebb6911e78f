"""What a draft vocabulary saves and what it loses: drafting time and acceptance for lists of several sizes.

The lists hold the most frequent tokens of a corpus that every Python brings along, the sources of its standard
library, and so none of the HumanEval prompts they are tried on. ``coverage`` is the share of plain decoding's tokens
that are in the list: no draft outside it can be right. Acceptance is of SmolLM2-135M-Instruct, which was not trained
for early exit: at the default exit layer hardly a draft is accepted, so a deep exit is shown beside it.
"""

import sysconfig
from pathlib import Path
from typing import Any

from tqdm import tqdm

from layerskip_kernels import GenerationConfig, Model, draft_step, generate, load_model
from layerskip_kernels.evaluation.equality import compare
from layerskip_kernels.evaluation.prompts import human_eval_prompts
from layerskip_kernels.evaluation.step_bench import prefilled, prompt_tokens
from layerskip_kernels.evaluation.step_bytes import draft_bytes, head_bytes
from layerskip_kernels.model.draft_vocab import most_frequent_tokens
from timing import BitsDiffer, Candidate, Timing, arguments, described, finish, interleave, limit_candidates, limits_of

SIZES = (2048, 4096, 8192, 16384)
EXIT_LAYER, DEEP_EXIT_LAYER, NUM_DRAFTS, CONTEXT = 10, 27, 4, 100
CORPUS_BYTES = 4_000_000


def main() -> None:
    args = arguments(__doc__, rounds=15, prompts=5, new_tokens=32)
    model = load_model(weights="16bit")
    assert model.tokenizer is not None
    texts = standard_library(CORPUS_BYTES)
    vocabularies = {size: most_frequent_tokens(model.tokenizer, texts, size) for size in tqdm(SIZES, desc="counting")}
    models = {0: model, **{size: model.with_draft_vocab(ids) for size, ids in vocabularies.items()}}
    prompts = [model.tokenizer.encode(text) for _, text in human_eval_prompts(args.prompts)]
    acceptance = {
        exit_layer: accepted(models, prompts, exit_layer, args.new_tokens)
        for exit_layer in (EXIT_LAYER, DEEP_EXIT_LAYER)
    }
    covered = coverage(model, prompts, vocabularies, args.new_tokens)
    timings = interleave({**{str(n): drafting(m) for n, m in models.items()}, **limit_candidates()}, args.rounds)
    results = [
        {**result(models[n], timings[str(n)], timings["0"]), "coverage": covered.get(n, 1.0),
         "acceptance": {str(e): rates[n] for e, rates in acceptance.items()}}
        for n in models
    ]  # fmt: skip
    facts = {"model": model.name, "corpus": f"Python's standard library, {sum(map(len, texts))} characters of source",
             "exit_layer": EXIT_LAYER, "num_speculations": NUM_DRAFTS, "prompts": len(prompts),
             "new_tokens": args.new_tokens, "bits_equal": True}  # fmt: skip
    finish("draft_vocab", {**facts, **limits_of(timings), "results": results}, args.save)


def standard_library(num_bytes: int) -> list[str]:
    """Sources of Python's standard library in the order of their names, up to a size."""
    texts, read = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if read < num_bytes:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            read += len(texts[-1])
    return texts


def accepted(models: dict[int, Model], prompts: list[list[int]], exit_layer: int, new_tokens: int) -> dict[int, float]:
    """The acceptance rate of each model's drafts, whose bits are compared with plain decoding's."""
    keep = dict(eos_token_ids=(), return_logits=True, return_kv=True)
    drafting = GenerationConfig("self_speculative", exit_layer, NUM_DRAFTS, new_tokens, **keep)
    counts = dict.fromkeys(models, (0, 0))
    for prompt in tqdm(prompts, desc=f"acceptance at exit {exit_layer}", unit="prompt"):
        [expected] = generate(models[0], [prompt], drafting.plain())
        for size, model in models.items():
            [drafted] = generate(model, [prompt], drafting)
            if not compare(expected, drafted).all_equal:
                raise BitsDiffer(f"with a draft vocabulary of {size}, exit {exit_layer}, bits differ")
            counts[size] = counts[size][0] + drafted.accepted, counts[size][1] + drafted.drafted
    return {size: accepted / drafted for size, (accepted, drafted) in counts.items()}


def coverage(
    model: Model, prompts: list[list[int]], vocabularies: dict[int, list[int]], new_tokens: int
) -> dict[int, float]:
    config = GenerationConfig("autoregressive", max_new_tokens=new_tokens, eos_token_ids=())
    tokens = [token for prompt in prompts for token in generate(model, [prompt], config)[0].token_ids]
    return {size: sum(t in ids for t in tokens) / len(tokens) for size, ids in
            ((size, set(ids)) for size, ids in vocabularies.items())}  # fmt: skip


def drafting(model: Model) -> Candidate:
    cache, sequence = prefilled(model, prompt_tokens(model, CONTEXT), NUM_DRAFTS + 1)
    return Candidate(
        lambda: draft_step(model, cache, [sequence], EXIT_LAYER, NUM_DRAFTS), restore=lambda: cache.rollback([sequence])
    )


def result(model: Model, timing: Timing, full: Timing) -> dict[str, Any]:
    return {
        "size": model.config.vocab_size if model.draft_ids is None else len(model.draft_ids),
        "draft_step": described(timing),
        "over_full": timing.median / full.median,
        "bytes": draft_bytes(model, EXIT_LAYER, NUM_DRAFTS, CONTEXT + 1),
        "head_bytes": head_bytes(model, drafting=True),
    }


if __name__ == "__main__":
    main()
