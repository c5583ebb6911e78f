"""Who is preempted, how often, and by swapping or computing again: results never tell, so this is counted."""

import random

import pytest

from layerskip_kernels import Draft, Engine, GenerationConfig, verify_step
from layerskip_kernels.engine import preemption
from layerskip_kernels.engine.preemption import CacheManager
from layerskip_kernels.engine.request import Request
from support.generations import all_free
from support.models import cache_for, random_tokens, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = GenerationConfig("autoregressive")


class Watched(CacheManager):
    """Keeps what happened: ("admit", "preempt" or "release", the request's id, its tokens so far)."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.events = []

    def admit(self, request):
        super().admit(request)
        self.events.append(("admit", request.id, len(request.generation.token_ids)))

    def preempt(self, request):
        self.events.append(("preempt", request.id, len(request.generation.token_ids)))
        super().preempt(request)

    def release(self, request):
        self.events.append(("release", request.id, len(request.generation.token_ids)))
        super().release(request)


def crowded(monkeypatch, seed, config=PLAIN):
    """Random requests in little room, prompts in one piece; what happened to them."""
    monkeypatch.setattr("layerskip_kernels.engine.engine.CacheManager", Watched)
    rng, model = random.Random(seed), tiny_model(num_layers=2)
    engine = Engine(model, cache_for(model, 40, page_size=4), max_batch=6, chunk_size=64, drafts="fixed")
    for n in range(20):
        asked = GenerationConfig(config.strategy, config.exit_layer, max_new_tokens=rng.randint(1, 12))
        engine.add_request(random_tokens(rng.randint(1, 16), seed=n), asked)
    engine.run()
    assert all_free(engine)
    return engine._manager


@pytest.mark.parametrize("config", [PLAIN, GenerationConfig(exit_layer=1)], ids=["plain", "drafting"])
@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_admitted_only_to_be_preempted(monkeypatch, seed, config):
    """All that run have pages for their known tokens and a next one, so whoever is admitted gains something."""
    manager, admitted = crowded(monkeypatch, seed, config), {}
    for what, request_id, gained in manager.events:
        if what == "admit":
            admitted[request_id] = gained
        elif what == "preempt":
            assert gained > admitted[request_id]
    assert 0 < manager.stats.preemptions < 60


@pytest.mark.parametrize("seed", range(3))
def test_the_newest_is_preempted(monkeypatch, seed):
    running = set()
    for what, request_id, _ in crowded(monkeypatch, seed).events:
        if what == "admit":
            running.add(request_id)
            continue
        if what == "preempt":
            assert request_id == max(running)
        running.discard(request_id)


@pytest.mark.parametrize(("first", "second"), [((7, 2), (8, 3)), ((3, 2), (12, 2)), ((8, 5), (4, 9))])
def test_no_preemption_where_waiting_is_enough(first, second):
    """Four pages of four positions: the second does not fit beside the first, and the first never needs more."""
    model = tiny_model(num_layers=2)
    engine = Engine(model, cache_for(model, 16, page_size=4), drafts="fixed")
    for length, new in (first, second):
        engine.add_request(random_tokens(length), GenerationConfig("autoregressive", max_new_tokens=new))
    assert all(generation.finish_reason == "length" for generation in engine.run().values())
    assert engine.stats.preemptions == 0


# ---- swapping or computing again ----


def preempted(manager: CacheManager, length: int = 49) -> Request:
    """A request with so many positions in the cache, which are then taken."""
    [request] = Request.samples(manager.cache.model, PLAIN, random_tokens(length), None)
    manager.admit(request)
    manager.cache.commit(verify_step(manager.cache.model, manager.cache, Draft.none([request.sequence])))
    manager.preempt(request)
    assert manager.cache.num_free_pages == manager.cache.pool.num_pages
    return request


def manager_with(recompute_seconds, policy="auto") -> CacheManager:
    return CacheManager(cache_for(tiny_model(), 160), policy, None, recompute_seconds)


def one_way_seconds(manager: CacheManager, length: int) -> float:
    cache = manager.cache
    positions = cache.pool.num_pages * cache.pool.page_size
    return length * (cache.k.nbytes + cache.v.nbytes) / positions / manager.FIRST_RATE


@pytest.mark.parametrize(("times", "swaps"), [(1.5, False), (1.99, False), (2.01, True), (100, True)])
def test_swapping_costs_the_way_there_and_back(times, swaps):
    """Against the time of computing so many rows, which is so many times that of one way."""
    manager = manager_with(lambda rows: times * one_way_seconds(manager, rows))
    request = preempted(manager)
    assert (request.swapped is not None) == swaps == (manager.stats.swapped_out == 1)
    manager.release(request)


def test_before_anything_was_measured_it_swaps():
    assert preempted(manager_with(lambda _: None)).swapped is not None


@pytest.mark.parametrize(("policy", "swaps"), [("swap", True), ("recompute", False)])
@pytest.mark.parametrize("seconds", [1e-12, 1e12])
def test_a_policy_that_decides_asks_nobody(policy, swaps, seconds):
    assert (preempted(manager_with(lambda _: seconds, policy)).swapped is not None) == swaps


def test_slow_swaps_are_learnt_from(monkeypatch):
    """Each takes ten seconds: soon computing again, at a millisecond a row, is faster."""
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(preemption, "perf_counter", lambda: float(next(clock)))
    manager = manager_with(lambda rows: 1e-3 * rows)
    assert preempted(manager, 33).swapped is not None
    for _ in range(20):
        manager.release(preempted(manager, 33))
    assert 1 < manager.stats.swapped_out < 21
    assert preempted(manager, 33).swapped is None


def test_fast_swaps_are_learnt_from(monkeypatch):
    """A nanosecond each: in time swapping pays against rows that it did not pay against at first."""
    clock = [0.0]

    def now():
        clock[0] += 1e-9
        return clock[0]

    monkeypatch.setattr(preemption, "perf_counter", now)
    manager = manager_with(lambda rows: 1.5 * one_way_seconds(manager, rows))
    assert preempted(manager).swapped is None
    manager._preemption = "swap"
    manager.release(preempted(manager))
    manager._preemption = "auto"
    assert preempted(manager).swapped is not None
