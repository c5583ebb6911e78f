"""Long contexts and long prompts: what a step reads of K and V, six rows beside one, prompts of thousands of tokens.

The shape of SmolLM2-135M with random weights and room for 65,536 positions, in bf16; K and V are random as well.
Growth: the bytes that a step reads more than after SHORTEST positions, per second that it takes more. Prompts: tokens
per second, and the peak memory of a process of its own over weights, cache and `import torch`: what is left must not
grow with the prompt.
"""

import sys
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from bench_memory import EMPTY, peak
from bench_steps import verifying
from layerskip_kernels import CachedSequence, Model, PagedKVCache, prefill
from layerskip_kernels.evaluation.step_bytes import verify_bytes
from layerskip_kernels.model.checkpoint import Checkpoint
from shapes import DTYPE, SMOLLM2, RandomTensors, filled_cache
from timing import (
    BitsDiffer,
    Candidate,
    Limits,
    Timing,
    arguments,
    described,
    finish,
    interleave,
    limit_candidates,
    limits_of,
)

SHORTEST, CONTEXTS, ROWS = 100, (100, 4096, 16384, 65536), (1, 6)
PROMPTS = (512, 2048, 8192)
MEMORY = """
import sys
sys.path.insert(0, {folder!r})
import torch
from bench_long import long_model, prompt_cache
from layerskip_kernels import prefill
torch.set_num_threads({threads})
model = long_model()
cache, sequence = prompt_cache(model, {tokens})
report["token"] = int(prefill(model, cache, [sequence]).next_tokens)
report["weight_bytes"] = sum({{t.data_ptr(): t.nbytes for t in model.weights.flat}}.values())
report["cache_bytes"] = sum(t.nbytes for t in cache.tensors)
"""


def main() -> None:
    args = arguments(__doc__, rounds=7, prompt_rounds=3)
    model = long_model()
    timings = interleave({**step_candidates(model), **limit_candidates()}, args.rounds)
    limits = Limits.of(timings)
    contexts = [context_result(model, context, timings, limits) for context in CONTEXTS]
    prompts = interleave({**prompt_candidates(model), **limit_candidates()}, args.prompt_rounds)
    results = [prompt_result(tokens, prompts, args.threads) for tokens in tqdm(PROMPTS, desc="peak memory")]
    finish("long", {**vars(limits), "contexts": contexts, "prompts": results, "prompt_limits": limits_of(prompts)},
           args.save)  # fmt: skip


def long_model() -> Model:
    config = replace(SMOLLM2, max_positions=max(CONTEXTS) + 16)
    return Model.from_checkpoint(Checkpoint(config, RandomTensors(config), None, "SmolLM2-135M, long", DTYPE))


# ---- contexts ----


def step_candidates(model: Model) -> dict[str, Candidate]:
    """A step of each number of rows after each context; the first row's logits must be the same in company."""
    candidates = {}
    for context in CONTEXTS:
        cache, [sequence] = filled_cache(model, context, 1, room=max(ROWS))
        logits = None
        for rows in ROWS:
            candidate = verifying(model, cache, sequence, list(range(1, rows)))
            found = candidate.run().logits[:1]
            candidate.restore()
            if logits is not None and not torch.equal(found, logits):
                raise BitsDiffer(f"at {context} positions, a row differs when others are computed beside it")
            logits, candidates[f"{rows} rows after {context}"] = found, candidate
    return candidates


def context_result(model: Model, context: int, timings: dict[str, Timing], limits: Limits) -> dict[str, Any]:
    one, many = (timings[f"{rows} rows after {context}"] for rows in ROWS)
    more = verify_bytes(model, 0, context + 1) - verify_bytes(model, 0, SHORTEST + 1)
    seconds = one.median - timings[f"{ROWS[0]} rows after {SHORTEST}"].median
    seconds_of_many = many.median - timings[f"{ROWS[-1]} rows after {SHORTEST}"].median
    limit = limits.read_bandwidth_gb_s * 1e9
    return {
        "context": context,
        **described(one),
        "rows_s": many.median,
        "kv_fraction_of_limit": more / seconds / limit if more else None,
        "kv_growth_over_1_row": seconds_of_many / seconds if more else None,
    }


# ---- prompts ----


def prompt_cache(model: Model, tokens: int) -> tuple[PagedKVCache, CachedSequence]:
    cache = PagedKVCache.with_room_for(model, [tokens + 1])
    generator = torch.Generator().manual_seed(0)
    return cache, cache.add_sequence(torch.randint(model.config.vocab_size, (tokens,), generator=generator).tolist())


def prompt_candidates(model: Model) -> dict[str, Candidate]:
    candidates = {}
    for tokens in PROMPTS:
        cache, sequence = prompt_cache(model, tokens)

        def prepare(cache: PagedKVCache = cache, sequence: CachedSequence = sequence) -> tuple[Any, ...]:
            cache.rollback([sequence])
            cache.pool.truncate(sequence.id, 0)
            return model, cache, [sequence]

        candidates[f"prompt of {tokens}"] = Candidate(prefill, prepare)
    return candidates


def prompt_result(tokens: int, timings: dict[str, Timing], threads: int) -> dict[str, Any]:
    timing = timings[f"prompt of {tokens}"]
    work = MEMORY.format(folder=str(sys.path[0]), threads=threads, tokens=tokens)
    used = peak(work)
    rest = used["peak_bytes"] - used["weight_bytes"] - used["cache_bytes"] - peak(EMPTY)["peak_bytes"]
    return {
        "tokens": tokens,
        **described(timing),
        "tokens_per_second": tokens / timing.median,
        "cache_bytes": used["cache_bytes"],
        "rest_bytes": rest,
    }


if __name__ == "__main__":
    main()
