"""The engine: eight requests at once against one alone, and drafts chosen by measured costs against none.

SmolLM2-135M-Instruct, not trained for early exit: its drafts are seldom accepted, so this is where speculation does
not pay, and the engine has to find that out anew in each run, since each makes an engine of its own. Then a mix: the
parse model on utterances of its task and on HumanEval problems in one engine, drafts that pay beside drafts that do
not. Tokens, logits and KV bytes of everything timed are compared with plain decoding of each prompt alone first.
"""

from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from tqdm import tqdm

from layerskip_kernels import Engine, Generation, GenerationConfig, Model, PagedKVCache, generate, load_model
from layerskip_kernels.engine.drafting import DraftPolicy
from layerskip_kernels.evaluation.equality import compare
from layerskip_kernels.evaluation.prompts import example_prompts, human_eval_prompts
from timing import BitsDiffer, Candidate, Timing, arguments, described, finish, interleave

TOGETHER = 8  # requests, against one
BATCHES = (1, 4, 8, 16)
EXIT_LAYERS = (10, 20)
PROMPT_ROWS = 32  # of each prompt, where drafts are measured
PARSE, MIXED, FIXED_DRAFTS = "smollm2-135m-parse", 4, (1, 2, 4, 6, 10)  # so many prompts of each kind
PLAIN = "plain"
Prompts = list[list[int]]
Configs = dict[str, GenerationConfig]


@dataclass(frozen=True)
class Run:
    """What an engine made of some prompts; seconds of all, and of the steps after the prompts' own first one."""

    generations: list[Generation]
    seconds: float
    decoding_seconds: float

    @property
    def per_token(self) -> float:
        """Seconds per token, prompts included."""
        return self.seconds / sum(len(generation.token_ids) for generation in self.generations)

    @property
    def per_decoded_token(self) -> float:
        """Seconds per token after each request's first, which its prompt gives."""
        return self.decoding_seconds / sum(len(generation.token_ids) - 1 for generation in self.generations)


def main() -> None:
    args = arguments(__doc__, new_tokens=64, rounds=5)
    model = load_model(weights="16bit")
    prompts = [model.tokenizer.encode(text) for _, text in human_eval_prompts(max(BATCHES))]
    plain = GenerationConfig("autoregressive", max_new_tokens=args.new_tokens, eos_token_ids=())
    shown = {"model": model.name, "new_tokens": args.new_tokens, "prompt_rows": PROMPT_ROWS, "bits_equal": True}
    together = many_against_one(model, prompts[:TOGETHER], plain)
    drafts = drafts_against_none(model, [prompt[:PROMPT_ROWS] for prompt in prompts], plain, args.rounds)
    mix = mixed(args.new_tokens, args.rounds)
    finish("engine", {**shown, "together": together, "drafts": drafts, "mix": mix}, args.save)


# ---- many against one ----


def many_against_one(model: Model, prompts: Prompts, config: GenerationConfig) -> dict[str, Any]:
    """Tokens per second of all prompts at once and of each alone, one of them in every round."""
    check(model, prompts, {PLAIN: config})
    runs: dict[str, list[Run]] = {"together": [], "alone": []}
    candidates = {
        "together": Candidate(lambda: runs["together"].append(run(model, prompts, config))),
        "alone": Candidate(lambda: runs["alone"].append(run(model, [prompts[len(runs["alone"]) - 1]], config))),
    }
    interleave(candidates, min_rounds=len(prompts))
    decoding = {name: Timing(tuple(r.per_decoded_token for r in some[1:])) for name, some in runs.items()}
    whole = {name: Timing(tuple(r.per_token for r in some[1:])) for name, some in runs.items()}
    return {
        "requests": len(prompts),
        "decoding": {name: rate(timing) for name, timing in decoding.items()},
        "with_prompts": {name: rate(timing) for name, timing in whole.items()},
        "over_one": decoding["alone"].median / decoding["together"].median,
        "over_one_with_prompts": whole["alone"].median / whole["together"].median,
    }


def rate(timing: Timing) -> dict[str, float]:
    return {**described(timing), "tokens_per_second": 1 / timing.median}


# ---- drafts against none ----


