"""Figures for Prometheus, under the names that dashboards of other servers know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from layerskip_kernels.decoding.kv_cache import CacheStats
from layerskip_kernels.engine.request import Generation, Output

__all__ = ["Metrics"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PREFIX = "layerskip:"


class Metrics:
    """One server's figures: ``begin`` notes a request, ``observe`` every output; the rest is read when asked for."""

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
        self.registry.register(self)

    def begin(self, request_id: int, arrived: float) -> None:
        """``arrived``: by the monotonic clock. Before any output of the request is observed."""
        self._started[request_id] = arrived

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

    def collect(self) -> Iterator[Metric]:
        """What is read, not counted here."""
        stats = self._cache_stats()
        pages = stats.num_free + stats.num_cached + stats.num_owned
        used = stats.num_owned / pages if pages else 0.0
        running = len(self._last)
        for name, text, value in (
            ("num_requests_running", "Requests that gain tokens", running),
            ("num_requests_waiting", "Requests without a first token", len(self._started) - running),
            ("kv_cache_usage_perc", "Share of the cache's pages that sequences own, 0 to 1", used),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the cache", stats.queried_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the cache", stats.hit_tokens),
            ("num_preemptions", "Requests that gave up their pages to others", self._preemptions()),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value=value)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
