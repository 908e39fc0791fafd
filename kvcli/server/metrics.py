"""What Prometheus reads: the engine's own numbers at the moment of asking, and times as clients see them."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvcli.engine.config import EngineStats
from kvcli.server.served import ServingEngine

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

GAUGES = {
    "queue_length": ("queued", "Sequences that wait, preempted ones too."),
    "running_sequences": ("running", "Sequences with a place in the cache."),
    "pages_total": ("pages_total", "Pages of the pool."),
    "pages_used": ("pages_used", "Pages that running sequences hold."),
    "pages_cached": ("pages_cached", "Pages that only the prefix cache holds; they can be taken at any time."),
    "page_tokens": ("page_tokens", "Tokens of a page."),
    "cache_bytes": ("cache_bytes", "Bytes allocated for the cache."),
    "swapped_bytes": ("swapped_bytes", "Bytes of sequences put aside, outside the pool."),
    "capacity_bytes": ("capacity_bytes", "Bytes of what is idle, packed again outside the pool."),
    "effective_bits": ("effective_bits", "Bits of a cached scalar at the longest context, everything counted."),
    "context_tokens": ("max_context", "Tokens of the longest sequence."),
}
COUNTERS = {
    "prompt_tokens": ("tokens_in", "Prompt tokens computed or found."),
    "generated_tokens": ("tokens_out", "Tokens generated."),
    "prefix_query_tokens": ("prefix_query_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_hit_tokens": ("prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
    "preemptions": ("preemptions", "Sequences put aside because pages ran out."),
    "demotions": ("demotions", "Idle pages packed again."),
    "promotions": ("promotions", "Pages packed again that were expanded."),
    "choices_finished": ("requests_finished", "Choices that came to their end."),
    "choices_aborted": ("requests_aborted", "Choices that were cut off."),
}


class _EngineNumbers(Collector):
    def __init__(self, engine: ServingEngine) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        stats: EngineStats = self._engine.stats()
        for name, (field, what) in GAUGES.items():
            yield GaugeMetricFamily(f"kvcli_{name}", what, getattr(stats, field))
        yield GaugeMetricFamily("kvcli_pages_free", "Pages that can be taken.", stats.pages_total - stats.pages_used)
        up = float(self._engine.failed is None)
        yield GaugeMetricFamily("kvcli_engine_up", "1, or 0 once the engine has failed.", up)
        for name, (field, what) in COUNTERS.items():
            yield CounterMetricFamily(f"kvcli_{name}", what, getattr(stats, field))


class Metrics:
    """One server's metrics, in a registry of their own.

    Parameters
    ----------
    engine
        Whose numbers to read.
    """

    def __init__(self, engine: ServingEngine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineNumbers(engine))
        self._first = Histogram(
            "kvcli_time_to_first_token_seconds", "From a request's arrival to the first token of each of its choices.",
            buckets=FIRST_TOKEN, registry=self._registry,
        )  # fmt: skip
        self._between = Histogram(
            "kvcli_inter_token_latency_seconds", "From one token of a choice to its next.",
            buckets=BETWEEN_TOKENS, registry=self._registry,
        )  # fmt: skip
        self._whole = Histogram(
            "kvcli_request_seconds", "From a request's arrival to its last token.",
            buckets=WHOLE, registry=self._registry,
        )  # fmt: skip
        self._http = Counter(
            "kvcli_http_requests", "Requests by endpoint and status.", ("endpoint", "status"), registry=self._registry
        )

    def token(self, now: float, last: float | None, arrival: float) -> None:
        """Count a token that came ``now``, after the choice's ``last`` one if there was one; seconds of one clock."""
        if last is None:
            self._first.observe(now - arrival)
        else:
            self._between.observe(now - last)

    def finished(self, seconds: float) -> None:
        """Count a whole request."""
        self._whole.observe(seconds)

    def response(self, endpoint: str, status: int) -> None:
        """Count a response."""
        self._http.labels(endpoint, str(status)).inc()

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)
