"""``layerskip bench``: the two steps of decoding against plain decoding."""

from __future__ import annotations

from typing import Any

import torch

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.decoding.kv_cache import CachedSequence, PagedKVCache
from layerskip_kernels.decoding.steps import Draft, Verdict, draft_step, prefill, verify_step
from layerskip_kernels.engine.generation import generate
from layerskip_kernels.evaluation.equality import BitsDiffer, compare
from layerskip_kernels.evaluation.facts import load_of, machine_facts
from layerskip_kernels.evaluation.limits import Limits, limit_candidates
from layerskip_kernels.evaluation.step_bytes import draft_bytes, verify_bytes
from layerskip_kernels.evaluation.timing import MIN_ROUNDS, Candidate, Timing, interleave
from layerskip_kernels.evaluation.trust import OtherWork, doubt_of
from layerskip_kernels.model.model import Model

__all__ = ["as_text", "bench", "prefilled", "prompt_tokens", "same_bits", "step_candidates"]

CONTEXT = 100  # tokens of the prompt that the steps follow
SECONDS = 10.0


def bench(
    model: Model, exit_layer: int, num_speculations: int, min_rounds: int = MIN_ROUNDS, seconds: float = SECONDS
) -> dict[str, Any]:
    """Time the steps on a model, after the bits of a cycle were compared with plain decoding's.

    Gives ``machine`` (with the ``settings``), ``read_bandwidth_gb_s``, ``fma_peak_gflop_s``, ``doubt`` (of the cycle,
    see `trust.doubt_of`) and ``results``: for ``autoregressive`` (the baseline: verification of an empty draft, 1
    token), ``draft_step`` (d tokens drafted), ``verify_step`` (d + 1 rows judged) and ``cycle`` (both; d + 1 tokens,
    as if all drafts were accepted) the median and the distance of the quartiles in seconds, tokens per second, the
    bytes of weights and KV read, these bytes per second over the read bandwidth, and the tokens per second over the
    baseline's.

    Raises BitsDiffer where they are not equal.
    """
    model.check_exit(exit_layer)
    model = model.with_exit_adapters([exit_layer])
    prompt = prompt_tokens(model, min(CONTEXT, model.config.max_positions - num_speculations - 2))
    if not same_bits(model, prompt, exit_layer, num_speculations):
        raise BitsDiffer("self-speculative decoding gave other bits than plain decoding; run `layerskip verify`")
    cache, sequence = prefilled(model, prompt, num_speculations + 1)
    steps = step_candidates(model, cache, sequence, exit_layer, num_speculations)
    facts, others = machine_facts(), OtherWork()
    timings = interleave({**steps, **limit_candidates()}, min_rounds, seconds)
    facts["other_cpus"] = others.cpus()
    limits = Limits.of(timings)
    settings = {"model": model.name, "dtype": str(model.dtype).removeprefix("torch."), "exit_layer": exit_layer,
                "num_speculations": num_speculations, "context": len(prompt), "bits_equal": True}  # fmt: skip
    results = _results(model, timings, limits, exit_layer, num_speculations, len(sequence.tokens))
    return {
        "machine": {**facts, "settings": settings},
        "read_bandwidth_gb_s": limits.read_bandwidth_gb_s,
        "fma_peak_gflop_s": limits.fma_peak_gflop_s,
        "doubt": _doubt(results[-1], num_speculations + 1, facts["other_cpus"]),
        "results": results,
    }


