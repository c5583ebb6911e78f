"""The loop: prefill -> draft_step -> verify_step -> commit -> tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as ListLike
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import Tensor

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.kv_cache import PagedKVCache, Sequence
from layerskip_kernels.model import Model
from layerskip_kernels.sampling import (
    Sampler,
    StopStrings,
    TokenLogprobs,
    end_token_ids,
    make_sampler,
    resolve_seed,
    top_logprobs,
)
from layerskip_kernels.steps import Draft, Verdict, draft_step, prefill, verify_step
from layerskip_kernels.tokenizer import TextStream

__all__ = ["Generation", "generate"]


@dataclass
class Generation:
    """What one prompt became, and what it cost.

    ``token_ids`` ends with the token that ended it; ``text`` (where the model has a tokenizer) ends before a stop
    string. ``finish_reason``: "eos", "stop" (a stop token or string), "length" or "cancelled". ``sample``: which of
    the prompt's texts this is; ``seed``: what it was drawn with, if it was drawn. Seconds are wall time by stage; a
    batch shares them, so each of its generations reports the whole. ``logits`` fp32 [tokens, V], ``logprobs``, one
    for each token, and ``kv``, k and v of every position but the last token's ([L, positions, G, K] each), are kept
    when the config asks for them.
    """

    prompt_length: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    text: str | None = None
    sample: int = 0
    seed: int | None = None
    cycles: int = 0
    drafted: int = 0
    accepted: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    logits: Tensor | None = None
    logprobs: list[TokenLogprobs] | None = None
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
    on_draft: Callable[[int, list[int], int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[Generation]:
    """Continue each prompt (text or token ids); the strategy changes the speed, never a bit.

    (The one exception is ``acceptance="rejection"``, which keeps only the distribution.) Returns num_samples
    generations for each prompt, those of one prompt side by side. ``on_tokens(i, tokens)`` is called with the
    tokens generation ``i`` gained, as they come, and before it ``on_draft(i, drafts, num_accepted)`` where some
    were drafted. ``cancelled()`` is asked between cycles; once it is true, what there is so far is returned.
    ``cache``: where to put the sequences (default: a new one of just the right size); it is left without them.
    Raises ValueError for bad prompts and settings, CacheFull when a given cache is too small, RuntimeError when the
    logits leave nothing to choose.
    """
    config = _resolved(model, config or GenerationConfig())
    prompt_ids = [_encode(model, prompt) for prompt in prompts]
    token_ids = [ids for ids in prompt_ids for _ in range(config.num_samples)]
    limits = [min(len(ids) + config.max_new_tokens, model.config.max_positions + 1) for ids in token_ids]
    cache = cache or PagedKVCache.with_room_for(model, limits)
    run = _Run(model, cache, config, on_tokens, on_draft)
    with _added(cache, token_ids) as sequences:
        texts = [
            _Text.new(model, config, i, sequence, limit)
            for i, (sequence, limit) in enumerate(zip(sequences, limits, strict=True))
        ]
        with _clock(texts, "prefill_seconds"):
            verdict = prefill(model, cache, sequences, [text.sampler for text in texts])
            cache.commit(verdict)
        run.collect(texts, verdict)
        while active := [text for text in texts if text.generation.finish_reason is None]:
            if cancelled is not None and cancelled():
                for text in active:
                    run.finish(text, "cancelled")
                break
            with _clock(active, "draft_seconds"):
                draft = run.draft(active)
            with _clock(active, "verify_seconds"):
                verdict = verify_step(model, cache, draft, [text.sampler for text in active])
                cache.commit(verdict)
            for b, text in enumerate(active):
                text.generation.cycles += 1
                text.generation.drafted += int(draft.num_tokens[b])
                text.generation.accepted += int(verdict.num_accepted[b])
            run.collect(active, verdict)
        return [text.generation for text in texts]


def _resolved(model: Model, config: GenerationConfig) -> GenerationConfig:
    """The config with an exit layer and, where tokens are drawn, a seed; raises ValueError for what can't be."""
    if config.stop and model.tokenizer is None:
        raise ValueError("this model came without a tokenizer, so stop strings can't be found; use stop_token_ids")
    if config.strategy == "self_speculative":
        config = replace(config, exit_layer=config.resolve_exit_layer(model.config.num_layers))
    return resolve_seed(config) if config.temperature > 0 else config


