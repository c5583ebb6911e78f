"""Many requests through one model and one cache: continuous batching, whose answers do not depend on the company.

    engine = Engine(load_model())
    request = engine.add_request("def fibonacci(n):", GenerationConfig(max_new_tokens=128))
    for output in engine.stream(request):
        print(output.tokens)

Every step is the loop of generate.py for whoever is there: draft, verify, commit, hand out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from threading import RLock
from time import perf_counter
from typing import Literal, get_args

import torch

from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.costs import DraftLengths
from layerskip_kernels.errors import CacheFull
from layerskip_kernels.interrupts import ctrl_c_waits
from layerskip_kernels.kv_cache import PagedKVCache
from layerskip_kernels.model import Model
from layerskip_kernels.places import Places, Preemption, Stats
from layerskip_kernels.request import Generation, Output, Request
from layerskip_kernels.scheduler import Plan, Scheduler
from layerskip_kernels.steps import Draft, Verdict, draft_step, verify_step

__all__ = ["DraftPolicy", "Engine", "Output"]

DraftPolicy = Literal["measured", "fixed"]
DEFAULT_MEMORY = 1 << 30


class Engine:
    """Runs requests together: prompts in chunks beside sequences that decode, each with a config of its own.

    ``cache``: where the sequences live (default: a new one of ``memory`` bytes that shares prefixes). ``max_batch``:
    requests that run at a time. ``chunk_size``: rows of prompts in one step. ``drafts``: "measured" shortens drafts,
    down to none, where speculation does not pay by the engine's own times; "fixed" drafts as many tokens as each
    config says. ``preemption``: when pages run short, the newest request's are swapped to host memory (or to files
    under ``swap_dir``) or computed again later; "auto" takes the faster. None of these changes a token.

    What a request gains is handed out once, by ``step``, ``stream`` or ``run``. Any thread may call any method: one at
    a time does the work, the others wait.
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
        preemption: Preemption = "auto",
        swap_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("chunk_size", chunk_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, choice, choices in (
            ("drafts", drafts, get_args(DraftPolicy)),
            ("preemption", preemption, get_args(Preemption)),
        ):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {choice!r}")
        self.model = model
        self.cache = cache or PagedKVCache.with_memory(model, memory, prefix_sharing=True)
        self.drafts = drafts
        self.lengths = DraftLengths(model)
        places = Places(self.cache, preemption, swap_dir, self.lengths.prompt_seconds)
        self._scheduler = Scheduler(places, max_batch, chunk_size)
        self._requests: dict[int, Request] = {}  # all whose end has not been handed out
        self._next_id = 0
        self._lock = RLock()

    # ---- requests ----

    def add_request(
        self, prompt: ListLike[int] | str, config: GenerationConfig | None = None, *, salt: bytes | None = None
    ) -> int:
        """Queue a prompt (text or token ids). Returns the request's id.

        ``salt``: prefixes are shared only among requests of equal salt. Raises ValueError for what the prompt or the
        config ask for that the model does not have or that needs ``add_samples``, TypeError for a prompt that is
        neither text nor token ids, and CacheFull, with the numbers, for a request that could not fit even if it were
        alone.
        """
        if config is not None and config.num_samples > 1:
            raise ValueError(f"add_request queues one text, but num_samples is {config.num_samples}; use add_samples")
        [request_id] = self.add_samples(prompt, config, salt=salt)
        return request_id

    def add_samples(
        self, prompt: ListLike[int] | str, config: GenerationConfig | None = None, *, salt: bytes | None = None
    ) -> list[int]:
        """Queue num_samples texts of one prompt, which goes through the model once. Returns their ids.

        Raises as add_request does.
        """
        with self._lock:
            requests = Request.samples(self.model, config or GenerationConfig(), prompt, salt, self._next_id)
            self._scheduler.check(requests[0])
            self._next_id += len(requests)
            for request in requests:
                self._requests[request.id] = request
                self._scheduler.add(request)
        return [request.id for request in requests]

    def cancel(self, request_id: int) -> bool:
        """End a request where it is; its pages are free at once. Returns whether it had still been going on."""
        with self._lock:
            request = self._requests.get(request_id)
            if request is None or request.generation.finish_reason is not None:
                return False
            self._finish(request, "cancelled")
            return True

    def stream(self, request_id: int) -> Iterator[Output]:
        """What a request gains, as it comes; the last output holds the whole generation.

        Steps the engine as needed. Raises ValueError for an id that is unknown or whose end was handed out, and the
        request's own error if it has one. A stream that is left early leaves the request running: see ``cancel``.
        """
        request = self._requests.get(request_id)
        if request is None:
            raise ValueError(f"request {request_id} is unknown, or its end has been handed out already")
        while request_id in self._requests:
            with self._lock:
                if not request.outputs:
                    self._advance()
                # One at a time: what a stream that is left has not yielded is still there for others.
                output = self._collect_one(request) if request.outputs else None
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
    def stats(self) -> Stats:
        """Preemptions so far, and how they went; the cache has statistics of its own."""
        return self._scheduler.places.stats

    @property
    def num_unfinished(self) -> int:
        """Requests whose end has not been handed out."""
        return len(self._requests)

    # ---- the step ----

    def step(self) -> list[Output]:
        """Bring everybody who runs one step forward, and hand out what is new about any request."""
        with self._lock:
            self._advance()
            return [output for request in list(self._requests.values()) for output in self._collect(request)]

    @torch.no_grad()
    def _advance(self) -> None:
        while refused := self._scheduler.admit():
            request, error = refused
            self._finish(request, "error", error)
        plan = self._choose_drafts(self._scheduler.plan())
        try:
            plan = self._scheduler.make_room(plan)
        except CacheFull as error:  # a single one is left, and others than this engine hold pages
            self._finish(self._scheduler.running[0], "error", error)
            return
        if plan.requests:
            self._run(plan)

    def _run(self, plan: Plan) -> None:
        """Draft, verify, commit, take. What fails is tried again in smaller company, to find whose error it is."""
        try:
            start = perf_counter()
            draft = self._draft(plan)
            drafted = perf_counter()
            verdict = verify_step(self.model, self.cache, draft, plan.samplers)
            verified = perf_counter()
            with ctrl_c_waits():  # what the cache has kept, the requests must get
                self.cache.commit(verdict)
                self._take_times(plan, verdict, drafted - start, verified - drafted)
                for b, request in enumerate(plan.requests):
                    self._take(request, verdict, b)
        except BaseException as error:
            self.cache.rollback(plan.sequences)
            if not isinstance(error, Exception):
                raise
            self._isolate(plan, error)

    def _draft(self, plan: Plan) -> Draft:
        """One draft_step for each exit layer, joined."""
        parts = []
        drafting = [i for i, count in enumerate(plan.counts) if count > 0]
        for exit_layer in sorted({plan.requests[i].exit_layer for i in drafting}):
            group = plan.only([i for i in drafting if plan.requests[i].exit_layer == exit_layer])
            samplers = group.samplers
            parts.append(draft_step(self.model, self.cache, group.sequences, exit_layer, group.counts, samplers))
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
        wishes = plan.wishes
        fixed = self.drafts == "fixed"
        counts = [wish.most for wish in wishes] if fixed else self.lengths.choose(wishes, *plan.prompt_rows)
        return plan.with_drafts(counts)

    def _take_times(self, plan: Plan, verdict: Verdict, draft_seconds: float, verify_seconds: float) -> None:
        """Take note of what the step took and brought, for each request and for the next choice of drafts."""
        decoding = plan.decoding
        counts, accepted = [plan.counts[i] for i in decoding], [verdict.accepted[i] for i in decoding]
        rows, prompts = plan.prompt_rows
        if self.drafts != "fixed" or rows:  # where nobody chooses drafts, only what prompts cost is asked for
            self.lengths.learn(plan.wishes, counts, accepted, (rows, prompts), draft_seconds, verify_seconds)
        for i, request in enumerate(plan.requests):
            generation = request.generation
            generation.cycles += plan.counts[i] >= 0 and bool(generation.token_ids)
            if i in decoding:
                generation.drafted += plan.counts[i]
                generation.accepted += verdict.accepted[i]
                generation.draft_seconds += draft_seconds
                generation.verify_seconds += verify_seconds
            else:
                generation.prefill_seconds += draft_seconds + verify_seconds

    def _take(self, request: Request, verdict: Verdict, b: int) -> None:
        """Give a request what it gained."""
        try:
            reason = request.take(verdict, b)
        except Exception as error:
            self._finish(request, "error", error)
        else:
            if reason is not None:
                self._finish(request, reason)

    def _finish(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """A request is over: keep what was asked to be kept, give the pages back."""
        try:
            self._keep(request)
        except Exception as failure:  # no memory for it, say
            reason, error = "error", error or failure
        self._scheduler.remove(request)
        request.end(reason, error)

    def _keep(self, request: Request) -> None:
        generation, sequence = request.generation, request.sequence
        if sequence is not None and request.swapped is None:
            # Tokens accepted beyond an end of text are cut: the cache ends where plain decoding would end.
            length = generation.prompt_length + len(generation.token_ids) - 1
            self.cache.truncate(sequence, min(length, self.cache.length(sequence)))
            generation.kv = self.cache.export(sequence) if request.config.return_kv else None
        request.keep_logits()

    def _collect(self, request: Request) -> list[Output]:
        """What is new about a request."""
        return [self._collect_one(request) for _ in range(len(request.outputs))]

    def _collect_one(self, request: Request) -> Output:
        """The oldest of what is new about a request; once its end is told, it is forgotten."""
        output = request.outputs.popleft()
        if output.finish_reason is not None:
            del self._requests[request.id]
        return output
