"""What one prompt is on its way to a text, and what it became."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path

import torch
from torch import Tensor

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.costs import Evidence
from layerskip_kernels.kv_cache import Sequence
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
from layerskip_kernels.steps import Verdict
from layerskip_kernels.swap import SwappedKV
from layerskip_kernels.tokenizer import TextStream

__all__ = ["Generation", "Output", "Request", "encode"]


@dataclass
class Generation:
    """What one prompt became, and what it cost.

    ``token_ids`` ends with the token that ended it; ``text`` (where the model has a tokenizer) ends before a stop
    string. ``finish_reason``: "eos", "stop" (a stop token or string), "length", "cancelled" or "error". ``sample``:
    which of the prompt's texts this is; ``seed``: what it was drawn with, if it was drawn. Seconds are wall time by
    stage; a batch shares them, so each of its generations reports the whole. ``logits`` fp32 [tokens, V],
    ``logprobs``, one for each token, and ``kv``, k and v of every position but the last token's ([L, positions, G, K]
    each), are kept when the config asks for them.
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


@dataclass(frozen=True)
class Output:
    """What a request gained in one step: tokens; and at its end, how it ended and all of it.

    ``drafts``: the tokens drafted before, of which the first ``num_accepted`` were right. ``finish_reason``: as in
    Generation, "error" with the ``error``; None while it goes on.
    """

    request_id: int
    tokens: ListLike[int] = ()
    drafts: ListLike[int] = ()
    num_accepted: int = 0
    finish_reason: str | None = None
    generation: Generation | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Request:
    """A prompt on its way to a text that ends at the latest with ``limit`` tokens, prompt included.

    Its life: 1. waiting, with no place in the cache; 2. running, its prompt going through in chunks; 3. running,
    gaining tokens; 4. finished. When pages run short, the newest goes back from 2 or 3 to 1 with all it has gained.
    """

    id: int
    model: Model
    config: GenerationConfig
    known: list[int]  # while it waits: its prompt, and after a preemption what was generated as well
    limit: int
    exit_layer: int  # 0: plain decoding
    num_drafts: int  # at most, before each verification
    salt: bytes | None
    sampler: Sampler | None
    generation: Generation
    leader: Request | None = None  # another text of the same prompt, whose pages it can share
    sequence: Sequence | None = None  # its place in the cache
    swapped: SwappedKV | Path | None = None  # what it had there, when others needed the pages
    evidence: Evidence = field(default_factory=Evidence)
    outputs: deque[Output] = field(default_factory=deque)  # not yet handed out

    def __post_init__(self) -> None:
        self._logits: list[Tensor] = []
        self._shown: list[str] = []
        self._stops = StopStrings(self.config.stop)
        tokenizer = self.model.tokenizer if self.config.stop else None
        self._stream = None if tokenizer is None else TextStream(tokenizer)

    @classmethod
    def samples(
        cls, model: Model, config: GenerationConfig, prompt: ListLike[int] | str, salt: bytes | None, first_id: int
    ) -> list[Request]:
        """One request for each of the prompt's num_samples texts, with ids from ``first_id`` on.

        Raises ValueError for what the config asks for that the model does not have.
        """
        if config.stop and model.tokenizer is None:
            raise ValueError("this model came without a tokenizer, so stop strings can't be found; use stop_token_ids")
        if config.temperature > 0:
            config = resolve_seed(config)
        tokens = encode(model, prompt)
        limit = min(len(tokens) + config.max_new_tokens, model.config.max_positions + 1)
        exit_layer, num_drafts = model.draft_settings(config)
        requests: list[Request] = []
        for sample in range(config.num_samples):
            sampler = make_sampler(model, config, len(tokens), sample)
            generation = Generation(len(tokens), sample=sample, seed=config.seed)
            leader = requests[0] if requests else None
            id_ = first_id + sample
            requests.append(
                cls(id_, model, config, tokens, limit, exit_layer, num_drafts, salt, sampler, generation, leader)
            )
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
        """How many tokens it may draft: none that could not become one of its own."""
        return max(0, min(self.num_drafts, self.limit - len(self.tokens) - 1))

    def take(self, verdict: Verdict, b: int) -> str | None:
        """Take what sequence ``b`` of a verdict gained, up to the text's end. Returns why it ended, or None."""
        if verdict.accepted[b] < 0:  # a chunk of its prompt
            return None
        tokens, reason = self._until_end(verdict.new_tokens(b))
        if self.config.return_logits:
            self._logits.append(verdict.new_logits(b)[: len(tokens)].clone())
        if self.config.logprobs is not None:
            logits = verdict.new_logits(b)[: len(tokens)]
            self.generation.logprobs = self.generation.logprobs or []
            self.generation.logprobs += top_logprobs(self.model.ops, logits, tokens, self.config.logprobs)
        self.outputs.append(Output(self.id, tokens, verdict.draft.of(b), verdict.accepted[b]))
        return reason

    def keep_logits(self) -> None:
        """Put the logits of all tokens together, if they were to be kept."""
        if self._logits:
            self.generation.logits = torch.cat(self._logits)

    def end(self, reason: str, error: Exception | None = None) -> None:
        """The text is over, after its last token in ``generation.token_ids``."""
        generation = self.generation
        generation.finish_reason = reason
        if self._stream is not None:
            rest = self._stops.push(self._stream.finish())
            generation.text = "".join([*self._shown, rest, self._stops.finish()])
        elif self.model.tokenizer is not None:
            generation.text = self.model.tokenizer.decode(generation.token_ids)
        last = self.outputs.pop() if self.outputs else Output(self.id)
        self.outputs.append(replace(last, finish_reason=reason, generation=generation, error=error))

    def _until_end(self, tokens: list[int]) -> tuple[list[int], str | None]:
        """Append tokens to the text up to the one that ends it, and say why it ended."""
        end_ids = end_token_ids(self.model, self.config)
        for n, token in enumerate(tokens, 1):
            self.generation.token_ids.append(token)
            if self._stop_found(token) or token in self.config.stop_token_ids:
                return tokens[:n], "stop"
            if token in end_ids:
                return tokens[:n], "eos"
        return tokens, "length" if len(self.tokens) >= self.limit else None

    def _stop_found(self, token: int) -> bool:
        """Whether a stop string ends with this token, the last of the text."""
        if self._stream is None:
            return False
        may_end = len(self.generation.token_ids) >= self.config.min_new_tokens
        self._shown.append(self._stops.push(self._stream.push([token]), may_end))
        return self._stops.found is not None


def encode(model: Model, prompt: ListLike[int] | str) -> list[int]:
    """The token ids of a prompt.

    Raises ValueError for a text when the model has no tokenizer, TypeError for what is neither text nor token ids.
    """
    if not isinstance(prompt, str):
        try:
            return [index(token) for token in prompt]
        except TypeError as error:
            raise TypeError(f"the prompt must be a text or a list of token ids: {error}") from error
    if model.tokenizer is None:
        raise ValueError("this model came without a tokenizer; give the prompt as token ids")
    return model.tokenizer.encode(prompt)
