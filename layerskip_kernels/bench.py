"""``layerskip bench``: the two steps against plain decoding. And the one timer, which benchmarks/ uses as well."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from statistics import median, quantiles
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from layerskip_kernels import machine
from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.generate import generate
from layerskip_kernels.kv_cache import PagedKVCache, Sequence
from layerskip_kernels.model import Model
from layerskip_kernels.reference import LAYER_WEIGHTS, MODEL_WEIGHTS
from layerskip_kernels.steps import Draft, Verdict, draft_step, prefill, verify_step
from layerskip_kernels.verify import compare

__all__ = [
    "Candidate", "Limits", "Timing", "as_text", "bench", "ceiling", "draft_bytes", "head_bytes", "interleave",
    "layer_bytes", "limit_candidates", "machine_facts", "num_copies", "prompt_tokens", "rotating", "same_bits",
    "step_candidates", "verify_bytes",
]  # fmt: skip

CONTEXT = 100  # tokens of the prompt that the steps of `layerskip bench` follow
SECONDS, MIN_ROUNDS = 10.0, 5
READ, FMA, PAIRS = (
    "memory reads",
    "fp32 matrix product",
    "bf16 matrix product",
)  # the limits, timed among the candidates
READ_SECONDS = 0.03
PEAK_SIZE = 1536
PACKAGES = ("torch", "transformers", "numpy", "layerskip_kernels")
T = TypeVar("T")


class BitsDiffer(RuntimeError):  # noqa: N818 - the name is what it says to the reader
    """What was to be timed does not give the bits of plain decoding."""


# ---- the timer ----


def _no_arguments() -> tuple[Any, ...]:
    return ()


@dataclass(frozen=True)
class Candidate:
    """Something to time: ``run(*prepare())``, then ``restore()``; only ``run`` counts.

    ``seconds`` reads the time from what ``run`` returned, where that knows it better than the clock.
    """

    run: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] = _no_arguments
    restore: Callable[[], object] = _no_arguments
    seconds: Callable[[Any], float] | None = None


@dataclass(frozen=True)
class Timing:
    """The seconds that a candidate took, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def iqr(self) -> float:
        """The distance between the quartiles; 0 for a single round."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return high - low


def interleave(
    candidates: Mapping[str, Candidate],
    min_rounds: int = MIN_ROUNDS,
    seconds: float = 0.0,
    warmup: int = 1,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, Timing]:
    """Time all candidates in each of at least ``min_rounds`` rounds, and go on until ``seconds`` have passed.

    What slows the machine for a while slows them all, so that ratios of their medians mean something. Each round
    starts one candidate later than the one before: none always follows the same other. ``warmup`` rounds come
    first and are forgotten.
    """
    names = list(candidates)
    for _ in range(warmup):
        for candidate in candidates.values():
            _time(candidate, clock)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start, rounds = clock(), 0
    while rounds < min_rounds or clock() - start < seconds:
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(_time(candidates[name], clock))
        rounds += 1
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _time(candidate: Candidate, clock: Callable[[], float]) -> float:
    arguments = candidate.prepare()
    start = clock()
    result = candidate.run(*arguments)
    elapsed = clock() - start
    candidate.restore()
    return elapsed if candidate.seconds is None else candidate.seconds(result)


def rotating(make: Callable[[], T], num_bytes: int, cache_bytes: int | None = None) -> Callable[[], T]:
    """A function that hands out what ``make`` made, copy after copy, so that operands come from memory.

    An op timed over and over on the same ``num_bytes`` of weights would find them in the cache, where a decoding
    step, which reads all layers before it returns to one, never does.
    """
    return cycle([make() for _ in range(num_copies(num_bytes, cache_bytes))]).__next__


def num_copies(num_bytes: int, cache_bytes: int | None = None) -> int:
    """How many operands of ``num_bytes`` are twice as large as the last-level caches (default: this machine's)."""
    if cache_bytes is None:
        cache_bytes = machine.last_level_cache_bytes(machine.usable_cpus()) or machine.MIN_BUFFER_BYTES // 2
    return max(1, math.ceil(2 * cache_bytes / num_bytes))


# ---- what the machine can do ----


@dataclass(frozen=True)
class Limits:
    """What bounds every step, measured in the same run."""

    read_bandwidth_gb_s: float
    fma_peak_gflop_s: float
    read_bandwidth_iqr_gb_s: float  # the bandwidth of shared machines drifts
    bf16_peak_gflop_s: float | None = None  # where products of bf16 have an instruction of their own

    @classmethod
    def of(cls, timings: Mapping[str, Timing]) -> Limits:
        """From the timings of ``limit_candidates``."""
        bandwidth = Timing(tuple(1 / seconds for seconds in timings[READ].seconds))
        fp32, bf16 = (2 * PEAK_SIZE**3 / timings[p].median / 1e9 if p in timings else None for p in (FMA, PAIRS))
        assert fp32 is not None
        return cls(bandwidth.median, fp32, bandwidth.iqr, bf16)


def limit_candidates() -> dict[str, Candidate]:
    """The limits as candidates, to be timed among the others: the bandwidth of shared machines drifts.

    ``READ``: seconds for a GB of `machine.measure_read_bandwidth`. ``FMA``: torch's fp32 product of two square
    matrices of 1536 rows, 2 * 1536**3 operations: a tuned library's figure (MKL, OpenBLAS) and so slightly below
    what the cores could do. ``PAIRS``: the same in bf16, where the CPU backend multiplies bf16 numbers in pairs, too.
    All with torch's current threads.
    """
    buffer = machine.read_buffer()
    limits = {
        READ: Candidate(lambda: machine.measure_read_bandwidth(READ_SECONDS, buffer), seconds=lambda gb_s: 1 / gb_s),
        FMA: _square_product(torch.float32),
    }
    if torch.ops.layerskip.instruction_set() == "avx512_bf16":
        limits[PAIRS] = _square_product(torch.bfloat16)
    return limits


def _square_product(dtype: torch.dtype) -> Candidate:
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Candidate(lambda: torch.mm(a, b, out=out))


def machine_facts() -> dict[str, Any]:
    """What a figure depends on beside the code. Nothing that names the machine or its owner."""
    cpus = machine.usable_cpus()
    return {
        "cpu": machine.cpu_model(),
        "cores": machine.physical_cores(cpus),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.ops.layerskip.instruction_set(),
        "last_level_cache_bytes": machine.last_level_cache_bytes(cpus),
        "load_average": round(os.getloadavg()[0], 2),  # how quiet the machine was
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---- bytes and ceilings, on paper ----


def layer_bytes(model: Model, positions: int = 0) -> int:
    """What a pass through one layer reads: its weights as they are packed, and K and V of ``positions`` positions.

    Once for all rows of the pass.
    """
    c = model.config
    weights = model.weights[len(MODEL_WEIGHTS) : len(MODEL_WEIGHTS) + len(LAYER_WEIGHTS)]
    return _bytes(weights) + model.dtype.itemsize * 2 * positions * c.num_kv_heads * c.head_dim


def head_bytes(model: Model, drafting: bool = False) -> int:
    """What the final norm and the LM head read; drafts may have a head of their own (Model.with_draft_vocab)."""
    _, norm, head, *_ = model.weights
    return _bytes([norm, model.draft_head if drafting and model.draft_head is not None else head])


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def draft_bytes(model: Model, exit_layer: int, num_drafts: int, length: int, num_sequences: int = 1) -> int:
    """Weights and KV read by draft_step after ``length`` known tokens: a pass and a head for each draft."""
    passes = sum(layer_bytes(model, num_sequences * (length + i)) for i in range(num_drafts))
    return exit_layer * passes + num_drafts * head_bytes(model, drafting=True)


def verify_bytes(model: Model, num_drafts: int, length: int) -> int:
    """Weights and KV read by verify_step: every layer and the head once, whatever the exit layer was."""
    return model.config.num_layers * layer_bytes(model, length + num_drafts) + head_bytes(model)


def ceiling(num_layers: int, exit_layer: int, num_drafts: int, acceptance: float, head: float = 0.0) -> float:
    """The speed-up over plain decoding if time were layers passed: S = L (1 + a d) / (d E + L).

    ``acceptance`` a: accepted over drafted tokens; ``head``: what the LM head costs, in layers. It is paid with
    every draft and once in a verification: S = (L + h) (1 + a d) / (d (E + h) + L + h). A batched verification
    counts as one pass.
    """
    plain = num_layers + head
    return plain * (1 + acceptance * num_drafts) / (num_drafts * (exit_layer + head) + plain)


# ---- the command ----


def bench(
    model: Model, exit_layer: int, num_speculations: int, min_rounds: int = MIN_ROUNDS, seconds: float = SECONDS
) -> dict[str, Any]:
    """Time the steps on a model, after the bits of a cycle were compared with plain decoding's.

    Gives ``machine`` (with the ``settings``), ``read_bandwidth_gb_s``, ``fma_peak_gflop_s`` and ``results``: for
    ``autoregressive`` (the baseline: verification of an empty draft, 1 token), ``draft_step`` (d tokens drafted),
    ``verify_step`` (d + 1 rows judged) and ``cycle`` (both; d + 1 tokens, as if all drafts were accepted) the
    median and the distance of the quartiles in seconds, tokens per second, the bytes of weights and KV read,
    these bytes per second over the read bandwidth, and the tokens per second over the baseline's. Raises
    BitsDiffer where they are not equal.
    """
    prompt = prompt_tokens(model, min(CONTEXT, model.config.max_positions - num_speculations - 2))
    if not same_bits(model, prompt, exit_layer, num_speculations):
        raise BitsDiffer("self-speculative decoding gave other bits than plain decoding; run `layerskip verify`")
    cache, sequence = prefilled(model, prompt, num_speculations + 1)
    steps = step_candidates(model, cache, sequence, exit_layer, num_speculations)
    timings = interleave({**steps, **limit_candidates()}, min_rounds, seconds)
    limits = Limits.of(timings)
    settings = {"model": model.name, "dtype": str(model.dtype).removeprefix("torch."), "exit_layer": exit_layer,
                "num_speculations": num_speculations, "context": len(prompt), "bits_equal": True}  # fmt: skip
    return {
        "machine": {**machine_facts(), "settings": settings},
        "read_bandwidth_gb_s": limits.read_bandwidth_gb_s,
        "fma_peak_gflop_s": limits.fma_peak_gflop_s,
        "results": _results(model, timings, limits, exit_layer, num_speculations, len(sequence.tokens)),
    }


def prompt_tokens(model: Model, count: int) -> list[int]:
    """Random tokens, always the same ones: times do not depend on which."""
    return torch.randint(model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def same_bits(
    model: Model, prompt: list[int] | str, exit_layer: int, num_speculations: int, num_cycles: int = 1
) -> bool:
    """Whether tokens, logits and KV bytes of some cycles, or more, are those of plain decoding."""
    keep: dict[str, Any] = dict(
        num_speculations=num_speculations, max_new_tokens=1 + num_cycles * (num_speculations + 1), eos_token_ids=(),
        return_logits=True, return_kv=True,
    )  # fmt: skip
    [plain] = generate(model, [prompt], GenerationConfig("autoregressive", **keep))
    [drafted] = generate(model, [prompt], GenerationConfig("self_speculative", exit_layer=exit_layer, **keep))
    return compare(plain, drafted).all_equal and drafted.drafted > 0


def prefilled(model: Model, prompt: list[int], room: int) -> tuple[PagedKVCache, Sequence]:
    """A cache with a prompt in it and room for some more positions."""
    cache = PagedKVCache.with_room_for(model, [len(prompt) + room])
    sequence = cache.add_sequence(prompt)
    cache.commit(prefill(model, cache, [sequence]))
    return cache, sequence


def step_candidates(
    model: Model, cache: PagedKVCache, sequence: Sequence, exit_layer: int, num_speculations: int
) -> dict[str, Candidate]:
    """The baseline and the two steps, each undone after it was timed, so that all stand at the same position."""

    def undo() -> None:
        cache.rollback([sequence])

    def draft() -> Draft:
        return draft_step(model, cache, [sequence], exit_layer, num_speculations)

    def verify(draft: Draft) -> Verdict:
        return verify_step(model, cache, draft)

    return {
        "autoregressive": Candidate(lambda: verify(Draft.none([sequence])), restore=undo),
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


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    settings = report["machine"]["settings"]
    lines = [
        f"{settings['model']}: {settings['num_speculations']} drafts with the first {settings['exit_layer']} layers, "
        f"after {settings['context']} tokens; bits equal to plain decoding's",
        f"limits: {report['read_bandwidth_gb_s']:.1f} GB/s read, {report['fma_peak_gflop_s']:.0f} GFLOP/s in fp32",
        f"{'':<16} {'ms':>9} {'(IQR)':>9} {'tokens/s':>9} {'MB read':>9} {'of limit':>9} {'speed':>7}",
    ]
    for row in report["results"]:
        lines.append(
            f"{row['name']:<16} {row['median_s'] * 1e3:>9.2f} {row['iqr_s'] * 1e3:>9.2f} "
            f"{row['tokens_per_second']:>9.1f} {row['bytes'] / 1e6:>9.1f} {row['fraction_of_limit']:>9.0%} "
            f"{row['ratio_to_baseline']:>6.2f}x"
        )
    return "\n".join([*lines, "cycle: draft and verification, as if every draft were accepted"])
