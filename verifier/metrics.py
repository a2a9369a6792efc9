"""What the verifier counts, for /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from verifier.pool import Pool

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class VerifierMetrics:
    """Counters, gauges and histograms in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.verdicts = Counter(
            "verifier_verdicts",
            "Verdicts given, by status and by what decided them.",
            ["status", "source"],
            registry=registry,
        )
        self.overloaded = Counter(
            "verifier_overloaded", "Requests refused because the queue was full.", registry=registry
        )
        self.queue_seconds = Histogram(
            "verifier_queue_seconds", "Time an item waited for a worker.", buckets=SECONDS, registry=registry
        )
        self.grading_seconds = Histogram(
            "verifier_grading_seconds", "Time a worker took for an item.", buckets=SECONDS, registry=registry
        )
        self._registry = registry

    def watch(self, pool: Pool) -> None:
        """Read the pool's state whenever the metrics are read."""
        self._gauge("verifier_queued", "Items that wait for a worker.").set_function(lambda: pool.queued)
        self._gauge("verifier_workers_busy", "Workers at work on an item.").set_function(lambda: pool.busy)
        self._gauge("verifier_workers_live", "Workers ready or at work.").set_function(lambda: pool.live)
        isolated = self._gauge("verifier_workers_isolated", "1 if the workers have no network.")
        isolated.set_function(lambda: float(pool.isolated))
        counters = pool.counters
        events = Gauge(
            "verifier_worker_events",
            "Workers started, killed at a limit, crashed, recycled, sent aside.",
            ["event"],
            registry=self._registry,
        )
        for event in ("started", "killed", "crashed", "recycled", "aside"):
            events.labels(event).set_function(lambda event=event: getattr(counters, event))

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self._registry)
