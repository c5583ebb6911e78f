"""Which requests run in the next step, and which have to wait when pages run short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerskip_kernels.decoding.kv_cache import CachedSequence
from layerskip_kernels.decoding.sampling import Sampler
from layerskip_kernels.engine.drafts import NO_DRAFTS, Drafts
from layerskip_kernels.engine.preemption import CacheManager
from layerskip_kernels.engine.request import Request
from layerskip_kernels.errors import CacheFull

__all__ = ["Scheduler", "Work", "samplers", "sequences", "without_drafts"]


@dataclass(frozen=True)
class Work:
    """One request's part of a step: ``rows`` known tokens pass through the model, then those that ``drafts`` asks for.

    ``waiting``: known tokens of its prompt that wait for a later step; the request then gains nothing in this one.
    ``cycles``: how often all of the step's requests draft and are verified, in one call; 0: once, in steps of its own.
    """

    request: Request
    rows: int
    waiting: int = 0
    drafts: Drafts = NO_DRAFTS
    cycles: int = 0

    @property
    def sequence(self) -> CachedSequence:
        assert self.request.sequence is not None, "a request that runs is in the cache"
        return self.request.sequence

    @property
    def decodes(self) -> bool:
        """Whether the request has gained tokens before and may draft; the others bring in their prompts."""
        return self.rows == 1 and not self.waiting and bool(self.request.generation.token_ids)


def sequences(plan: Sequence[Work]) -> list[CachedSequence]:
    return [work.sequence for work in plan]


def samplers(plan: Sequence[Work]) -> list[Sampler | None]:
    return [work.request.sampler for work in plan]


def without_drafts(plan: Sequence[Work]) -> list[Work]:
    """The least that the plan's requests can do."""
    return [replace(work, drafts=NO_DRAFTS, cycles=0) for work in plan]


class Scheduler:
    """Requests waiting and running, first come, first served: none overtakes another, the oldest always proceeds.

    ``chunk_size``: the rows of prompts in one step, all requests together.
    """

    def __init__(self, manager: CacheManager, max_batch: int, chunk_size: int) -> None:
        self.manager = manager
        self.cache = manager.cache
        self.max_batch = max_batch
        self.chunk_size = chunk_size
        self.waiting: list[Request] = []  # both in the order of arrival
        self.running: list[Request] = []

    def check(self, request: Request) -> None:
        """Raise ValueError for a bad prompt, CacheFull for a request that could not fit even if it were alone."""
        self.cache.check_prompt(request.known)
        needed, pages = self._pages_for(request.limit - 1), self.cache.pool.num_pages
        if needed > pages:
            prompt, size = len(request.known), self.cache.pool.page_size
            raise _cache_full(
                f"a prompt of {prompt} tokens and {request.limit - prompt} new ones need {needed} pages of {size} "
                f"positions, but the whole cache has {pages}; ask for fewer tokens, or give the cache more memory",
                needed,
                pages,
            )

    def add(self, request: Request) -> None:
        """Queue a request, before any that arrived later."""
        self.waiting.append(request)
        self.waiting.sort(key=lambda r: r.id)

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is, and give its pages back."""
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        self.manager.release(request)

    def admit(self) -> tuple[Request, Exception] | None:
        """Let waiting requests run while they can. Returns one that the cache refused, still waiting, and its error."""
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            if self.running and (self._prompt_is_coming(request) or not self._fits(request)):
                break
            try:
                self.manager.admit(request)
            except Exception as error:
                return request, error
            self.running.append(self.waiting.pop(0))
        return None

    def plan(self) -> list[Work]:
        """All running requests, oldest first: one row of those that decode, a chunk of the prompt of the others."""
        plan, budget = [], self.chunk_size
        for request in self.running:
            assert request.sequence is not None
            missing = len(request.tokens) - self.cache.length(request.sequence)
            rows = missing if missing == 1 else min(missing, budget)
            budget -= rows if missing > 1 else 0
            if rows:
                plan.append(Work(request, rows, missing - rows))
        return plan

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of prompts that have not been computed."""
        computed = sum(self.cache.length(r.sequence) for r in self.running if r.sequence and not r.generation.token_ids)
        new = (r for r in (*self.waiting, *self.running) if not r.generation.token_ids)
        return sum(request.prompt_length for request in new) - computed

    def make_room(self, plan: list[Work]) -> list[Work]:
        """The plan, or what fits of it: where pages run short, drafts are dropped first, then the newest requests wait.

        Raises CacheFull where the last one left does not fit: another user of the cache holds the pages.
        """
        if self._pages_needed(plan) <= self.cache.num_free_pages:
            return plan
        plan = without_drafts(plan)
        while (needed := self._pages_needed(plan)) > (free := self.cache.num_free_pages):
            if len(self.running) == 1:
                message = f"{needed} pages are needed and {free} are free: others than this engine hold the rest"
                raise _cache_full(message, needed, free)
            newest = self.running[-1]
            self.manager.preempt(newest)
            self.add(self.running.pop())
            plan = [work for work in plan if work.request is not newest]
        return plan

    def _prompt_is_coming(self, request: Request) -> bool:
        """Whether it is worth waiting for another text of the same prompt, which is still passing through."""
        leader = request.leader
        return leader is not None and leader in self.running and not leader.generation.token_ids

    def _fits(self, request: Request) -> bool:
        """Whether all running requests and this one find pages for their known tokens and a next one."""
        running = [r.sequence for r in self.running if r.sequence is not None]
        counts = [len(s.tokens) + 1 - self.cache.length(s) for s in running]
        needed = self.cache.pages_needed(running, counts) + self._pages_for(len(request.tokens) + 1)
        return needed <= self.cache.num_free_pages

    def _pages_needed(self, plan: Sequence[Work]) -> int:
        """Pages that the rows of a plan need beyond those their sequences hold."""
        rows = [max(1, work.cycles) * (work.rows + work.drafts.count) for work in plan]
        return self.cache.pages_needed(sequences(plan), rows)

    def _pages_for(self, length: int) -> int:
        return -(-length // self.cache.pool.page_size)


def _cache_full(message: str, needed: int, free: int) -> CacheFull:
    error = CacheFull(message)
    error.needed, error.free = needed, free
    return error
