"""A step by its rows and by its context, and what Python and dispatch add to it.

On SmolLM2-135M-Instruct in bf16. Rows: ``verify_step`` of hand-made drafts, all of whose rows pass all layers; the
drafts are the model's own tokens, so their logits must be those of plain decoding. Context: one row after so many
positions of random K and V. Overhead: ``generate`` on a model of as many layers, but next to no arithmetic, with one
thread, less what its layers take: what is left is Python, dispatch and the checks.
"""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from layerskip_kernels import (
    CachedSequence,
    Draft,
    GenerationConfig,
    Model,
    PagedKVCache,
    generate,
    load_model,
    verify_step,
)
from layerskip_kernels.evaluation.step_bench import prefilled, prompt_tokens
from layerskip_kernels.evaluation.step_bytes import verify_bytes
from layerskip_kernels.operands import PendingRows
from shapes import filled_cache, narrow_model
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
)

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 48)
CONTEXTS = (100, 1024, 2048, 4096)
PROMPT, NARROW_TOKENS, WARM = 100, 64, 3
Opened = tuple[PagedKVCache, CachedSequence]


def main() -> None:
    args = arguments(__doc__, rounds=15)
    model = load_model(weights="16bit")
    rows = row_candidates(model)
    contexts = context_candidates(model)
    timings = interleave({**rows, **contexts, **limit_candidates()}, args.rounds)
    limits = Limits.of(timings)
    step = timings[row_name(1)].median
    measured = {
        "model": model.name,
        **vars(limits),
        "rows": [rows_result(model, n, timings) for n in ROWS],
        "contexts": [context_result(model, n, timings, limits) for n in CONTEXTS],
        "overhead": overhead(model, step, args.rounds),
    }
    finish("steps", measured, args.save)


def hand_made(sequence: CachedSequence, tokens: list[int]) -> Draft:
    """A draft that no layer has seen yet."""
    return Draft.of_tokens([sequence], [tokens])


def verifying(model: Model, cache: PagedKVCache, sequence: CachedSequence, tokens: list[int]) -> Candidate:
    """One step after WARM like it that are not timed: as in decoding, its threads are awake and its code is near."""
    draft = hand_made(sequence, tokens)

    def restore() -> None:
        cache.rollback([sequence])

    def prepare() -> tuple[()]:
        for _ in range(WARM):
            verify_step(model, cache, draft)
            restore()
        return ()

    return Candidate(lambda: verify_step(model, cache, draft), prepare, restore)


# ---- rows ----


def row_name(rows: int) -> str:
    return f"{rows} rows"


def row_candidates(model: Model) -> dict[str, Candidate]:
    """A candidate for each number of rows, its logits compared with plain decoding's."""
    prompt = prompt_tokens(model, PROMPT)
    config = GenerationConfig("autoregressive", max_new_tokens=max(ROWS) + 1, eos_token_ids=(), return_logits=True)
    [plain] = generate(model, [prompt], config)
    assert plain.logits is not None
    cache, sequence = prefilled(model, prompt, max(ROWS) + 1)
    candidates, drafts = {}, plain.token_ids[1:]
    for rows in ROWS:
        candidate = verifying(model, cache, sequence, drafts[: rows - 1])
        if not torch.equal(candidate.run().logits, plain.logits[1 : rows + 1]):
            raise BitsDiffer(f"{rows} rows in one pass differ from plain decoding")
        candidate.restore()
        candidates[row_name(rows)] = candidate
    return candidates


def rows_result(model: Model, rows: int, timings: dict[str, Timing]) -> dict[str, Any]:
    timing = timings[row_name(rows)]
    num_bytes = verify_bytes(model, rows - 1, PROMPT + 1)
    return {
        "rows": rows,
        "bytes": num_bytes,
        **described(timing),
        "over_1_row": timing.median / timings[row_name(1)].median,
    }


# ---- context ----


def context_name(context: int) -> str:
    return f"context {context}"


def context_candidates(model: Model) -> dict[str, Candidate]:
    candidates = {}
    for context in CONTEXTS:
        cache, [sequence] = filled_cache(model, context, 1, room=3)
        alone = verifying(model, cache, sequence, [])
        beside = verifying(model, cache, sequence, [1, 2])
        logits = alone.run().logits
        alone.restore()
        if not torch.equal(beside.run().logits[:1], logits):
            raise BitsDiffer(f"at {context} positions, a row differs when others are computed beside it")
        beside.restore()
        candidates[context_name(context)] = alone
    return candidates


def context_result(model: Model, context: int, timings: dict[str, Timing], limits: Limits) -> dict[str, Any]:
    """``kv_fraction_of_limit``: the bytes more than at the shortest context, per second more, over the bandwidth."""
    timing, shortest = timings[context_name(context)], timings[context_name(CONTEXTS[0])]
    num_bytes = verify_bytes(model, 0, context + 1)
    more_bytes = num_bytes - verify_bytes(model, 0, CONTEXTS[0] + 1)
    more_seconds = timing.median - shortest.median
    fraction = more_bytes / more_seconds / (limits.read_bandwidth_gb_s * 1e9) if more_bytes else None
    return {"context": context, "bytes": num_bytes, **described(timing), "kv_fraction_of_limit": fraction}


# ---- overhead ----


def overhead(model: Model, step_seconds: float, rounds: int) -> dict[str, Any]:
    """Seconds per token of the narrow model's ``generate`` outside its layers, in this process, after the steps."""
    narrow = narrow_model(model.config.num_layers)
    config = GenerationConfig("autoregressive", max_new_tokens=NARROW_TOKENS, eos_token_ids=())

    def tokens() -> float:
        times: list[float] = []
        generate(narrow, [[1, 2, 3]], config, on_tokens=lambda *_: times.append(perf_counter()))
        return (times[-1] - times[0]) / (NARROW_TOKENS - 1)

    candidates = {
        "tokens": Candidate(tokens, seconds=float),
        "all layers": Candidate(narrow_calls(narrow, 0), seconds=float),
        "no layers": Candidate(narrow_calls(narrow, narrow.config.num_layers), seconds=float),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    timings = interleave(candidates, rounds)
    torch.set_num_threads(threads)
    layers = timings["all layers"].median - timings["no layers"].median
    outside = timings["tokens"].median - layers
    return {
        **described(timings["tokens"]),
        "layers_s": layers,
        "outside_s": outside,
        "fraction_of_step": outside / step_seconds,
    }


def narrow_calls(narrow: Model, depth: int) -> Callable[[], float]:
    """Seconds of the backend's verify_pass, with one row that has passed ``depth`` layers already."""
    cache, [sequence] = filled_cache(narrow, NARROW_TOKENS, 1, room=1)
    cache.hidden.zero_()
    cache.pool.append([sequence.id], [1])
    rows = PendingRows(
        tokens=torch.tensor([1]),
        positions=torch.tensor([NARROW_TOKENS]),
        depths=torch.tensor([depth], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
        block_table=torch.from_numpy(cache.pool.block_table([sequence.id])),
    )
    num_drafts, judged = torch.tensor([0]), torch.tensor([True])

    def run() -> float:
        start = perf_counter()
        for _ in range(NARROW_TOKENS):
            narrow.ops.verify_pass(narrow.weights, narrow.sizes, cache.tensors, rows, num_drafts, judged)
        return (perf_counter() - start) / NARROW_TOKENS

    return run


if __name__ == "__main__":
    main()
