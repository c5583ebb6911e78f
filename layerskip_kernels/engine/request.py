"""One request: a prompt, the text that grows from it, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from layerskip_kernels.config import MOST_SPECULATIONS, GenerationConfig
from layerskip_kernels.decoding.early_exit import early_exit_salt
from layerskip_kernels.decoding.sampling import (
    Sampler,
    TokenLogprobs,
    end_token_ids,
    make_sampler,
    resolve_seed,
    stop_token_ids,
    top_logprobs,
)
from layerskip_kernels.decoding.stop_strings import StopStrings
from layerskip_kernels.decoding.swap import SwappedKV
from layerskip_kernels.decoding.types import CachedSequence, Verdict
from layerskip_kernels.engine.acceptance import DraftHistory
from layerskip_kernels.engine.drafts import DraftRequest
from layerskip_kernels.errors import shown
from layerskip_kernels.model.model import Model
from layerskip_kernels.model.text_stream import TextStream
from layerskip_kernels.model.tokenizer import Tokenizer

__all__ = ["Generation", "Output", "Prompt", "Request", "check_length", "encode", "is_conversation"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # a text, token ids, or the messages of a conversation

SHORT_TOKEN = 4  # characters: a text of that many for each position may well fit, so the vocabulary is not searched


@dataclass
class Generation:
    """The text generated from one prompt, and what it cost.

    ``token_ids`` ends with the token that ended it; ``text`` (where the model has a tokenizer) ends before a stop
    string; special tokens are part of it only if the config asks for them. ``finish_reason``: "eos", "stop" (a stop
    token or string), "length", "cancelled" or "error". ``sample``: which of the prompt's texts this is; ``seed``: what
    it was drawn with, if it was drawn. ``cached_tokens``: of the prompt, found in the cache and not computed again.
    Seconds are wall time by stage; a batch shares them, so each of its generations reports the whole. ``logits`` fp32
    [tokens, V], ``logprobs``, one for each token, and ``kv``, k and v of every position but the last token's ([layers,
    positions, G, K] each; an early exit has its own layers alone), are kept when the config asks for them.
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
    cached_tokens: int = 0
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


@dataclass(frozen=True)
class Output:
    """What a request gained in one step: tokens and text, and at its end how it ended and all of it.

    ``text``: what can be shown of it now (where the model has a tokenizer); all outputs' texts together are
    ``generation.text``, so they never show part of a stop string. ``drafts``: the tokens drafted before, of which the
    first ``num_accepted`` were right. ``finish_reason``: as in Generation, "error" with the ``error``; None while the
    request is running.
    """

    request_id: int
    tokens: Sequence[int] = ()
    drafts: Sequence[int] = ()
    num_accepted: int = 0
    logprobs: Sequence[TokenLogprobs] = ()
    finish_reason: str | None = None
    generation: Generation | None = None
    error: Exception | None = None
    text: str = ""


