"""Metrics for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from image_classifier.evaluation.drift import Shift
from image_classifier.serving.request_log import RequestRecord

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_MAX_CLASSES = 200  # a model with more classes gets no counter for each of them
_METHODS = ("GET", "POST", "HEAD", "OPTIONS")
OTHER = "(other)"

_MODEL_GAUGES = {
    "queue_images": "Images that wait for an answer",
    "queue_limit_images": "Maximum number of images that may wait",
    "ready": "1 if the last canary was answered correctly",
    "restarts": "How often the worker process was restarted",
}
_DRIFT_GAUGES = {
    "drift_distance": "Distance of the recent answers from the validation split, 0 to 1",
    "drift_limit": "Drift is reported above this distance",
    "drift_images": "Number of recent answers that are compared",
}

ModelGauges = Callable[[], Iterable[tuple[str, dict[str, float]]]]  # a model's name and its gauges
ModelShifts = Callable[[], Iterable[tuple[str, Shift]]]  # a model's name and the shift of one figure


class ServerMetrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self, gauges: ModelGauges, shifts: ModelShifts) -> None:
        self._gauges = gauges
        self._shifts = shifts
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry, "namespace": "image_classifier"}
        self.requests = Counter(
            "requests", "Requests by route, method and status", ["route", "method", "status"], **common
        )
        self.seconds = Histogram(
            "request_seconds",
            "Seconds from the head of a request to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            **common,
        )
        self.received = Counter("received_bytes", "Bytes of all request bodies", **common)
        self.batch = Histogram(
            "batch_images", "Size of the batch in which an image was run", ["model"], buckets=_SIZES, **common
        )
        self.labels = Counter("predictions", "Answers by predicted class", ["model", "version", "label"], **common)
        self.abstentions = Counter("abstentions", "Answers that abstain", ["model", "version"], **common)
        self.unreadable = Counter("unreadable_images", "Images that cannot be read", ["model"], **common)
        self.confidence = Histogram(
            "confidence", "Probability of the predicted class", ["model"], buckets=_SHARES, **common
        )
        self.up = Gauge("up_since_seconds", "When the server started, in seconds since 1970", **common)
        self.up.set(time.time())
        self.registry.register(self)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the gauges that are computed when they are read: the state of each model."""
        families = {
            name: GaugeMetricFamily(f"image_classifier_{name}", text, labels=["model"])
            for name, text in _MODEL_GAUGES.items()
        }
        families |= {
            name: GaugeMetricFamily(f"image_classifier_{name}", text, labels=["model", "figure"])
            for name, text in _DRIFT_GAUGES.items()
        }
        for model, values in self._gauges():
            for name, value in values.items():
                families[name].add_metric([model], value)
        for model, shift in self._shifts():
            for name, value in zip(_DRIFT_GAUGES, (shift.distance, shift.limit, shift.images), strict=True):
                families[name].add_metric([model, shift.figure], value)
        return families.values()

    def count_answer(self, metadata: dict[str, Any], answer: dict[str, Any], batch: int) -> None:
        """Count the answer for one image, which was run in a batch of this size."""
        model = metadata["name"]
        version = metadata["version"]
        if "error" in answer:
            self.unreadable.labels(model).inc()
            return
        label = answer["predicted_class"] if len(metadata["classes"]) <= _MAX_CLASSES else OTHER
        self.labels.labels(model, version, label).inc()
        self.confidence.labels(model).observe(answer["confidence"])
        self.batch.labels(model).observe(batch)
        if answer["decision"] != "label":
            self.abstentions.labels(model, version).inc()

    def count_request(self, record: RequestRecord) -> None:
        """Count one finished request."""
        # Clients choose paths and methods: unknown ones share a label, so that the number of time series is bounded.
        route = record.route or OTHER
        method = record.method if record.method in _METHODS else OTHER
        self.requests.labels(route, method, str(record.status)).inc()
        self.seconds.labels(route).observe(record.seconds)
        self.received.inc(record.bytes)

    def render(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
