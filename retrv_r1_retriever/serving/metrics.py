"""What the server counts, in Prometheus' text format. No label can take on more than a handful of values."""

from __future__ import annotations

from typing import Any

from retrv_r1_retriever.errors import missing_extra
from retrv_r1_retriever.measures import CALL_SECONDS, OF_RESULTS, SECONDS, Measure, counted
from retrv_r1_retriever.types import RankedResults


class Metrics:
    """Of one server; every server has a registry of its own."""

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise missing_extra("prometheus-client", "serve") from error
        self._exposition = prometheus.generate_latest
        self.content_type: str = prometheus.CONTENT_TYPE_LATEST
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)
        at: dict[str, Any] = {"registry": self.registry}
        self._kinds: dict[str, Any] = {"counter": prometheus.Counter, "histogram": prometheus.Histogram}
        counter, histogram, gauge = prometheus.Counter, prometheus.Histogram, prometheus.Gauge
        self.calls = counter("retrv_calls", "Calls answered, by HTTP status", ("route", "code"), **at)
        self.seconds = self._instrument(CALL_SECONDS)
        self.waited = histogram("retrv_queue_seconds", "Waiting for a place in the model", buckets=SECONDS, **at)
        self._of_results = {measure: self._instrument(measure) for measure in OF_RESULTS}
        self.running = gauge("retrv_running", "Calls in the model", **at)
        self.waiting = gauge("retrv_waiting", "Calls waiting for it, or still arriving", **at)

    def count(self, results: RankedResults, route: str, reason: str, status: str, inline: int) -> None:
        """inline: documents that came with the call and can have no stored memory"""
        for measure, amount, labels in counted(results, route, reason, status, inline):
            instrument = self._of_results[measure]
            instrument = instrument.labels(*labels) if labels else instrument
            (instrument.inc if measure.kind == "counter" else instrument.observe)(amount)

    def _instrument(self, measure: Measure) -> Any:
        buckets: dict[str, Any] = {"buckets": SECONDS} if measure.kind == "histogram" else {}
        make = self._kinds[measure.kind]
        return make(measure.name, measure.words, measure.labels, registry=self.registry, **buckets)

    def text(self) -> bytes:
        exposition: bytes = self._exposition(self.registry)
        return exposition
