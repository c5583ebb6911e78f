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
    config = config or GenerationConfig()
    if config.strategy == "self_speculative":
        config = replace(config, exit_layer=config.resolve_exit_layer(model.config.num_layers))
    token_ids = [_encode(model, prompt) for prompt in prompts]
    limits = [min(len(ids) + config.max_new_tokens, model.config.max_positions + 1) for ids in token_ids]
    cache = cache or PagedKVCache.with_room_for(model, limits)
    with _added(cache, token_ids) as sequences:
        texts = [
            _Text(i, s, limit, Generation(len(s.tokens)))
            for i, (s, limit) in enumerate(zip(sequences, limits, strict=True))
        ]
        with _clock(texts, "prefill_seconds"):
            verdict = prefill(model, cache, sequences)
            cache.commit(verdict)
        _collect(model, cache, texts, verdict, config, on_tokens)
        while active := [text for text in texts if text.generation.finish_reason is None]:
            with _clock(active, "draft_seconds"):
                draft = _draft(model, cache, active, config)
            with _clock(active, "verify_seconds"):
                verdict = verify_step(model, cache, draft)
                cache.commit(verdict)
            _collect(model, cache, active, verdict, config, on_tokens)
            for b, text in enumerate(active):
                text.generation.cycles += 1
                text.generation.drafted += int(draft.num_tokens[b])
                text.generation.accepted += int(verdict.num_accepted[b])
        return [text.generation for text in texts]


@dataclass
class _Text:
    """A text on its way: it ends at the latest with ``limit`` tokens, prompt included."""

    index: int
    sequence: Sequence
    limit: int
    generation: Generation
    logits: list[Tensor] = field(default_factory=list)


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


def _draft(model: Model, cache: PagedKVCache, texts: list[_Text], config: GenerationConfig) -> Draft:
    """As many drafts as asked for, but none that could not become an output token."""
    sequences = [text.sequence for text in texts]
    counts = [min(config.num_speculations, text.limit - len(text.sequence.tokens) - 1) for text in texts]
    if config.strategy == "autoregressive" or not any(counts):
        return Draft.none(sequences)
    assert config.exit_layer is not None  # resolved by generate
    return draft_step(model, cache, sequences, config.exit_layer, counts)


def _collect(
    model: Model,
    cache: PagedKVCache,
    texts: list[_Text],
    verdict: Verdict,
    config: GenerationConfig,
    on_tokens: Callable[[int, list[int]], None] | None,
) -> None:
    """Hand a verdict's tokens out, up to the end of each text."""
    stop_ids = model.config.eos_token_ids if config.eos_token_ids is None else config.eos_token_ids
    for b, text in enumerate(texts):
        generation, tokens = text.generation, verdict.new_tokens(b)
        end = next((n for n, token in enumerate(tokens, 1) if token in stop_ids), None)
        tokens = tokens[:end]
        generation.token_ids += tokens
        if config.return_logits:
            text.logits.append(verdict.new_logits(b)[: len(tokens)].clone())
        if on_tokens is not None:
            on_tokens(text.index, tokens)
        if end is None and len(text.sequence.tokens) < text.limit:
            continue
        generation.finish_reason = "length" if end is None else "eos"
        # Tokens accepted beyond an end of text are cut: the cache ends where plain decoding would end.
        cache.truncate(text.sequence, generation.prompt_length + len(generation.token_ids) - 1)
        if config.return_logits:
            generation.logits = torch.cat(text.logits)
        if config.return_kv:
            generation.kv = cache.export(text.sequence)