def prompt_tokens(model: Model, count: int) -> list[int]:
    """Random tokens, always the same ones: times do not depend on which."""
    return torch.randint(model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def same_bits(
    model: Model, prompt: list[int] | str, exit_layer: int, num_speculations: int, num_cycles: int = 1
) -> bool:
    """Whether tokens, logits and KV bytes of some cycles, or more, are those of plain decoding."""
    most = 1 + num_cycles * (num_speculations + 1)
    config = GenerationConfig(
        exit_layer=exit_layer, num_speculations=num_speculations, max_new_tokens=most,
        eos_token_ids=(), return_logits=True, return_kv=True,
    )  # fmt: skip
    [plain] = generate(model, [prompt], config.plain())
    [drafted] = generate(model, [prompt], config)
    return compare(plain, drafted).all_equal and drafted.drafted > 0


def prefilled(model: Model, prompt: list[int], room: int) -> tuple[PagedKVCache, CachedSequence]:
    """A cache with a prompt in it and room for some more positions."""
    cache = PagedKVCache.with_room_for(model, [len(prompt) + room])
    sequence = cache.add_sequence(prompt)
    cache.commit(prefill(model, cache, [sequence]))
    return cache, sequence


def step_candidates(
    model: Model, cache: PagedKVCache, sequence: CachedSequence, exit_layer: int, num_speculations: int
) -> dict[str, Candidate]:
    """The baseline and the two steps, each undone after it was timed, so that all stand at the same position.

    The baseline is the model without its exit adapters, in a cache of its own.
    """
    plain, plain_cache, plain_sequence = model, cache, sequence
    if model.exit_adapters:
        plain = model.with_exit_adapters([])
        plain_cache, plain_sequence = prefilled(plain, sequence.tokens[: cache.length(sequence)], 1)

    def undo() -> None:
        cache.rollback([sequence])
        plain_cache.rollback([plain_sequence])

    def decode() -> Verdict:
        return verify_step(plain, plain_cache, Draft.none([plain_sequence]))

    def draft() -> Draft:
        draft = draft_step(model, cache, [sequence], exit_layer, num_speculations)
        model.ops.synchronize()  # a device may begin to draft after draft_step has returned
        return draft

    def verify(draft: Draft) -> Verdict:
        return verify_step(model, cache, draft)

    return {
        "autoregressive": Candidate(decode, restore=undo),
        "draft_step": Candidate(draft, restore=undo),
        "verify_step": Candidate(verify, prepare=lambda: (draft(),), restore=undo),
    }


def _results(
    model: Model, timings: dict[str, Timing], limits: Limits, exit_layer: int, num_drafts: int, length: int
) -> list[dict[str, Any]]:
    plain, draft, verify = (timings[name] for name in ("autoregressive", "draft_step", "verify_step"))
    both = Timing(tuple(d + v for d, v in zip(draft.seconds, verify.seconds, strict=True)))
    drafted, verified = draft_bytes(model, exit_layer, num_drafts, length), verify_bytes(model, num_drafts, length)
    rows = [
        ("autoregressive", plain, 1, verify_bytes(model, 0, length)),
        ("draft_step", draft, num_drafts, drafted),
        ("verify_step", verify, num_drafts + 1, verified),
        ("cycle", both, num_drafts + 1, drafted + verified),
    ]
    return [_result(name, timing, tokens, read, limits, plain) for name, timing, tokens, read in rows]


def _result(name: str, timing: Timing, tokens: int, num_bytes: int, limits: Limits, baseline: Timing) -> dict[str, Any]:
    return {
        "name": name,
        "median_s": timing.median,
        "iqr_s": timing.iqr,
        "tokens_per_second": tokens / timing.median,
        "bytes": num_bytes,
        "fraction_of_limit": num_bytes / timing.median / (limits.read_bandwidth_gb_s * 1e9),
        "ratio_to_baseline": tokens * baseline.median / timing.median,
    }


def _doubt(cycle: dict[str, Any], tokens: int, other_cpus: float | None) -> str | None:
    """Why the speed-up of a cycle is not to be trusted; its spread is that between the quartiles."""
    speedup, half = cycle["ratio_to_baseline"], cycle["iqr_s"] / cycle["median_s"] / 2
    return doubt_of(speedup, tokens, (speedup * (1 - half), speedup * (1 + half)), other_cpus=other_cpus)


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    settings = report["machine"]["settings"]
    lines = [
        f"{settings['model']}: {settings['num_speculations']} drafts with the first {settings['exit_layer']} layers, "
        f"after {settings['context']} tokens; bits equal to plain decoding's",
        f"limits: {report['read_bandwidth_gb_s']:.1f} GB/s read, {report['fma_peak_gflop_s']:.0f} GFLOP/s in fp32; "
        f"{load_of(report['machine'])}",
        f"{'':<16} {'ms':>9} {'(IQR)':>9} {'tokens/s':>9} {'MB read':>9} {'of limit':>9} {'speed':>7}",
    ]
    for row in report["results"]:
        lines.append(
            f"{row['name']:<16} {row['median_s'] * 1e3:>9.2f} {row['iqr_s'] * 1e3:>9.2f} "
            f"{row['tokens_per_second']:>9.1f} {row['bytes'] / 1e6:>9.1f} {row['fraction_of_limit']:>9.0%} "
            f"{row['ratio_to_baseline']:>6.2f}x"
        )
    lines.append("cycle: draft and verification, as if every draft were accepted")
    return "\n".join(lines if report["doubt"] is None else [*lines, f"no result: {report['doubt']}"])
