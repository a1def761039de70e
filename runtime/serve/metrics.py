"""What a server counts and times, under the names that dashboards of inference servers know."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STEP_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The metrics of one server, each with the label ``model_name``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        label, registry = ("model_name",), self.registry
        self.running = Gauge("zimg:num_requests_running", "Requests being drawn.", label, registry=registry)
        self._finished = Counter(
            "zimg:request_success", "Requests by how they ended.", (*label, "finished_reason"), registry=registry
        )
        self._refused = Counter("zimg:requests_refused", "Requests refused, by code.", ("code",), registry=registry)
        self._latency = Histogram(
            "zimg:e2e_request_latency_seconds", "From asked to done.", label, buckets=SECONDS, registry=registry
        )
        self._queued = Histogram(
            "zimg:request_queue_time_seconds", "From asked to begun.", label, buckets=SECONDS, registry=registry
        )
        self._step = Histogram(
            "zimg:step_time_seconds", "One step, both branches.", label, buckets=STEP_SECONDS, registry=registry
        )
        self._pictures = Counter("zimg:images_generated", "Pictures sent.", label, registry=registry)
        ProcessCollector(registry=registry)  # Memory, CPU seconds and open files of the process.

    def observe(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge that is asked when it is read."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def observe_count(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a count that is kept elsewhere, and asked when it is read."""
        self.registry.register(_Count(name, text, value))

    def begun(self, model: str, waited: float) -> None:
        """A request left the queue after so many seconds."""
        self.running.labels(model).inc()
        self._queued.labels(model).observe(waited)

    def stepped(self, model: str, seconds: float) -> None:
        """A step was taken."""
        self._step.labels(model).observe(seconds)

    def ended(self, model: str, outcome: str, seconds: float) -> None:
        """A request ended, ``"succeeded"``, ``"failed"`` or ``"cancelled"``, so many seconds after it was asked."""
        self.running.labels(model).dec()
        self._finished.labels(model, outcome).inc()
        if outcome == "succeeded":
            self._latency.labels(model).observe(seconds)

    def dropped(self, model: str) -> None:
        """A request was cancelled before it was begun."""
        self._finished.labels(model, "cancelled").inc()

    def refused(self, code: str) -> None:
        """A request was refused."""
        self._refused.labels(code).inc()

    def sent(self, model: str, pictures: int) -> None:
        """Pictures were sent."""
        self._pictures.labels(model).inc(pictures)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Count(Collector):
    """A counter whose value is kept elsewhere."""

    def __init__(self, name: str, text: str, value: Callable[[], float]) -> None:
        self._name, self._text, self._value = name, text, value

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Ask for it."""
        yield CounterMetricFamily(self._name, self._text, value=self._value())
