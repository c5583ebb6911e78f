"""What goes back: texts, log-probabilities, usage and timings, in the API's words."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from layerskip_kernels.decoding.sampling import TokenLogprobs
from layerskip_kernels.decoding.stop_strings import StopStrings
from layerskip_kernels.engine.request import Generation, Output
from layerskip_kernels.model.text_stream import TextStream
from layerskip_kernels.model.tokenizer import Tokenizer

__all__ = ["Answer", "Piece", "SampleText", "chat_logprobs", "completion_logprobs", "timings", "usage"]

FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "abort"}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Piece:
    """What one output adds to a sample: text that can be shown, its tokens, and at the end why it ended.

    ``drafts`` and ``num_accepted``: what was drafted for it, for pages that show it.
    """

    text: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    drafts: Sequence[int] = ()
    num_accepted: int = 0


class SampleText:
    """One sample's text as it grows; joined, its pieces are the text without the stop string."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), min_tokens: int = 0, keeps_stop: bool = False,
        stop_token_ids: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._stream = TextStream(tokenizer)
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._keeps_stop = keeps_stop
        self._stop_token_ids = frozenset(stop_token_ids)
        self._count = 0

    def push(self, output: Output) -> Piece:
        text = "".join(self._push_token(token) for token in output.tokens)
        if output.finish_reason is None:
            return Piece(text, output.tokens, output.logprobs or (), None, None, output.drafts, output.num_accepted)
        text += self._stops.push(self._stream.finish()) + self._stops.finish()
        reason = FINISH_REASONS.get(output.finish_reason, output.finish_reason)
        stop: str | int | None = None
        if output.finish_reason == "stop":
            stop = self._stops.found
            text += stop if stop is not None and self._keeps_stop else ""
            if stop is None and output.tokens and output.tokens[-1] in self._stop_token_ids:
                stop = output.tokens[-1]
        return Piece(text, output.tokens, output.logprobs or (), reason, stop, output.drafts, output.num_accepted)

    def _push_token(self, token: int) -> str:
        self._count += 1
        return self._stops.push(self._stream.push([token]), self._count >= self._min_tokens)


@dataclass
class Answer:
    """One request's answer: its identity, and what all chunks and the whole share."""

    model: str
    kind: str  # "text_completion" or "chat.completion"
    created: int = field(default_factory=lambda: int(time.time()))
    generations: list[Generation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.kind == "chat.completion" else "cmpl-") + uuid.uuid4().hex

    def envelope(self, choices: list[dict[str, Any]], chunk: bool = False) -> dict[str, Any]:
        object_ = self.kind + (".chunk" if chunk and self.kind == "chat.completion" else "")
        return {"id": self.id, "object": object_, "created": self.created, "model": self.model, "choices": choices}


def usage(generations: Sequence[Generation], prompts: int) -> dict[str, Any]:
    """Tokens read and written, of this many prompts; the samples of one prompt count it once."""
    firsts = [generation for generation in generations if generation.sample == 0][:prompts]
    read = sum(generation.prompt_length for generation in firsts)
    written = sum(len(generation.token_ids) for generation in generations)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(generation.cached_tokens for generation in firsts)},
    }


def timings(generations: Sequence[Generation]) -> dict[str, Any]:
    """What llama-server reports of a request: milliseconds by stage, and how drafts fared."""
    prompt_n = sum(generation.prompt_length for generation in generations if generation.sample == 0)
    prompt_ms = 1e3 * max((generation.prefill_seconds for generation in generations), default=0.0)
    predicted_n = sum(len(generation.token_ids) for generation in generations)
    decoding = max((g.draft_seconds + g.verify_seconds for g in generations), default=0.0)
    return {
        "prompt_n": prompt_n,
        "prompt_ms": prompt_ms,
        "prompt_per_second": 1e3 * prompt_n / prompt_ms if prompt_ms else None,
        "predicted_n": predicted_n,
        "predicted_ms": 1e3 * decoding,
        "predicted_per_second": predicted_n / decoding if decoding else None,
        "draft_n": sum(generation.drafted for generation in generations),
        "draft_n_accepted": sum(generation.accepted for generation in generations),
    }


def completion_logprobs(
    tokenizer: Tokenizer, scores: Sequence[TokenLogprobs | None], token_ids: Sequence[int], offset: int, with_top: bool
) -> dict[str, Any]:
    """The completions API's four lists. ``scores``: None for a text's first token, before which there is nothing."""
    texts = [tokenizer.decode([token]) for token in token_ids]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    tops = [None if s is None else {tokenizer.decode([t]): p for t, p in s.top} for s in scores]
    return {
        "tokens": texts,
        "token_logprobs": [None if s is None else s.logprob for s in scores],
        "top_logprobs": tops if with_top else None,
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The chat API's list of tokens with their log-probabilities."""
    return {
        "content": [
            {**_token(tokenizer, s.token_id, s.logprob), "top_logprobs": [_token(tokenizer, t, p) for t, p in s.top]}
            for s in scores
        ]
    }


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token_id])
    # A part of a character has no text of its own, and so no bytes that could be read off it.
    return {"token": text, "logprob": logprob, "bytes": None if REPLACEMENT in text else list(text.encode())}
