"""Plain and self-speculative generation on HumanEval prompts, over exit layers and draft lengths.

SmolLM2-135M-Instruct, not trained for early exit: its acceptance is low, so these are not the speed-ups of a model
that is. Every setting's tokens, logits and KV bytes are compared with plain decoding's first.
"""

from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any

from timing import BitsDiffer, Candidate, Timing, arguments, described, finish, interleave
from tqdm import tqdm

from layerskip_kernels import Generation, GenerationConfig, Model, generate, load_model
from layerskip_kernels.datasets import human_eval_prompts
from layerskip_kernels.verify import compare

EXIT_LAYERS, NUM_SPECULATIONS = (5, 10, 20), (2, 4, 8)
PLAIN = "plain"


def main() -> None:
    args = arguments(__doc__, prompts=3, new_tokens=32)
    model = load_model()
    prompts = [model.tokenizer.encode(text) for _, text in human_eval_prompts(args.prompts)]
    configs = settings(args.new_tokens)
    statistics = compared(model, prompts, configs)
    rounds = []
    for prompt in tqdm(prompts, desc="timing", unit="prompt"):
        rounds.append(interleave(candidates(model, prompt, configs), min_rounds=1, warmup=0))
    results = [result(name, config, rounds, statistics[name], args.new_tokens) for name, config in configs.items()]
    shown = {"model": model.name, "prompts": len(prompts), "new_tokens": args.new_tokens, "bits_equal": True}
    finish("generate", {**shown, "results": results}, args.save)


def settings(new_tokens: int) -> dict[str, GenerationConfig]:
    """Plain decoding, and each exit layer with each number of drafts; none of them stops early."""
    plain = GenerationConfig("autoregressive", max_new_tokens=new_tokens, eos_token_ids=())
    drafting = {
        f"exit {e}, {d} drafts": replace(plain, strategy="self_speculative", exit_layer=e, num_speculations=d)
        for e, d in product(EXIT_LAYERS, NUM_SPECULATIONS)
    }
    return {PLAIN: plain, **drafting}


def compared(
    model: Model, prompts: list[list[int]], configs: dict[str, GenerationConfig]
) -> dict[str, tuple[int, int]]:
    """Drafted and accepted tokens of each setting, when its bits are those of plain decoding."""
    counts = dict.fromkeys(configs, (0, 0))
    for prompt in tqdm(prompts, desc="comparing bits", unit="prompt"):
        keep = {name: replace(config, return_logits=True, return_kv=True) for name, config in configs.items()}
        [plain] = generate(model, [prompt], keep[PLAIN])
        for name, config in keep.items():
            [generation] = generate(model, [prompt], config)
            if not compare(plain, generation).all_equal:
                raise BitsDiffer(f"{name} differs from plain decoding")
            drafted, accepted = counts[name]
            counts[name] = drafted + generation.drafted, accepted + generation.accepted
    return counts


def candidates(model: Model, prompt: list[int], configs: dict[str, GenerationConfig]) -> dict[str, Candidate]:
    def candidate(config: GenerationConfig) -> Candidate:
        return Candidate(lambda: generate(model, [prompt], config)[0], seconds=decoding_seconds)

    return {name: candidate(config) for name, config in configs.items()}


def decoding_seconds(generation: Generation) -> float:
    """Without the prompt, which all settings process in the same way."""
    return generation.draft_seconds + generation.verify_seconds


def result(
    name: str, config: GenerationConfig, rounds: list[dict[str, Timing]], counts: tuple[int, int], new_tokens: int
) -> dict[str, Any]:
    timing = Timing(tuple(timings[name].median for timings in rounds))
    drafted, accepted = counts
    return {
        "name": name,
        "exit_layer": config.exit_layer,
        "num_speculations": config.num_speculations if drafted else 0,
        **described(timing),
        "tokens_per_second": (new_tokens - 1) / timing.median,
        "acceptance_rate": accepted / drafted if drafted else None,
        "ratio_to_plain": median(timings[PLAIN].median / timings[name].median for timings in rounds),
    }


if __name__ == "__main__":
    main()
