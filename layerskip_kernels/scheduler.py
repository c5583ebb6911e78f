"""Who runs in the next step, and who has to wait when pages run short."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from functools import cached_property

from layerskip_kernels.costs import Wish
from layerskip_kernels.errors import CacheFull
from layerskip_kernels.kv_cache import Sequence
from layerskip_kernels.places import Places
from layerskip_kernels.request import Request
from layerskip_kernels.sampling import Sampler

__all__ = ["Plan", "Scheduler"]


@dataclass
class Plan:
    """The requests of a step, oldest first.

    ``counts``: for each what Draft.num_tokens says, a number of tokens to draft, or a negative one for a chunk of a
    prompt that leaves so many known tokens for later; ``rows``: how many known tokens go through the model.
    """

    requests: list[Request] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def add(self, request: Request, count: int, rows: int) -> None:
        self.requests.append(request)
        self.counts.append(count)
        self.rows.append(rows)

    def only(self, chosen: ListLike[int]) -> Plan:
        """The part of the plan at some places."""
        return Plan(
            [self.requests[i] for i in chosen], [self.counts[i] for i in chosen], [self.rows[i] for i in chosen]
        )

    def with_drafts(self, drafts: ListLike[int]) -> Plan:
        """The plan with so many drafts of each that decodes."""
        counts = self.counts.copy()
        for i, count in zip(self.decoding, drafts, strict=True):
            counts[i] = count
        return Plan(self.requests, counts, self.rows)

    def without_drafts(self) -> Plan:
        return Plan(self.requests, [min(count, 0) for count in self.counts], self.rows)

    @cached_property
    def decoding(self) -> list[int]:
        """The places of those that have gained tokens and may draft; the others bring in their prompts."""
        return [
            i
            for i, request in enumerate(self.requests)
            if self.rows[i] == 1 and self.counts[i] >= 0 and request.generation.token_ids
        ]

    @property
    def wishes(self) -> list[Wish]:
        """What those that decode may draft."""
        decoding = [self.requests[i] for i in self.decoding]
        return [Wish(request.exit_layer, request.max_drafts, request.evidence) for request in decoding]

    @property
    def prompt_rows(self) -> tuple[int, int]:
        """Rows of prompts, and how many of these prompts are complete with them: as Rows counts them."""
        decoding = set(self.decoding)
        prompts = [i for i in range(len(self.rows)) if i not in decoding]
        return sum(self.rows[i] for i in prompts), sum(self.counts[i] == 0 for i in prompts)

    @property
    def sequences(self) -> list[Sequence]:
        return [request.sequence for request in self.requests if request.sequence is not None]

    @property
    def samplers(self) -> list[Sampler | None]:
        return [request.sampler for request in self.requests]


class Scheduler:
    """Requests waiting and running, first come, first served: nobody overtakes, and the oldest always proceeds.

    ``chunk_size``: the rows of prompts in one step, all requests together.
    """

    def __init__(self, places: Places, max_batch: int, chunk_size: int) -> None:
        self.places = places
        self.cache = places.cache
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
        """Let a request wait for its turn, which comes before that of any that arrived later."""
        self.waiting.append(request)
        self.waiting.sort(key=lambda r: r.id)

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is, and give its pages back."""
        if request in self.waiting:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
        self.places.leave(request)

    def admit(self) -> tuple[Request, Exception] | None:
        """Let in who can run. Returns, still waiting, one that the cache would not take, and its error."""
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            if self.running and (self._prompt_is_coming(request) or not self._fits(request)):
                break
            try:
                self.places.enter(request)
            except Exception as error:
                return request, error
            self.running.append(self.waiting.pop(0))
        return None

    def plan(self) -> Plan:
        """Everybody who runs: one row of those that decode, a chunk of the prompt of the others."""
        plan, budget = Plan(), self.chunk_size
        for request in self.running:
            assert request.sequence is not None
            left = len(request.tokens) - self.cache.length(request.sequence)
            rows = left if left == 1 else min(left, budget)
            budget -= rows if left > 1 else 0
            if rows:
                plan.add(request, rows - left, rows)
        return plan

    def make_room(self, plan: Plan) -> Plan:
        """The plan, or what is left of it when pages run short: first drafts go, then the newest requests wait."""
        if self._pages_needed(plan) <= self.cache.num_free_pages:
            return plan
        plan = plan.without_drafts()
        while (needed := self._pages_needed(plan)) > (free := self.cache.num_free_pages):
            if len(self.running) == 1:
                message = f"{needed} pages are needed and {free} are free: others than this engine hold the rest"
                raise _cache_full(message, needed, free)
            newest = self.running[-1]
            self.places.preempt(newest)  # it runs until its pages are free, should that be interrupted
            self.add(self.running.pop())
            plan = plan.only([i for i, request in enumerate(plan.requests) if request is not newest])
        return plan

    def _prompt_is_coming(self, request: Request) -> bool:
        """Whether it is worth waiting for another text of the same prompt, which is still going through."""
        leader = request.leader
        return leader is not None and leader in self.running and not leader.generation.token_ids

    def _fits(self, request: Request) -> bool:
        """Whether everybody, this one included, finds pages for all tokens known and a next one."""
        sequences = [r.sequence for r in self.running if r.sequence is not None]
        counts = [len(s.tokens) + 1 - self.cache.length(s) for s in sequences]
        needed = self.cache.pages_needed(sequences, counts) + self._pages_for(len(request.tokens) + 1)
        return needed <= self.cache.num_free_pages

    def _pages_needed(self, plan: Plan) -> int:
        """Pages that the rows of a plan need beyond those their sequences hold."""
        sequences = plan.sequences
        drafts = [max(count, 0) for count in plan.counts]
        return self.cache.pages_needed(sequences, [r + d for r, d in zip(plan.rows, drafts, strict=True)])

    def _pages_for(self, length: int) -> int:
        return -(-length // self.cache.pool.page_size)


def _cache_full(message: str, needed: int, free: int) -> CacheFull:
    error = CacheFull(message)
    error.needed, error.free = needed, free
    return error
