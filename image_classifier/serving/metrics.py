"""What the server says of itself: a line a request in the log, and figures for Prometheus."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from image_classifier.serving.middleware import RequestRecord

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_MOST_CLASSES = 200  # with a figure of their own
OTHER = "(other)"

# A model, a figure of it, its distance from val, the limit, and of how many images.
Drift = tuple[str, str, float, float, int]


class ServerMetrics:
    """The figures, in a registry of their own."""

    def __init__(
        self, gauges: Callable[[], Iterable[tuple[str, dict[str, float]]]], drift: Callable[[], Iterable[Drift]]
    ) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "image_classifier"}
        self.requests = Counter(
            "requests", "Requests by route, method and status", ["route", "method", "status"], **own
        )
        self.seconds = Histogram(
            "request_seconds",
            "Seconds from the head of a request to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            **own,
        )
        self.received = Counter("received_bytes", "Bytes of all bodies", **own)
        self.batch = Histogram(
            "batch_images", "Images that were run together, counted for each of them", ["model"], buckets=_SIZES, **own
        )
        self.labels = Counter(
            "predictions", "Answers by their most probable class", ["model", "version", "label"], **own
        )
        self.abstentions = Counter("abstentions", "Answers that are no label", ["model", "version"], **own)
        self.unreadable = Counter("unreadable_images", "Images without an answer", ["model"], **own)
        self.confidence = Histogram(
            "confidence", "Probability of the most probable class", ["model"], buckets=_SHARES, **own
        )
        self.up = Gauge("up_since_seconds", "When the server started, seconds since 1970", **own)
        self.up.set(time.time())
        self._gauges, self._drift = gauges, drift
        self.registry.register(self)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """What is read when it is asked for: the state of each model."""
        help_text = {
            "queue_images": "Images that wait for their answer",
            "queue_limit_images": "How many may",
            "ready": "1 where the last canary was answered",
            "restarts": "How often the model's process had to be started again",
        }
        families = {
            name: GaugeMetricFamily(f"image_classifier_{name}", text, labels=["model"])
            for name, text in help_text.items()
        }
        for model, values in self._gauges():
            for name, value in values.items():
                families[name].add_metric([model], value)
        told = {
            "drift_distance": "Of the traffic from val, 0 to 1",
            "drift_limit": "Above it they are not alike",
            "drift_images": "Compared",
        }
        for name, text in told.items():
            families[name] = GaugeMetricFamily(f"image_classifier_{name}", text, labels=["model", "figure"])
        for model, figure, *numbers in self._drift():
            for name, number in zip(told, numbers, strict=True):
                families[name].add_metric([model, figure], number)
        return families.values()

    def answered(self, facts: dict[str, Any], answer: dict[str, Any], batch: int) -> None:
        """One image has its answer."""
        model, version = facts["name"], facts["version"]
        if "error" in answer:
            self.unreadable.labels(model).inc()
            return
        label = answer["predicted_class"] if len(facts["classes"]) <= _MOST_CLASSES else OTHER
        self.labels.labels(model, version, label).inc()
        self.confidence.labels(model).observe(answer["confidence"])
        self.batch.labels(model).observe(batch)
        if answer["decision"] != "label":
            self.abstentions.labels(model, version).inc()

    def seen(self, request: RequestRecord) -> None:
        """One request is over."""
        route = request.route or OTHER  # a path that nobody serves would make a figure each
        method = request.method if request.method in ("GET", "POST", "HEAD", "OPTIONS") else OTHER
        self.requests.labels(route, method, str(request.status)).inc()
        self.seconds.labels(route).observe(request.seconds)
        self.received.inc(request.bytes)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)


class LogWriter(Protocol):
    """Where a log goes."""

    def write(self, text: str, /) -> object: ...


class RequestLog:
    """A JSON line a request: when, who, what, how long. No content of an image, no key, no query."""

    def __init__(self, stream: LogWriter) -> None:
        self._stream = stream

    def __call__(self, request: RequestRecord) -> None:
        """Write one line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": request.request_id,
            "client": request.client,
            "method": request.method,
            "path": request.path,
            "status": request.status,
            "bytes": request.bytes,
            "images": request.images,
            "ms": round(1000 * request.seconds, 1),
        }
        self._stream.write(json.dumps(line | ({"key": request.key} if request.key else {})) + "\n")
