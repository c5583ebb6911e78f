"""``layerskip verify``: does self-speculative decoding give the bits of plain decoding?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.decoding.kv_cache import PagedKVCache
from layerskip_kernels.engine.engine import Engine
from layerskip_kernels.engine.generation import Generation, generate
from layerskip_kernels.engine.request import encode
from layerskip_kernels.model.model import Model

__all__ = ["BitsDiffer", "Comparison", "LayerReport", "compare", "mixed_batch", "same_bytes", "summary", "verify"]


class BitsDiffer(RuntimeError):  # noqa: N818 - the name is what it says to the reader
    """Self-speculative decoding gave other bits than plain decoding."""


@dataclass(frozen=True)
class Comparison:
    """What two generations of one prompt have in common, and how much was looked at."""

    tokens: int
    logit_bytes: int
    kv_bytes: int
    tokens_equal: bool
    logits_equal: bool
    kv_equal: bool

    @property
    def all_equal(self) -> bool:
        return self.tokens_equal and self.logits_equal and self.kv_equal


@dataclass
class LayerReport:
    """The comparisons at one exit layer, by the prompt's name, and what drafting gained there."""

    exit_layer: int
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0

    @property
    def all_equal(self) -> bool:
        return all(comparison.all_equal for comparison in self.comparisons.values())

    def __str__(self) -> str:
        compared = list(self.comparisons.values())
        looked_at = (
            f"exit layer {self.exit_layer}: {len(compared)} prompts, {sum(c.tokens for c in compared)} tokens, "
            f"{sum(c.logit_bytes for c in compared) / 1e6:.1f} MB of logits, "
            f"{sum(c.kv_bytes for c in compared) / 1e6:.1f} MB of keys and values "
            f"({self.accepted} of {self.drafted} drafts accepted): "
        )
        differing = [
            f"{what} differ in {', '.join(names)}"
            for what, names in (
                ("tokens", self._where("tokens_equal")),
                ("logits", self._where("logits_equal")),
                ("KV bytes", self._where("kv_equal")),
            )
            if names
        ]
        return looked_at + ("; ".join(differing).upper() if differing else "all equal, bit for bit")

    def _where(self, equal: str) -> list[str]:
        return [name for name, comparison in self.comparisons.items() if not getattr(comparison, equal)]


def verify(
    model: Model,
    prompts: Sequence[tuple[str, str]],
    config: GenerationConfig,
    exit_layers: Sequence[int],
    batch: int | None = None,
) -> list[LayerReport]:
    """Compare both strategies on prompts (name, text) at each exit layer; progress goes to stderr.

    Plain decoding takes one prompt at a time. With a ``batch``, that many prompts share an engine in the other runs,
    and unlike ones: see mixed_batch. Raises ValueError, before anything runs, for an exit layer that the model does
    not have.
    """
    config = replace(config, return_logits=True, return_kv=True)
    plain_config = config.plain()
    configs = [replace(config, strategy="self_speculative", exit_layer=exit_layer) for exit_layer in exit_layers]
    reports = [LayerReport(model.draft_settings(c)[0]) for c in configs]
    with tqdm(total=len(prompts) * (1 + len(configs)), desc="verify", unit="generation") as progress:
        for start in range(0, len(prompts), batch or 1):
            names, texts = zip(*prompts[start : start + (batch or 1)], strict=True)
            plain = []
            for text in texts:
                plain += generate(model, [text], plain_config)
                progress.update()
            for report, config_of_layer in zip(reports, configs, strict=True):
                run = generate if batch is None else mixed_batch
                others = run(model, texts, config_of_layer)
                progress.update(len(texts))
                for name, alone, other in zip(names, plain, others, strict=True):
                    report.comparisons[name] = compare(alone, other)
                    report.drafted += other.drafted
                    report.accepted += other.accepted
    return reports


MIXED_CHUNK = 48  # rows of prompts in a step: few, so that some requests decode while others are in their prompts


def mixed_batch(model: Model, prompts: Sequence[str], config: GenerationConfig) -> list[Generation]:
    """All prompts through one engine at once: in turn drafting as the config says, plainly, and twice as far.

    Raises a request's error, if there is one.
    """
    _, num_drafts = model.draft_settings(config)
    configs = (
        config,
        config.plain(),
        replace(config, num_speculations=2 * num_drafts),
    )
    lengths = [len(encode(model, prompt)) + config.max_new_tokens for prompt in prompts]
    cache = PagedKVCache.with_room_for(model, lengths, prefix_sharing=True)
    engine = Engine(model, cache, max_batch=len(prompts), chunk_size=MIXED_CHUNK, drafts="fixed")
    ids = [engine.add_request(prompt, configs[i % len(configs)]) for i, prompt in enumerate(prompts)]
    generations: dict[int, Generation] = {}
    while engine.num_unfinished:
        for output in engine.step():
            if output.error is not None:
                raise output.error
            if output.generation is not None:
                generations[output.request_id] = output.generation
    return [generations[request_id] for request_id in ids]


def summary(reports: Sequence[LayerReport]) -> dict[str, Any]:
    """The reports in numbers, for programs."""
    compared = [comparison for report in reports for comparison in report.comparisons.values()]
    return {
        "prompts": len(reports[0].comparisons),
        "tokens_compared": sum(c.tokens for c in compared),
        "tokens_equal": all(c.tokens_equal for c in compared),
        "logits_equal": all(c.logits_equal for c in compared),
        "kv_equal": all(c.kv_equal for c in compared),
        "exit_layers": [report.exit_layer for report in reports],
        "drafted": sum(report.drafted for report in reports),
        "accepted": sum(report.accepted for report in reports),
    }


def compare(plain: Generation, speculative: Generation) -> Comparison:
    """Compare tokens, logits and KV bytes of two generations, which must have kept them all.

    Raises ValueError for a generation made without ``return_logits`` and ``return_kv``: nothing compared is not
    the same as nothing different.
    """
    logits, kv = _kept(plain)
    other_logits, other_kv = _kept(speculative)
    return Comparison(
        tokens=len(plain.token_ids),
        logit_bytes=logits.nbytes,
        kv_bytes=sum(tensor.nbytes for tensor in kv),
        tokens_equal=plain.token_ids == speculative.token_ids,
        logits_equal=same_bytes(logits, other_logits),
        kv_equal=all(same_bytes(a, b) for a, b in zip(kv, other_kv, strict=True)),
    )


def _kept(generation: Generation) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    if generation.logits is None or generation.kv is None:
        raise ValueError("to compare generations, make them with return_logits=True and return_kv=True")
    return generation.logits, generation.kv


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits: 0.0 is not -0.0, and a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
