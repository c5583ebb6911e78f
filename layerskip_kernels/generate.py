"""The loop: prefill -> draft_step -> verify_step -> commit -> tokens."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.kv_cache import PagedKVCache, Sequence
from layerskip_kernels.model import Model
from layerskip_kernels.steps import Draft, Verdict, draft_step, prefill, verify_step

__all__ = ["Generation", "generate"]


@dataclass
class Generation:
    """What one prompt became, and what it cost.

    Seconds are wall time by stage; a batch shares them, so each of its generations reports the whole. ``logits``
    fp32 [tokens, V], and ``kv``, k and v of every position but the last token's ([L, positions, G, K] each), are
    kept when the config asks for them.
    """

    prompt_length: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cycles: int = 0
    drafted: int = 0
    accepted: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    logits: Tensor | None = None
    kv: tuple[Tensor, Tensor] | None = None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_cycle(self) -> float | None:
        """Tokens gained per verification after the prompt; 1 in plain decoding."""
        return (len(self.token_ids) - 1) / self.cycles if self.cycles else None

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed: tokens after the first one (which prefill gives) over the seconds they took."""
        seconds = self.draft_seconds + self.verify_seconds
        return (len(self.token_ids) - 1) / seconds if seconds else None


@torch.no_grad()
def generate(
    model: Model,
    prompts: ListLike[ListLike[int] | str],
    config: GenerationConfig | None = None,
    *,
    cache: PagedKVCache | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> list[Generation]:
    """Continue each prompt (text or token ids) greedily; the strategy changes the speed, never a bit.

    ``on_tokens(i, tokens)`` is called with the tokens prompt ``i`` gained, as they come. ``cache``: where to put
    the sequences (default: a new one of just the right size); it is left without them. Raises ValueError for bad
    prompts and settings, CacheFull when a given cache is too small.
    """
    run = _Run(model, prompts, config or GenerationConfig(), cache, on_tokens)
    try:
        run.advance("prefill_seconds", lambda active: prefill(model, run.cache, active))
        while active := run.active():
            draft = run.timed("draft_seconds", lambda active=active: run.draft(active))
            run.advance("verify_seconds", lambda _, draft=draft: verify_step(model, run.cache, draft))
        return run.generations
    finally:
        run.close()


class _Run:
    """The state of one call of generate."""

    def __init__(
        self,
        model: Model,
        prompts: ListLike[ListLike[int] | str],
        config: GenerationConfig,
        cache: PagedKVCache | None,
        on_tokens: Callable[[int, list[int]], None] | None,
    ) -> None:
        token_ids = [_encode(model, prompt) for prompt in prompts]
        self.model, self.config, self.on_tokens = model, config, on_tokens
        self.speculative = config.strategy == "self_speculative"
        self.exit_layer = config.resolve_exit_layer(model.config.num_layers) if self.speculative else None
        self.stop_ids = model.config.eos_token_ids if config.eos_token_ids is None else config.eos_token_ids
        self.limits = [_length_limit(model, ids, config.max_new_tokens) for ids in token_ids]
        self.cache = cache or PagedKVCache.with_room_for(model, self.limits)
        self.generations = [Generation(len(ids)) for ids in token_ids]
        self.kept_logits: list[list[Tensor]] = [[] for _ in token_ids]
        self.sequences: list[Sequence] = []
        try:
            self.sequences += (self.cache.add_sequence(ids) for ids in token_ids)
        except ValueError:
            self.close()
            raise

    def active(self) -> list[Sequence]:
        return [s for s, g in zip(self.sequences, self.generations, strict=True) if g.finish_reason is None]

    def draft(self, active: list[Sequence]) -> Draft:
        """As many drafts as asked for, but none that could not become an output token."""
        if not self.speculative:
            return Draft.none(active)
        limits = [self.limits[self.sequences.index(s)] for s in active]
        counts = [
            min(self.config.num_speculations, limit - len(s.tokens) - 1)
            for s, limit in zip(active, limits, strict=True)
        ]
        if not any(counts):
            return Draft.none(active)
        assert self.exit_layer is not None
        return draft_step(self.model, self.cache, active, self.exit_layer, counts)

    def timed(self, stage: str, work: Callable[[], Draft]) -> Draft:
        return self._clocked(stage, self.active(), work)

    def advance(self, stage: str, work: Callable[[list[Sequence]], Verdict]) -> None:
        """Run a stage that ends in a verdict, commit it and hand its tokens out."""
        active = self.active()
        verdict = self._clocked(stage, active, lambda: self._commit(work(active)))
        for b, sequence in enumerate(active):
            i = self.sequences.index(sequence)
            self._collect(i, verdict, b, is_cycle=stage != "prefill_seconds")

    def close(self) -> None:
        for sequence in self.sequences:
            self.cache.free(sequence)

    def _commit(self, verdict: Verdict) -> Verdict:
        self.cache.commit(verdict)
        return verdict

    def _clocked(self, stage, active, work):  # type: ignore[no-untyped-def]
        start = perf_counter()
        result = work()
        seconds = perf_counter() - start
        for sequence in active:
            generation = self.generations[self.sequences.index(sequence)]
            setattr(generation, stage, getattr(generation, stage) + seconds)
        return result

    def _collect(self, i: int, verdict: Verdict, b: int, is_cycle: bool) -> None:
        generation, sequence = self.generations[i], self.sequences[i]
        tokens = verdict.new_tokens(b)
        stop = next((n for n, token in enumerate(tokens) if token in self.stop_ids), None)
        if stop is not None:
            tokens, generation.finish_reason = tokens[: stop + 1], "eos"
        elif len(sequence.tokens) >= self.limits[i]:
            generation.finish_reason = "length"
        generation.token_ids += tokens
        if is_cycle:
            generation.cycles += 1
            generation.drafted += int(verdict.draft.num_tokens[b])
            generation.accepted += int(verdict.num_accepted[b])
        if self.config.return_logits:
            self.kept_logits[i].append(verdict.new_logits(b)[: len(tokens)].clone())
        if self.on_tokens is not None:
            self.on_tokens(i, tokens)
        if generation.finish_reason is not None:
            self._finish(i)

    def _finish(self, i: int) -> None:
        """The cache ends where plain decoding would: accepted tokens beyond the end of text are cut."""
        generation, sequence = self.generations[i], self.sequences[i]
        self.cache.truncate(sequence, generation.prompt_length + len(generation.token_ids) - 1)
        if self.config.return_logits:
            generation.logits = torch.cat(self.kept_logits[i])
        if self.config.return_kv:
            generation.kv = self.cache.export(sequence)


def _encode(model: Model, prompt: ListLike[int] | str) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    if model.tokenizer is None:
        raise ValueError("this model came without a tokenizer; give the prompt as token ids")
    return model.tokenizer.encode(prompt)


def _length_limit(model: Model, prompt: list[int], max_new_tokens: int) -> int:
    """Where a text ends at the latest: prompt and output. The last token needs no position of its own."""
    return min(len(prompt) + max_new_tokens, model.config.max_positions + 1)