@dataclass(eq=False)
class Request:
    """A prompt on its way to a text that ends at the latest with ``limit`` tokens, prompt included.

    Its states: 1. waiting, without a sequence in the cache; 2. running, its prompt passing through in chunks;
    3. running, gaining tokens; 4. finished. A preempted request goes back from 2 or 3 to 1 with all it has gained.
    """

    id: int
    model: Model
    config: GenerationConfig
    known: list[int]  # while it waits: its prompt, and after a preemption what was generated as well
    limit: int
    depth: int  # layers that choose its tokens: all, or those of an early exit
    exits: tuple[int, ...]  # the exit layers it may draft with, the first until more is known; none: it does not draft
    max_speculations: int  # drafted before each verification, at most
    salt: bytes | None
    sampler: Sampler | None
    generation: Generation
    leader: Request | None = None  # another text of the same prompt, whose pages it can share
    sequence: CachedSequence | None = None  # in the cache, while it runs
    swapped: SwappedKV | Path | None = None  # K and V of a preempted request
    history: DraftHistory = field(default_factory=DraftHistory)  # of its drafts

    def __post_init__(self) -> None:
        self._logits: list[Tensor] = []
        self._text = GeneratedText(self.model, self.config)
        self._num_shown = 0  # tokens that outputs hold

    @classmethod
    def samples(cls, model: Model, config: GenerationConfig, prompt: Prompt, salt: bytes | str | None) -> list[Request]:
        """One request for each of the prompt's num_samples texts; the engine gives them ids.

        Raises ValueError for what the config asks for that the model does not have, TypeError for a bad salt.
        """
        if salt is not None and not isinstance(salt, (bytes, str)):
            raise TypeError(f"salt must be bytes, text or None, got {salt!r:.50} ({type(salt).__name__})")
        salt = salt.encode() if isinstance(salt, str) else salt
        if config.temperature > 0:
            config = resolve_seed(config)
        num_layers = model.config.num_layers
        exit_layer, max_speculations = model.draft_settings(config)
        depth, exits = num_layers, model.draft_exits(config)
        if config.strategy == "early_exit":
            depth = exit_layer
            salt = early_exit_salt(depth, salt)
        tokens = encode(model, prompt)
        limit = min(len(tokens) + config.max_new_tokens, model.config.max_positions + 1)
        requests: list[Request] = []
        for sample in range(config.num_samples):
            sampler = make_sampler(model, config, len(tokens), sample)
            generation = Generation(len(tokens), sample=sample, seed=config.seed)
            leader = requests[0] if requests else None
            fixed = model, config, tokens, limit, depth, exits, max_speculations, salt
            requests.append(cls(-1, *fixed, sampler, generation, leader))
        return requests

    @property
    def prompt_length(self) -> int:
        return self.generation.prompt_length

    @property
    def tokens(self) -> list[int]:
        """Everything known: the prompt and what was generated."""
        return self.known if self.sequence is None else self.sequence.tokens

    @property
    def max_drafts(self) -> int:
        """How many tokens it may draft now: none that could not become one of its own."""
        return self._at_most(self.max_speculations)

    @property
    def leaves_drafting_open(self) -> bool:
        """Whether something about drafting is chosen on the way."""
        return self.model.leaves_drafting_open(self.config)

    @cached_property
    def runs(self) -> bool:
        """Whether it can pass several cycles in one call: greedy, with nothing to keep or to look for after each."""
        c = self.config
        return self.sampler is None and not c.stop_strings and not c.return_logits and c.logprobs is None

    @cached_property
    def ends(self) -> set[int]:
        """The tokens that end its text."""
        return end_token_ids(self.model, self.config) | stop_token_ids(self.model, self.config)

    @property
    def num_left(self) -> int:
        """How many tokens it may gain."""
        return self.limit - len(self.tokens)

    @property
    def draft_request(self) -> DraftRequest:
        """What it may draft where that is chosen by what it costs."""
        is_open = self.leaves_drafting_open and not isinstance(self.config.num_speculations, int)
        most = MOST_SPECULATIONS if is_open else self.max_speculations
        stops = self.model.ops.drafts_adapt
        drawn = self.sampler is not None and self.sampler.draws
        return DraftRequest(self.exits or (1,), most, self._at_most(most), self.history, stops, drawn)

    def _at_most(self, drafts: int) -> int:
        return max(0, min(drafts, self.num_left - 1))

    def accept(self, verdict: Verdict, b: int) -> str | None:
        """Append what sequence ``b`` of a verdict gained, up to the text's end. Returns why it ended, or None."""
        tokens, reason = self._until_end(verdict.new_tokens(b))
        if not self.config.return_logits and self.config.logprobs is None:
            return reason
        logits = verdict.new_logits(b)[: len(tokens)]
        if self.config.return_logits:
            self._logits.append(logits.to("cpu", copy=True))
        if self.config.logprobs is not None:
            logprobs = top_logprobs(self.model.ops, logits, tokens, self.config.logprobs)
            self.generation.logprobs = [*(self.generation.logprobs or ()), *logprobs]
        return reason

    def output(self, drafts: Sequence[int] = (), num_accepted: int = 0) -> Output:
        """What no output holds yet."""
        tokens = self.generation.token_ids[self._num_shown :]
        logprobs = (self.generation.logprobs or [])[self._num_shown :]
        self._num_shown += len(tokens)
        return Output(self.id, tokens, drafts, num_accepted, logprobs, text=self._text.take_new())

    def close(self) -> None:
        """Complete the text, and put the logits of all tokens together if they were to be kept."""
        self._text.finish()
        self.generation.text = self._text.shown
        if self._logits:
            self.generation.logits = torch.cat(self._logits)

    def end(self, reason: str, error: Exception | None, last: Output) -> Output:
        """The last output: ``last``, with what closing added, the reason and the generation."""
        if reason in ("eos", "length") and self._text.stopped:  # by characters that were complete at the end only
            reason = "stop"
        self.generation.finish_reason = reason
        text = last.text + self._text.take_new()
        return replace(last, text=text, finish_reason=reason, generation=self.generation, error=error)

    def _until_end(self, tokens: list[int]) -> tuple[list[int], str | None]:
        """Append tokens to the text up to the one that ends it, and say why it ended."""
        end_ids, stop_ids = end_token_ids(self.model, self.config), stop_token_ids(self.model, self.config)
        for n, token in enumerate(tokens, 1):
            self.generation.token_ids.append(token)
            self._text.push(token, may_end=len(self.generation.token_ids) >= self.config.min_new_tokens)
            if self._text.stopped or token in stop_ids:
                return tokens[:n], "stop"
            if token in end_ids:
                return tokens[:n], "eos"
        # The cache may hold tokens of later cycles already.
        return tokens, "length" if self.prompt_length + len(self.generation.token_ids) >= self.limit else None


