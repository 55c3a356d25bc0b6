"""What the server counts, in Prometheus' text format. No label can take on more than a handful of values."""

from __future__ import annotations

from typing import Any

from retrv_r1_retriever.errors import missing_extra
from retrv_r1_retriever.types import RankedResults

#: Part of a reason -> its label; the first that fits. A test holds them against what the core writes.
REASONS = (
    ("timed out", "timeout"),
    ("the thought failed", "thought_failed"),
    ("no usable memory", "no_memory"),
    ("has usable memory", "no_memory"),
    ("could not be opened", "not_opened"),
    ("were not named", "not_named"),
    ("no candidates", "no_candidates"),
    ("nothing to rank", "no_candidates"),
    ("neither a text nor a picture", "blank_documents"),
)
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_TOKENS = ("prompt", "uncompressed", "sampled", "inspected")


def reason_label(reason: str | None) -> str:
    if reason is None:
        return "none"
    return next((label for words, label in REASONS if words in reason), "engine")


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
        counter, histogram, gauge = prometheus.Counter, prometheus.Histogram, prometheus.Gauge
        self.calls = counter("retrv_calls", "Calls answered, by HTTP status", ("route", "code"), **at)
        self.seconds = histogram("retrv_call_seconds", "Whole call", ("route",), buckets=_SECONDS, **at)
        self.waited = histogram("retrv_queue_seconds", "Waiting for a place in the model", buckets=_SECONDS, **at)
        self.stages = histogram("retrv_stage_seconds", "Stages of a call", ("stage",), buckets=_SECONDS, **at)
        self.results = counter("retrv_results", "Ranked lists, by who decided", ("route", "status", "reason"), **at)
        self.thoughts = counter("retrv_thoughts", "Lists the model thought about; / retrv_results = think share", **at)
        self.inspections = counter("retrv_inspections", "Candidates opened in full", **at)
        self.stale = counter("retrv_stale_memory", "Stored documents whose memory was missing or stale", **at)
        self.none_chosen = counter("retrv_none_chosen", "Lists of which the model chose none", **at)
        self.tokens = counter("retrv_tokens", "Tokens; uncompressed = with every candidate in full", ("kind",), **at)
        self.running = gauge("retrv_running", "Calls in the model", **at)
        self.waiting = gauge("retrv_waiting", "Calls waiting for it, or still arriving", **at)

    def count(self, results: RankedResults, route: str, reason: str, status: str, inline: int) -> None:
        """inline: documents that came with the call and can have no stored memory"""
        self.results.labels(route, status, reason).inc()
        self.none_chosen.inc(results.none_chosen)
        trace = results.trace
        if trace is None:
            return
        self.thoughts.inc("think" in trace.timings)
        self.inspections.inc(len(trace.inspected))
        self.stale.inc(max(0, trace.usage.stale_memories - inline))
        for kind in _TOKENS:
            self.tokens.labels(kind).inc(getattr(trace.usage, f"{kind}_tokens"))
        for stage, seconds in trace.timings.items():
            self.stages.labels(stage).observe(seconds)

    def text(self) -> bytes:
        exposition: bytes = self._exposition(self.registry)
        return exposition
