"""Many requests through one model and one cache: continuous batching, whose answers do not depend on the company.

    engine = Engine(load_model())
    request = engine.add_request("def fibonacci(n):", GenerationConfig(max_new_tokens=128))
    for output in engine.stream(request):
        print(output.tokens)

Every step is the loop of generate.py for whoever is there: draft, verify, commit, hand out.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from threading import RLock
from time import perf_counter
from typing import Literal, get_args

import torch

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.costs import DraftLengths, Rows
from layerskip_kernels.errors import CacheFull
from layerskip_kernels.generate import Generation
from layerskip_kernels.kv_cache import PagedKVCache
from layerskip_kernels.model import Model
from layerskip_kernels.scheduler import Plan, Request, Scheduler
from layerskip_kernels.steps import Draft, Verdict, draft_step, verify_step

__all__ = ["DraftPolicy", "Engine", "Output"]

DraftPolicy = Literal["measured", "fixed"]
DEFAULT_MEMORY = 1 << 30


@dataclass(frozen=True)
class Output:
    """What a request gained since the last report: tokens, and at the end how it finished and all of it.

    ``finish_reason``: "eos", "length", "cancelled", or "error" with the error; None while it goes on.
    """

    request_id: int
    tokens: list[int]
    finish_reason: str | None = None
    generation: Generation | None = None
    error: Exception | None = None


class Engine:
    """Runs requests together: prompts in chunks beside sequences that decode, each with a config of its own.

    ``cache``: where the sequences live (default: a new one of ``memory`` bytes). ``max_batch``: requests that run at
    a time. ``chunk_size``: rows of prompts in one step. ``drafts``: "measured" shortens drafts, down to none, where
    speculation does not pay by the engine's own times; "fixed" drafts as many tokens as each config says. None of
    these changes a token.

    Any thread may call any method: one at a time does the work, the others wait.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedKVCache | None = None,
        *,
        memory: int = DEFAULT_MEMORY,
        max_batch: int = 8,
        chunk_size: int = 64,
        drafts: DraftPolicy = "measured",
    ) -> None:
        for name, value in (("max_batch", max_batch), ("chunk_size", chunk_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if drafts not in get_args(DraftPolicy):
            raise ValueError(f"drafts must be one of {', '.join(map(repr, get_args(DraftPolicy)))}, got {drafts!r}")
        self.model = model
        self.cache = cache or PagedKVCache.with_memory(model, memory)
        self.drafts = drafts
        self.lengths = DraftLengths(model)
        self._scheduler = Scheduler(self.cache, max_batch, chunk_size)
        self._requests: dict[int, Request] = {}  # all whose end has not been reported
        self._next_id = 0
        self._lock = RLock()

    # ---- requests ----

    def add_request(self, prompt: ListLike[int] | str, config: GenerationConfig | None = None) -> int:
        """Queue a prompt (text or token ids). Returns the request's id.

        Raises ValueError for what the prompt or the config ask for that the model does not have, and CacheFull,
        with the numbers, for a request that could not fit even if it were alone.
        """
        config = config or GenerationConfig()
        tokens = _encode(self.model, prompt)
        self.cache.check_prompt(tokens)
        speculative = config.strategy == "self_speculative"
        exit_layer = config.resolve_exit_layer(self.model.config.num_layers) if speculative else 0
        limit = min(len(tokens) + config.max_new_tokens, self.model.config.max_positions + 1)
        pages = self._scheduler.pages_for(limit - 1)
        if pages > self.cache.pool.num_pages:
            raise CacheFull(pages, self.cache.pool.num_pages)
        with self._lock:
            request = Request(self._next_id, tokens, config, exit_layer, limit, None, Generation(len(tokens)))
            self._next_id += 1
            self._requests[request.id] = request
            self._scheduler.add(request)
        return request.id

    def cancel(self, request_id: int) -> bool:
        """End a request where it is; its pages are free at once. Returns whether it had still been going on."""
        with self._lock:
            request = self._requests.get(request_id)
            if request is None or request.finished:
                return False
            self._finish(request, "cancelled")
            return True

    def stream(self, request_id: int) -> Iterator[Output]:
        """What a request gains, as it comes; the last output holds the whole generation.

        Steps the engine as needed. Raises ValueError for an id that is unknown or whose end was reported, and the
        request's own error if it has one. A stream that is left early leaves the request running: see ``cancel``.
        """
        request = self._requests.get(request_id)
        if request is None:
            raise ValueError(f"request {request_id} is unknown, or its end has been reported already")
        while request_id in self._requests:
            with self._lock:
                if not self._has_news(request):
                    self._advance()
                output = self._report(request) if self._has_news(request) else None
            if output is not None:
                yield output
                if output.error is not None:
                    raise output.error

    def run(self) -> dict[int, Generation]:
        """Step until nothing is left to do. Returns the generations that ended, by request id."""
        generations = {}
        while self._requests:
            for output in self.step():
                if output.generation is not None:
                    generations[output.request_id] = output.generation
        return generations

    @property
    def num_unfinished(self) -> int:
        """Requests waiting or running."""
        return len(self._scheduler.waiting) + len(self._scheduler.running)

    # ---- the step ----

    def step(self) -> list[Output]:
        """Bring everybody who runs one step forward, and report what is new about any request."""
        with self._lock:
            self._advance()
            return [self._report(request) for request in list(self._requests.values()) if self._has_news(request)]

    @torch.no_grad()
    def _advance(self) -> None:
        plan = self._choose_drafts(self._scheduler.plan())
        plan = self._scheduler.make_room(plan)
        if plan.requests:
            self._run(plan)

    def _run(self, plan: Plan) -> None:
        """Draft, verify, commit, hand out. What fails is tried again in smaller company, to find whose error it is."""
        try:
            start = perf_counter()
            draft = self._draft(plan)
            drafted = perf_counter()
            verdict = verify_step(self.model, self.cache, draft)
        except BaseException as error:
            self.cache.rollback(plan.sequences)
            if not isinstance(error, Exception):
                raise
            self._isolate(plan, error)
            return
        self.cache.commit(verdict)
        self._take_times(plan, verdict, drafted - start, perf_counter() - drafted)
        for b, request in enumerate(plan.requests):
            self._hand_out(request, verdict, b)

    def _draft(self, plan: Plan) -> Draft:
        """One draft_step for each exit layer, joined."""
        parts = []
        for exit_layer in sorted({r.exit_layer for r, count in zip(plan.requests, plan.counts, strict=True) if count > 0}):
            of_layer = [i for i, r in enumerate(plan.requests) if r.exit_layer == exit_layer and plan.counts[i] > 0]
            group = plan.only(of_layer)
            parts.append(draft_step(self.model, self.cache, group.sequences, exit_layer, group.counts))
        return Draft.joined(plan.sequences, plan.counts, parts)

    def _isolate(self, plan: Plan, error: Exception) -> None:
        """Whose error was it? Both halves by themselves; a single one without its drafts; then it is its own."""
        half = len(plan.requests) // 2
        if half:
            self._run(plan.only(range(half)))
            self._run(plan.only(range(half, len(plan.requests))))
        elif plan.counts[0] > 0:
            self._run(plan.without_drafts())
        else:
            self._finish(plan.requests[0], "error", error)

    # ---- what surrounds the step ----

    def _choose_drafts(self, plan: Plan) -> Plan:
        wishes = [plan.requests[i].wish() for i in plan.decoding]
        if self.drafts == "fixed":
            counts = [wish.most for wish in wishes]
        else:
            counts = self.lengths.choose(wishes, *plan.prompt_rows)
        for i, count in zip(plan.decoding, counts, strict=True):
            plan.counts[i] = count
        return plan

    def _take_times(self, plan: Plan, verdict: Verdict, draft_seconds: float, verify_seconds: float) -> None:
        """Tell the draft lengths what the step took and brought."""
        decoding = plan.decoding
        wishes = [plan.requests[i].wish() for i in decoding]
        counts = [plan.counts[i] for i in decoding]
        rows = Rows(tuple((w.exit_layer, count) for w, count in zip(wishes, counts, strict=True)), *plan.prompt_rows)
        costs = self.lengths.costs
        if any(counts):
            costs.observe(rows.draft_passes(self.model), draft_seconds)
        costs.observe(rows.verify_passes(self.model), verify_seconds)
        self.lengths.learn(wishes, counts, [int(verdict.num_accepted[i]) for i in decoding])
        for i, request in enumerate(plan.requests):
            generation = request.generation
            generation.cycles += plan.counts[i] >= 0 and bool(generation.token_ids)
            if i in decoding:
                generation.drafted += plan.counts[i]
                generation.accepted += int(verdict.num_accepted[i])
                generation.draft_seconds += draft_seconds
                generation.verify_seconds += verify_seconds
            else:
                generation.prefill_seconds += draft_seconds + verify_seconds

    def _hand_out(self, request: Request, verdict: Verdict, b: int) -> None:
        """Give a request what it gained, up to its end."""
        generation, tokens = request.generation, verdict.new_tokens(b)
        stop_ids = self.model.config.eos_token_ids if request.config.eos_token_ids is None else request.config.eos_token_ids
        end = next((n for n, token in enumerate(tokens, 1) if token in stop_ids), None)
        tokens = tokens[:end]
        generation.token_ids += tokens
        if request.config.return_logits and tokens:
            request.logits.append(verdict.new_logits(b)[: len(tokens)].clone())
        if end is not None:
            self._finish(request, "eos")
        elif len(request.tokens) >= request.limit:
            self._finish(request, "length")

    def _finish(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """Give the pages back, and keep what was asked to be kept."""
        generation, sequence = request.generation, request.sequence
        generation.finish_reason, request.error = reason, error
        if request.logits:
            generation.logits = torch.cat(request.logits)
        if sequence is not None:
            # Tokens accepted beyond an end of text are cut: the cache ends where plain decoding would end.
            length = generation.prompt_length + len(generation.token_ids) - 1
            self.cache.truncate(sequence, min(length, self.cache.length(sequence)))
            if request.config.return_kv:
                generation.kv = self.cache.export(sequence)
        self._scheduler.remove(request)

    def _has_news(self, request: Request) -> bool:
        return request.finished or request.reported < len(request.generation.token_ids)

    def _report(self, request: Request) -> Output:
        """What is new about a request; once its end is told, it is forgotten."""
        tokens = request.generation.token_ids[request.reported :]
        request.reported += len(tokens)
        if not request.finished:
            return Output(request.id, tokens)
        del self._requests[request.id]
        return Output(request.id, tokens, request.generation.finish_reason, request.generation, request.error)


def _encode(model: Model, prompt: ListLike[int] | str) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    if model.tokenizer is None:
        raise ValueError("this model came without a tokenizer; give the prompt as token ids")
    return model.tokenizer.encode(prompt)
