"""The settings of a server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from image_classifier.errors import ConfigError
from image_classifier.evaluation.reliability.abstention import DecisionSettings
from image_classifier.images import DecodeLimits
from image_classifier.inference.backends import NAMES, ServerAddress
from image_classifier.serving.auth import AccessSettings
from image_classifier.serving.drift_window import DriftSettings
from image_classifier.serving.model_sources import ModelSource, by_served_name, model_source
from image_classifier.serving.request_limits import RequestLimits
from image_classifier.serving.worker.batching import BatchSettings
from image_classifier.serving.worker.spec import ModelSpec
from image_classifier.sources.web import UrlLimits


@dataclass(frozen=True)
class FetchSettings:
    """The keys of `fetch`.

    Args:
        enabled: Whether the server fetches images by their URL, from public addresses only.
        timeout_s: Seconds without data.
        total_s: Seconds for one image.
        max_redirects: Redirects of one URL.
    """

    enabled: bool = False
    timeout_s: float = 5.0
    total_s: float = 15.0
    max_redirects: int = 3

    def __post_init__(self) -> None:
        self.url_limits()

    def url_limits(self) -> UrlLimits:
        """Return the limits of one download; the size of an image has a limit of its own."""
        return UrlLimits(timeout_s=self.timeout_s, total_s=self.total_s, max_redirects=self.max_redirects)


@dataclass(frozen=True)
class ServeSettings:
    """The keys of conf/serve.yaml, which explains them."""

    checkpoint_name: str
    models: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8080
    backend: str | None = None
    url: str | None = None
    server_timeout_s: float = 60.0
    threshold: float = 0.0
    queue: int = 256
    batch: BatchSettings = field(default_factory=BatchSettings)
    request: RequestLimits = field(default_factory=RequestLimits)
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    access: AccessSettings = field(default_factory=AccessSettings)
    fetch: FetchSettings = field(default_factory=FetchSettings)
    decision: DecisionSettings = field(default_factory=DecisionSettings)
    drift: DriftSettings = field(default_factory=DriftSettings)
    reload_s: float = 10.0
    canary_s: float = 2.5
    hang_s: float = 60.0
    drain_s: float = 30.0
    request_log: bool = True
    tracking_uri: str = "sqlite:///mlflow.db"
    models_dir: str = "models"
    dvc: bool | None = None
    trusted_packages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.backend not in (None, "auto", *NAMES):
            raise ConfigError(f"there is no backend {self.backend!r}", f"use one of {', '.join((*NAMES, 'auto'))}")
        self._server.check(self.backend)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"invalid port {self.port}", "expected 0 to 65535 (0: any free port)")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"invalid threshold {self.threshold}", "expected a confidence from 0 to 1, such as 0.8")
        if self.queue < self.request.max_images:
            raise ConfigError(
                f"queue={self.queue} is less than request.max_images={self.request.max_images}",
                "it must hold at least one request",
            )
        if min(self.canary_s, self.hang_s, self.drain_s) <= 0 or self.reload_s < 0:
            raise ConfigError("canary_s, hang_s and drain_s must be above 0, reload_s at least 0")
        if self.hang_s <= self.canary_s:
            raise ConfigError(f"hang_s={self.hang_s} must be above canary_s={self.canary_s}")

    @property
    def _server(self) -> ServerAddress:
        return ServerAddress(self.url, self.server_timeout_s)

    def model_sources(self) -> dict[str, ModelSource]:
        """Return the source of each model by its served name, the default model first."""
        checkpoints = [("", self.checkpoint_name), *self.models.items()]
        return by_served_name(
            (name, model_source(checkpoint, Path(self.models_dir), self.dvc, self.tracking_uri))
            for name, checkpoint in checkpoints
        )

    def model_spec(self, name: str, path: Path) -> ModelSpec:
        """Return what the worker process of one model must load."""
        return ModelSpec(
            name,
            str(path.resolve()),
            backend=self.backend,
            server=self._server,
            threshold=self.threshold,
            decision=self.decision,
            limits=self.limits,
            batch=self.batch,
            trusted=tuple(self.trusted_packages),
            decode_s=self.request.answer_s,
            hang_s=self.hang_s,
        )
