"""What a server counts. Plain integers on the hot path; Prometheus reads them only when it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(slots=True)
class Counters:
    """Totals since the start of one server."""

    received: int = 0  # messages of any kind
    accepted: int = 0  # requests whose work was admitted
    replies: int = 0  # replies of any kind handed to ZeroMQ
    malformed: int = 0  # messages that could not be understood
    oversized: int = 0  # messages beyond the soft limit
    version_mismatch: int = 0  # messages of an unknown major version
    duplicates: int = 0  # requests whose id was known
    replayed: int = 0  # replies sent again
    cancelled: int = 0  # requests taken back by clients
    early_cancels: int = 0  # cancels of unknown requests
    deadlines: int = 0  # requests stopped by their deadline
    stale: int = 0  # requests of an old term or incarnation
    overloaded: int = 0  # requests refused for lack of credit or room
    failed: int = 0  # requests that ended in a defect of their handler
    unreachable: int = 0  # replies to peers that are gone
    blocked: int = 0  # replies to peers that do not read
    lost_replies: int = 0  # replies given up for lack of memory


class _CountersCollector(Collector):
    def __init__(self, service: str, counters: Counters, gauges: Callable[[], dict[str, float]]) -> None:
        self._service = service
        self._counters = counters
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        for field in fields(Counters):
            metric = CounterMetricFamily(f"igrpo_wire_{field.name}", f"Wire: {field.name}", labels=["service"])
            metric.add_metric([self._service], getattr(self._counters, field.name))
            yield metric
        for name, value in self._gauges().items():
            gauge = GaugeMetricFamily(f"igrpo_wire_{name}", f"Wire: {name} now", labels=["service"])
            gauge.add_metric([self._service], value)
            yield gauge


def register(
    registry: CollectorRegistry, service: str, counters: Counters, gauges: Callable[[], dict[str, float]]
) -> Collector:
    """Export `counters` and `gauges()` (names to values) as igrpo_wire_*. Unregister the result in the end."""
    collector = _CountersCollector(service, counters, gauges)
    registry.register(collector)
    return collector
