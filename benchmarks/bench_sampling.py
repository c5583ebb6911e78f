"""Sampled generation on HumanEval prompts: both rules of acceptance against plain sampling with the same seeds.

SmolLM2-135M-Instruct, not trained for early exit: its acceptance is low. Tokens of the exact rule are compared with
plain sampling's first. Last, what drawing a token costs beside taking the greatest logit.
"""

from dataclasses import replace
from typing import Any

from tqdm import tqdm

from layerskip_kernels import Generation, GenerationConfig, Model, generate, load_model
from layerskip_kernels.evaluation.prompts import human_eval_prompts
from timing import BitsDiffer, Candidate, arguments, described, finish, interleave

FILTERS: dict[str, dict[str, Any]] = {
    "temperature 1": dict(temperature=1.0),
    "temperature 0.8, top-k 50, top-p 0.95": dict(temperature=0.8, top_k=50, top_p=0.95),
}
EXIT_LAYERS = (10, 20)


def main() -> None:
    args = arguments(__doc__, prompts=4, new_tokens=32, rounds=5)
    model = load_model(weights="16bit")
    prompts = [model.tokenizer.encode(text) for _, text in human_eval_prompts(args.prompts)]
    results = []
    for name, settings in tqdm(FILTERS.items(), desc="acceptance", unit="setting"):
        for exit_layer in EXIT_LAYERS:
            config = GenerationConfig(
                exit_layer=exit_layer, max_new_tokens=args.new_tokens, eos_token_ids=(), seed=1, **settings
            )
            results.append({"name": name, "exit_layer": exit_layer, **acceptance_rates(model, prompts, config)})
    plain = GenerationConfig("autoregressive", max_new_tokens=args.new_tokens, eos_token_ids=(), seed=1)
    timings = interleave(
        {name: candidate(model, prompts[0], replace(plain, **s)) for name, s in {"greedy": {}, **FILTERS}.items()},
        min_rounds=args.rounds,
    )
    costs = {
        name: {**described(timing), "over_greedy": timing.median / timings["greedy"].median}
        for name, timing in timings.items()
    }
    finish("sampling", {"model": model.name, "prompts": len(prompts), "results": results, "plain": costs}, args.save)


def acceptance_rates(model: Model, prompts: list[list[int]], config: GenerationConfig) -> dict[str, float]:
    """Accepted over drafted tokens by rule; raises BitsDiffer where the exact one is not plain sampling."""
    plain = [g.token_ids for p in prompts for g in generate(model, [p], config.plain())]
    rates = {}
    for rule in ("exact", "rejection"):
        generations = [g for p in prompts for g in generate(model, [p], replace(config, acceptance=rule))]
        if rule == "exact" and [g.token_ids for g in generations] != plain:
            raise BitsDiffer("speculation with acceptance='exact' differs from plain sampling")
        rates[rule] = sum(g.accepted for g in generations) / sum(g.drafted for g in generations)
    return rates


def candidate(model: Model, prompt: list[int], config: GenerationConfig) -> Candidate:
    return Candidate(lambda: generate(model, [prompt], config)[0], seconds=decoding_seconds)


def decoding_seconds(generation: Generation) -> float:
    return generation.draft_seconds + generation.verify_seconds


if __name__ == "__main__":
    main()
