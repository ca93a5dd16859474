"""What all routes share."""

from __future__ import annotations

from dataclasses import dataclass

from image_classifier.serving.drift_window import DriftWindow
from image_classifier.serving.metrics import ServerMetrics
from image_classifier.serving.registry import ModelRegistry
from image_classifier.serving.request_limits import RequestLimits
from image_classifier.serving.uploads import Uploads


@dataclass
class AppState:
    """The models, and what a route needs to answer with them.

    Args:
        models: The served models.
        uploads: Reads the images of a request.
        metrics: The metrics.
        drift_window: The recent answers.
        limits: Limits of a request.
        urls: Whether images may be given by their URL.
        explaining: The number of explanations that are being computed.
    """

    models: ModelRegistry
    uploads: Uploads
    metrics: ServerMetrics
    drift_window: DriftWindow
    limits: RequestLimits
    urls: bool
    explaining: int = 0
