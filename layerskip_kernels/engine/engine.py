"""Many requests through one model and one cache: continuous batching. Results do not depend on the rest of the batch.

    engine = Engine(load_model())
    request = engine.add_request("def fibonacci(n):", GenerationConfig(max_new_tokens=128))
    for output in engine.stream(request):
        print(output.text)

Every step is the same for all running requests: draft, verify, commit, emit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar, get_args

import torch

from layerskip_kernels.checks import check_choice, check_int
from layerskip_kernels.config import GenerationConfig
from layerskip_kernels.decoding.kv_cache import PagedKVCache
from layerskip_kernels.decoding.types import Verdict
from layerskip_kernels.engine import forks, outbox
from layerskip_kernels.engine.drafting import DraftPlanner, DraftPolicy
from layerskip_kernels.engine.forward import forward
from layerskip_kernels.engine.interrupts import DeferredInterrupt
from layerskip_kernels.engine.preemption import CacheManager, Preemption, Stats
from layerskip_kernels.engine.request import Generation, Output, Prompt, Request
from layerskip_kernels.engine.scheduler import Scheduler, Work, sequences, without_drafts
from layerskip_kernels.errors import CacheFull
from layerskip_kernels.model.model import Model

__all__ = ["DraftPolicy", "Engine", "Output"]

DEFAULT_MEMORY, MOST_MEMORY = 1 << 30, 1 << 47  # bytes
T = TypeVar("T")


class Engine:
    """Runs requests together: prompts in chunks beside sequences that decode, each with a config of its own.

    ``cache``: where the sequences live (default: a new one of ``memory`` bytes that shares prefixes). ``max_batch``:
    requests that run at a time. ``chunk_size``: rows of prompts in one step. ``drafts``: "measured" shortens drafts,
    down to none, where speculation does not pay by the engine's own times and by how drafts fared; "fixed" drafts as
    many tokens as each config says, unless it says "auto"; "auto" is "fixed" for requests whose config or model says
    how to draft (`GenerationConfig`), and "measured" for the others. ``preemption``: when pages run short, the
    newest request's are swapped to host memory
    (or to files under ``swap_dir``) or computed again later; "auto" takes the faster. None of these changes a token.

    What a request gains is handed out once, by ``step``, ``stream`` or ``run``. Any thread may call any method: one at
    a time does the work, the others wait. A Ctrl-C at any point loses nothing: the call raises KeyboardInterrupt, and
    the next one goes on where it was.
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
        check_int("memory", memory, 1, MOST_MEMORY)
        check_int("max_batch", max_batch, 1)
        check_int("chunk_size", chunk_size, 1)
        check_choice("drafts", drafts, get_args(DraftPolicy))
        check_choice("preemption", preemption, get_args(Preemption))
        self.model = model
        self.cache = _new_cache(model, memory) if cache is None else cache
        self.cache.check_model(model)
        self._planner = DraftPlanner(model, drafts)
        self._manager = CacheManager(self.cache, preemption, swap_dir, self._planner.prompt_seconds)
        self._scheduler = Scheduler(self._manager, max_batch, chunk_size)
        self._requests: dict[int, Request] = {}  # waiting or running
        self._outbox: list[Output] = []  # what has not been handed out
        self._next_id = 0
        self._lock = forks.lock_of(self)
        self._interrupt = DeferredInterrupt()  # of the step in progress

    # ---- requests ----

    def add_request(
        self, prompt: Prompt, config: GenerationConfig | None = None, *, salt: bytes | str | None = None
    ) -> int:
        """Queue a prompt (text, token ids or messages). Returns the request's id.

        ``salt``: prefixes are shared only among requests of equal salt. Raises ValueError for what the prompt or the
        config ask for that the model does not have or that needs ``add_samples``, TypeError for a prompt that is
        none of these, and CacheFull, with the numbers, for a request that could not fit even if it were
        alone.
        """
        if config is not None and config.num_samples > 1:
            raise ValueError(f"add_request queues one text, but num_samples is {config.num_samples}; use add_samples")
        [request_id] = self.add_samples(prompt, config, salt=salt)
        return request_id

    def add_samples(
        self, prompt: Prompt, config: GenerationConfig | None = None, *, salt: bytes | str | None = None
    ) -> list[int]:
        """Queue num_samples texts of one prompt, which passes through the model once. Returns their ids.

        Raises as add_request does.
        """
        requests = Request.samples(self.model, config or GenerationConfig(), prompt, salt)
        self._scheduler.check(requests[0])
        try:
            with self._lock, DeferredInterrupt():
                for request in requests:
                    request.id, self._next_id = self._next_id, self._next_id + 1
                    self._requests[request.id] = request
                    self._scheduler.add(request)
                ids = [request.id for request in requests]
        except BaseException:  # the caller does not learn the ids
            with self._lock, DeferredInterrupt():
                for request in requests:
                    self._forget(request)
            raise
        return ids

    def cancel(self, request_id: int) -> bool:
        """End a request where it is; its pages are free at once. Returns whether it was still waiting or running."""
        with self._lock, DeferredInterrupt():
            request = self._requests.get(request_id)
            if request is not None:
                self._finish(request, "cancelled")
            return request is not None

    def close(self) -> None:
        """Cancel all requests."""
        with self._lock, DeferredInterrupt():
            for request_id in list(self._requests):
                self.cancel(request_id)

    @property
    def stats(self) -> Stats:
        """Preemptions, and errors that were worked around; the cache has statistics of its own."""
        return self._manager.stats

    @property
    def num_unfinished(self) -> int:
        """Requests whose end has not been handed out."""
        with self._lock:
            return len(self._requests) + sum(output.finish_reason is not None for output in self._outbox)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of prompts that have not been computed."""
        with self._lock:
            return self._scheduler.num_prompt_tokens

    # ---- results ----

    def step(self) -> list[Output]:
        """Bring all running requests one step forward. Returns what is new about any request."""
        self._advance()
        return self._hand_out(outbox.everything)

    def stream(self, request_id: int) -> Iterator[Output]:
        """What a request gains, as it comes; the last output holds the whole generation.

        Steps the engine as needed. Raises ValueError for an id that is unknown or whose end was handed out, and the
        request's own error if it has one. A stream that is left early leaves the request running: see ``cancel``.
        """
        known = False
        while True:
            is_running = request_id in self._requests
            outputs = self._hand_out(partial(outbox.oldest_of, request_id))
            if outputs:
                known = True
                yield outputs[0]
                if outputs[0].error is not None:
                    raise outputs[0].error
            elif is_running:
                known = True
                self._advance(awaited=request_id)
            elif known:
                return
            else:
                raise ValueError(f"request {request_id} is unknown, or its end has been handed out already")

    def run(self) -> dict[int, Generation]:
        """Step until nothing is left to do. Returns the generations that ended, by request id.

        An interrupted run has handed nothing out: the next one returns what had ended before as well.
        """
        while self._requests:
            self._advance()
            self._hand_out(outbox.shortened)
        return self._hand_out(outbox.generations)

    def _hand_out(self, choose: Callable[[list[Output]], outbox.Choice[T]]) -> T:
        """What ``choose`` takes out of the outbox.

        A Ctrl-C comes before or after: signals are handled at calls, loops and function entries, and there is none
        between the assignment and the caller's own but leaving the lock.
        """
        taken: list[Output] = []
        try:
            with self._lock:
                choice = choose(self._outbox)
                result, taken, self._outbox = choice
        except BaseException:
            self._outbox = [*taken, *self._outbox]
            raise
        return result

    # ---- the step ----

    def _advance(self, awaited: int | None = None) -> None:
        """One step; none where a thread that waits for request ``awaited`` finds its output already there."""
        with self._lock, DeferredInterrupt() as self._interrupt, torch.no_grad():
            if awaited is not None and any(output.request_id == awaited for output in self._outbox):
                return
            while refused := self._scheduler.admit():
                self._finish(refused[0], "error", refused[1])
            plan = self._planner.choose(self._scheduler.plan())
            try:
                plan = self._scheduler.make_room(plan)
            except CacheFull as error:
                self._finish(self._scheduler.running[0], "error", error)
                return
            for depth in sorted({work.request.depth for work in plan}):
                self._run([work for work in plan if work.request.depth == depth])

    def _run(self, plan: list[Work]) -> bool:
        """Draft, verify, commit, emit for requests of one depth. Returns whether no request ended by an error."""
        try:
            self._interrupt.held = False  # until it has passed, and only here, a Ctrl-C takes effect at once
            self._interrupt.deliver()
            cycles = forward(self.model, self.cache, plan)
            self._interrupt.held = True
            self.cache.commit(*(cycle.verdict for cycle in cycles))
        except BaseException as error:
            self._interrupt.held = True
            self.cache.rollback(sequences(plan))
            if not isinstance(error, Exception):
                raise
            return self._isolate(plan, error)
        well = True
        for cycle in cycles:
            self._planner.record(plan, *cycle)
            well &= all([self._emit(work, cycle.verdict, b) for b, work in enumerate(plan)])
        return well

    def _isolate(self, plan: list[Work], error: Exception) -> bool:
        """Find the request at fault: both halves alone; a single request without its drafts; then the error is its own.

        What fails together and not apart, or with drafts and not without, is counted and warned about.
        """
        half = len(plan) // 2
        if half:
            before = replace(self.stats)
            succeeded = self._run(plan[:half]) & self._run(plan[half:])
            if succeeded and self.stats == before:  # a smaller part of it was not at fault either
                what = f"a step of {len(plan)} requests failed, and both halves of it succeeded"
                self.stats.count("batch_errors", what, error)
            return succeeded
        if plan[0].drafts.count or plan[0].cycles:
            succeeded = self._run(without_drafts(plan))
            if succeeded:
                self.stats.count("draft_errors", "drafting failed where plain decoding succeeded", error)
            return succeeded
        self._finish(plan[0].request, "error", error)
        return False

    # ---- after the step ----

    def _emit(self, work: Work, verdict: Verdict, b: int) -> bool:
        """Put what a request gained into the outbox, and end it where its text ends. Returns whether all went well."""
        request = work.request
        if work.waiting or request.generation.finish_reason is not None:  # in an earlier cycle
            return True
        try:
            reason = request.accept(verdict, b)
        except Exception as error:
            self._finish(request, "error", error)
            return False
        output = request.output(verdict.draft.of(b), verdict.accepted[b])
        if reason is None:
            self._outbox.append(output)
            return True
        return self._finish(request, reason, last=output)

    def _finish(
        self, request: Request, reason: str, error: Exception | None = None, last: Output | None = None
    ) -> bool:
        """End a request: keep what its config asks for, give its pages back. Returns whether it ended without error."""
        try:
            self._keep_kv(request)
            request.close()
        except Exception as failure:  # no memory for it, say
            reason, error = "error", error or failure
        self._outbox.append(request.end(reason, error, last or request.output()))
        self._forget(request)
        return error is None

    def _forget(self, request: Request) -> None:
        self._scheduler.remove(request)
        self._requests.pop(request.id, None)

    def _keep_kv(self, request: Request) -> None:
        """Cut the sequence where plain decoding would have ended it, and copy its K and V if they are to be kept."""
        generation, sequence = request.generation, request.sequence
        if sequence is None or request.swapped is not None:
            return
        length = generation.prompt_length + len(generation.token_ids) - 1
        self.cache.truncate(sequence, min(length, self.cache.length(sequence)))
        if request.config.return_kv:
            k, v = self.cache.export(sequence)
            generation.kv = k[: request.depth].cpu(), v[: request.depth].cpu()


def _new_cache(model: Model, memory: int) -> PagedKVCache:
    try:
        return PagedKVCache.with_memory(model, memory, prefix_sharing=True)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise ValueError(f"memory={memory}: a cache of that many bytes cannot be made here ({error})") from error