class GeneratedText:
    """The text of a request's tokens as it grows, up to a stop string; nothing where the model has no tokenizer."""

    def __init__(self, model: Model, config: GenerationConfig) -> None:
        self._tokenizer = model.tokenizer
        self._stops = StopStrings(config.stop_strings)
        self._pieces: list[str] = []
        self._num_taken = 0
        self._stream = None
        if model.tokenizer is not None:
            self._stream = TextStream(model.tokenizer, skip_special_tokens=config.skip_special_tokens)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.found is not None

    @property
    def shown(self) -> str | None:
        """All text that may be shown so far; None without a tokenizer."""
        return None if self._stream is None else "".join(self._pieces)

    def push(self, token: int, may_end: bool) -> None:
        """Append a token; ``may_end``: whether a stop string that ends with it ends the text."""
        if self._stream is not None:
            self._pieces.append(self._stops.push(self._stream.push([token]), may_end))

    def finish(self) -> None:
        """Show what was held back, since no token follows."""
        if self._stream is not None:
            self._pieces += [self._stops.push(self._stream.finish()), self._stops.finish()]

    def take_new(self) -> str:
        """The text since the last call."""
        new = self._pieces[self._num_taken :]
        self._num_taken += len(new)
        return "".join(new)


def encode(model: Model, prompt: Prompt) -> list[int]:
    """The token ids of a prompt.

    Raises ValueError for a text when the model has no tokenizer and for one that is too long for the model, for
    messages that its chat template refuses or when it has none, TypeError for what is no prompt.
    """
    if isinstance(prompt, str):
        check_length(model, prompt)
        return _tokenizer(model).encode(prompt)
    if is_conversation(prompt):
        tokenizer = _tokenizer(model)
        text = tokenizer.chat_text(prompt)
        check_length(model, text)
        return tokenizer.encode(text, add_special_tokens=False)
    tokens: Sequence[Any] = prompt
    try:
        if isinstance(prompt, bytes | bytearray | Mapping | Set):  # would pass for numbers, or for some order of them
            raise TypeError("a list is needed")
        return [index(token) for token in tokens]
    except TypeError as error:
        message = (
            f"a prompt must be a text, a list of token ids or messages, got {shown(prompt)} ({type(prompt).__name__})"
        )
        raise TypeError(f"{message}: {error}") from error


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError("this model came without a tokenizer; give the prompt as token ids")
    return model.tokenizer


def is_conversation(prompt: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether a prompt is messages: dictionaries in a list."""
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def check_length(model: Model, text: str) -> None:
    """Raise ValueError for a text that cannot fit before it is tokenised, which takes hundreds of bytes a character."""
    positions = model.config.max_positions
    if model.tokenizer is None or len(text) <= positions * SHORT_TOKEN:
        return
    longest = model.tokenizer.longest_token
    if len(text) > positions * longest:
        raise ValueError(
            f"the prompt has {len(text)} characters, which are at least {-(-len(text) // longest)} tokens (the "
            f"longest token has {longest} characters); the model has {positions} positions; shorten the prompt"
        )