def drafts_against_none(model: Model, prompts: Prompts, plain: GenerationConfig, rounds: int) -> list[dict[str, Any]]:
    """Batches with each exit layer, over the same batch by plain decoding."""
    drafting = {f"exit {e}": replace(plain, strategy="self_speculative", exit_layer=e) for e in EXIT_LAYERS}
    configs = {PLAIN: plain, **drafting}
    check(model, prompts, configs)
    results = []
    for batch in tqdm(BATCHES, "drafts", unit="batch"):
        last: dict[str, Run] = {}
        timings = interleave(candidates(model, prompts[:batch], configs, last), rounds)
        drafted = [{"name": name, **over_plain(timings, name), **counts(last[name])} for name in drafting]
        results.append({"batch": batch, PLAIN: rate(timings[PLAIN]), "results": drafted})
    return results


def mixed(new_tokens: int, rounds: int) -> dict[str, Any]:
    """Both kinds of prompts in one engine: fixed numbers of drafts for all, and what the engine chooses for each."""
    model = load_model(PARSE, weights="16bit")
    assert model.defaults is not None and model.tokenizer is not None
    prompts = [model.tokenizer.encode(text) for _, text in example_prompts(PARSE, MIXED).prompts]
    prompts += [model.tokenizer.encode(text)[:PROMPT_ROWS] for _, text in human_eval_prompts(MIXED)]
    plain = GenerationConfig("autoregressive", max_new_tokens=new_tokens)
    exit_layer = model.defaults.exit_layer
    fixed = {
        f"exit {exit_layer}, {count} drafts": GenerationConfig(
            exit_layer=exit_layer, num_speculations=count, max_new_tokens=new_tokens
        )
        for count in FIXED_DRAFTS
    }
    auto = GenerationConfig(exit_layer="auto", num_speculations="auto", max_new_tokens=new_tokens)
    configs = {PLAIN: plain, **fixed, "auto": auto}
    check(model, prompts, configs, "auto")
    last: dict[str, Run] = {}
    timings = interleave(candidates(model, prompts, configs, last, "auto"), rounds)
    results = [{"name": name, **over_plain(timings, name), **counts(last[name])} for name in configs]
    best = min(timings[name].median for name in fixed)
    return {"requests": len(prompts), "results": results, "auto_over_best_fixed": best / timings["auto"].median}


def candidates(
    model: Model, prompts: Prompts, configs: Configs, last: dict[str, Run], policy: DraftPolicy = "measured"
) -> dict[str, Candidate]:
    """Each config's run, the last of which is kept."""

    def candidate(name: str) -> Candidate:
        def timed() -> Run:
            last[name] = run(model, prompts, configs[name], policy)
            return last[name]

        return Candidate(timed, seconds=lambda run: run.per_decoded_token)

    return {name: candidate(name) for name in configs}


def over_plain(timings: dict[str, Timing], name: str) -> dict[str, float]:
    return {**rate(timings[name]), "time_over_plain": timings[name].median / timings[PLAIN].median}


def counts(run: Run) -> dict[str, int]:
    return {name: sum(getattr(g, name) for g in run.generations) for name in ("drafted", "accepted")}


# ---- runs ----


def run(model: Model, prompts: Prompts, config: GenerationConfig, policy: DraftPolicy = "measured") -> Run:
    """All prompts in the first step of a new engine, whose cache has just the room they need."""
    cache = PagedKVCache.with_room_for(model, [len(prompt) + config.max_new_tokens for prompt in prompts])
    engine = Engine(model, cache, max_batch=len(prompts), chunk_size=sum(map(len, prompts)), drafts=policy)
    ids = [engine.add_request(prompt, config) for prompt in prompts]
    start = perf_counter()
    engine.step()
    first = perf_counter()
    generations = engine.run()
    end = perf_counter()
    return Run([generations[request_id] for request_id in ids], end - start, end - first)


def check(model: Model, prompts: Prompts, configs: Configs, policy: DraftPolicy = "measured") -> None:
    """Raises BitsDiffer unless every config gives each prompt in the batch the bits of plain decoding alone."""
    configs = {name: replace(config, return_logits=True, return_kv=True) for name, config in configs.items()}
    alone = [generate(model, [prompt], configs[PLAIN])[0] for prompt in tqdm(prompts, "bits", unit="prompt")]
    for name, config in configs.items():
        for expected, generation in zip(alone, run(model, prompts, config, policy).generations, strict=True):
            if not compare(expected, generation).all_equal:
                raise BitsDiffer(f"{name}: a request in a batch differs from plain decoding alone")


if __name__ == "__main__":
    main()
