"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """Counters of one server, in a registry of its own. ``outcome``: ok, malformed, bad_request, failed, stale, lost."""

    def __init__(self) -> None:
        kept = self._registry = CollectorRegistry()
        self.warm = Gauge(
            "quantvla_warm", "1 once the engine is loaded and has run.", registry=kept
        )
        self.clients = Gauge("quantvla_clients", "Connected clients.", registry=kept)
        self.waiting = Gauge(
            "quantvla_requests_waiting", "Requests received and not yet answered.", registry=kept
        )
        self.requests = Counter(
            "quantvla_requests", "Requests by what became of them.", ["outcome"], registry=kept
        )
        self.refused = Counter(
            "quantvla_refused", "Connections refused, by reason.", ["reason"], registry=kept
        )
        self.received_bytes = Counter(
            "quantvla_received_bytes", "Bytes of requests.", registry=kept
        )
        self.infer = Histogram(
            "quantvla_infer_seconds", "Time in the engine.", buckets=_SECONDS, registry=kept
        )
        self.queue = Histogram(
            "quantvla_queue_seconds", "Wait before it.", buckets=_SECONDS, registry=kept
        )

    def text(self) -> bytes:
        """Return all of it in the text format that Prometheus scrapes."""
        return generate_latest(self._registry)