@dataclass
class _Text:
    """A text on its way: it ends at the latest with ``limit`` tokens, prompt included."""

    index: int
    sequence: Sequence
    limit: int
    generation: Generation
    sampler: Sampler | None
    stream: TextStream | None  # only where stop strings are looked for
    stops: StopStrings
    shown: list[str] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @classmethod
    def new(cls, model: Model, config: GenerationConfig, index: int, sequence: Sequence, limit: int) -> _Text:
        sample = index % config.num_samples
        generation = Generation(len(sequence.tokens), sample=sample, seed=config.seed)
        sampler = make_sampler(model, config, generation.prompt_length, sample)
        stream = TextStream(model.tokenizer) if config.stop and model.tokenizer is not None else None
        return cls(index, sequence, limit, generation, sampler, stream, StopStrings(config.stop))

    def stop_found(self, token: int, min_new_tokens: int) -> bool:
        """Whether a stop string ends with this token, the next of the text."""
        if self.stream is None:
            return False
        may_end = len(self.generation.token_ids) >= min_new_tokens
        self.shown.append(self.stops.push(self.stream.push([token]), may_end))
        return self.stops.found is not None


def _encode(model: Model, prompt: ListLike[int] | str) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    if model.tokenizer is None:
        raise ValueError("this model came without a tokenizer; give the prompt as token ids")
    return model.tokenizer.encode(prompt)


@contextmanager
def _added(cache: PagedKVCache, prompts: list[list[int]]) -> Iterator[list[Sequence]]:
    """Sequences of the prompts, in the cache for as long as the block runs."""
    sequences: list[Sequence] = []
    try:
        for prompt in prompts:
            sequences.append(cache.add_sequence(prompt))
        yield sequences
    finally:
        for sequence in sequences:
            cache.free(sequence)


@contextmanager
def _clock(texts: list[_Text], stage: str) -> Iterator[None]:
    start = perf_counter()
    yield
    for text in texts:
        setattr(text.generation, stage, getattr(text.generation, stage) + perf_counter() - start)


@dataclass(frozen=True)
class _Run:
    """What stays the same from the first cycle to the last."""

    model: Model
    cache: PagedKVCache
    config: GenerationConfig
    on_tokens: Callable[[int, list[int]], None] | None
    on_draft: Callable[[int, list[int], int], None] | None

    def draft(self, texts: list[_Text]) -> Draft:
        """As many drafts as asked for, but none that could not become an output token."""
        config, sequences = self.config, [text.sequence for text in texts]
        counts = [min(config.num_speculations, text.limit - len(text.sequence.tokens) - 1) for text in texts]
        if config.strategy == "autoregressive" or not any(counts):
            return Draft.none(sequences)
        assert config.exit_layer is not None  # resolved by generate
        samplers = [text.sampler for text in texts]
        return draft_step(self.model, self.cache, sequences, config.exit_layer, counts, samplers)

    def collect(self, texts: list[_Text], verdict: Verdict) -> None:
        """Hand a verdict's tokens out, up to the end of each text."""
        for b, text in enumerate(texts):
            tokens, reason = self._take(text, verdict.new_tokens(b))
            logits = verdict.new_logits(b)[: len(tokens)]
            if self.config.return_logits:
                text.logits.append(logits.clone())
            if self.config.logprobs is not None:
                text.generation.logprobs = text.generation.logprobs or []
                text.generation.logprobs += top_logprobs(self.model.ops, logits, tokens, self.config.logprobs)
            drafts = verdict.draft.of(b)
            if self.on_draft is not None and drafts:
                self.on_draft(text.index, drafts, int(verdict.num_accepted[b]))
            if self.on_tokens is not None:
                self.on_tokens(text.index, tokens)
            if reason is not None:
                self.finish(text, reason)

    def _take(self, text: _Text, tokens: list[int]) -> tuple[list[int], str | None]:
        """Append tokens up to the one that ends the text, and say why it ended."""
        stop_ids, end_ids = self.config.stop_token_ids, end_token_ids(self.model, self.config)
        for n, token in enumerate(tokens, 1):
            text.generation.token_ids.append(token)
            if text.stop_found(token, self.config.min_new_tokens) or token in stop_ids:
                return tokens[:n], "stop"
            if token in end_ids:
                return tokens[:n], "eos"
        return tokens, "length" if len(text.sequence.tokens) >= text.limit else None

    def finish(self, text: _Text, reason: str) -> None:
        """The text is over, after its last token in ``generation.token_ids``."""
        generation = text.generation
        generation.finish_reason = reason
        # Tokens accepted beyond an end of text are cut: the cache ends where plain decoding would end.
        self.cache.truncate(text.sequence, generation.prompt_length + len(generation.token_ids) - 1)
        if text.stream is not None:
            generation.text = "".join([*text.shown, text.stops.push(text.stream.finish()), text.stops.finish()])
        elif self.model.tokenizer is not None:
            generation.text = self.model.tokenizer.decode(generation.token_ids)
        if self.config.return_logits:
            generation.logits = torch.cat(text.logits)
        if self.config.return_kv:
            generation.kv = self.cache.export(text.sequence)
