"""Figures for Prometheus, under the names that dashboards of other servers know."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from layerskip_kernels.decoding.kv_cache import CacheStats
from layerskip_kernels.engine.request import Generation, Output

__all__ = ["Metrics"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PREFIX = "layerskip:"


class Metrics:
    """One server's figures. ``observe`` is called with every output; the rest is read when it is asked for."""

    def __init__(self, cache_stats: Callable[[], CacheStats], preemptions: Callable[[], int]) -> None:
        self._cache_stats = cache_stats
        self._preemptions = preemptions
        self.registry = CollectorRegistry()
        self._started: dict[int, float] = {}
        self._last: dict[int, float] = {}

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=SECONDS, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(PREFIX + name, text, registry=self.registry)

        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self._generation_tokens = counter("generation_tokens", "Tokens generated")
        self._success = counter("request_success", "Requests that ended, by reason", ("finished_reason",))
        self._drafts = counter("spec_decode_num_drafts", "Verifications that had drafts")
        self._draft_tokens = counter("spec_decode_num_draft_tokens", "Tokens drafted")
        self._accepted_tokens = counter("spec_decode_num_accepted_tokens", "Drafted tokens accepted")
        self._accepted_at = counter("spec_decode_num_accepted_tokens_per_pos", "Accepted, by place", ("position",))
        self._first = histogram("time_to_first_token_seconds", "From a request to its first token")
        self._between = histogram("inter_token_latency_seconds", "Between tokens")
        self._whole = histogram("e2e_request_latency_seconds", "From a request to its end")
        self._running = gauge("num_requests_running", "Requests that gain tokens")
        self._waiting = gauge("num_requests_waiting", "Requests without a first token")
        self._usage = gauge("kv_cache_usage_perc", "Share of the cache's pages that sequences own, 0 to 1")
        self._queries = gauge("prefix_cache_queries", "Prompt tokens looked up in the cache")
        self._hits = gauge("prefix_cache_hits", "Prompt tokens found in the cache")
        self._preempted = gauge("num_preemptions", "Requests that gave up their pages to others")

    def begin(self, request_id: int) -> None:
        self._started[request_id] = monotonic()

    def observe(self, output: Output) -> None:
        now, id_ = monotonic(), output.request_id
        if output.tokens and id_ in self._started:
            if id_ in self._last:
                self._between.observe((now - self._last[id_]) / len(output.tokens))
            else:
                self._first.observe(now - self._started[id_])
            self._last[id_] = now
        if output.drafts:
            self._drafts.inc()
            self._draft_tokens.inc(len(output.drafts))
            self._accepted_tokens.inc(output.num_accepted)
            for position in range(output.num_accepted):
                self._accepted_at.labels(position).inc()
        if output.generation is not None:
            self._end(id_, output.generation, now)

    def _end(self, request_id: int, generation: Generation, now: float) -> None:
        self._prompt_tokens.inc(generation.prompt_length if generation.sample == 0 else 0)
        self._generation_tokens.inc(len(generation.token_ids))
        self._success.labels(generation.finish_reason).inc()
        self._last.pop(request_id, None)
        if (started := self._started.pop(request_id, None)) is not None:
            self._whole.observe(now - started)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        stats = self._cache_stats()
        pages = stats.num_free + stats.num_cached + stats.num_owned
        self._running.set(len(self._last))
        self._waiting.set(len(self._started) - len(self._last))
        self._usage.set(stats.num_owned / pages if pages else 0.0)
        self._queries.set(stats.queried_tokens)
        self._hits.set(stats.hit_tokens)
        self._preempted.set(self._preemptions())
        return generate_latest(self.registry)
