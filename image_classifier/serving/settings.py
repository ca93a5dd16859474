"""The verb `serve`: models behind HTTP, ready when each has really answered, ended when the last answer is out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from image_classifier.cli import hydra_app
from image_classifier.errors import ConfigError
from image_classifier.evaluation.reliability.abstention import DecisionSettings
from image_classifier.images import DecodeLimits
from image_classifier.inference.backends import NAMES, ServerAddress
from image_classifier.serving.async_log import async_logging
from image_classifier.serving.auth import AccessPolicy, AccessSettings, is_loopback
from image_classifier.serving.drift_window import DriftSettings, DriftWindow
from image_classifier.serving.model_sources import ModelSource, model_source
from image_classifier.serving.request_limits import RequestLimits
from image_classifier.serving.worker.batching import BatchSettings
from image_classifier.serving.worker.handle import WorkerProcess
from image_classifier.serving.worker.spec import ModelSpec, served_name
from image_classifier.sources.web import UrlLimits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchSettings(UrlLimits):
    """The keys of `fetch`: whether addresses in requests are fetched, from public addresses only, and within which limits."""

    enabled: bool = False
    timeout_s: float = 5.0
    total_s: float = 15.0
    max_redirects: int = 3


@dataclass(frozen=True)
class ServeSettings:
    """The keys of conf/serve.yaml."""

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
        ServerAddress(self.url, self.server_timeout_s).check(self.backend)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} cannot be", "it is a number from 0 (any that is free) to 65535")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold} cannot be", "it is a confidence from 0 to 1, such as 0.8")
        if self.queue < self.request.max_images:
            raise ConfigError(
                f"queue={self.queue} is less than one request of request.max_images={self.request.max_images}"
            )
        if min(self.canary_s, self.hang_s, self.drain_s) <= 0 or self.reload_s < 0:
            raise ConfigError("canary_s, hang_s and drain_s must be above 0, reload_s at least 0")
        if self.hang_s <= self.canary_s:
            raise ConfigError(f"hang_s={self.hang_s} must be above canary_s={self.canary_s}")

    def order(self, name: str, path: Path) -> ModelSpec:
        """What the process of one model is told."""
        server = ServerAddress(self.url, self.server_timeout_s)
        trusted = tuple(self.trusted_packages)
        return ModelSpec(
            name,
            str(path.resolve()),
            self.backend,
            server,
            self.threshold,
            self.decision,
            self.limits,
            self.batch,
            trusted,
            self.request.answer_s,
            self.hang_s,
        )


def serve(config: Any) -> None:
    """Serve until SIGINT or SIGTERM; then finish what was begun."""
    asked = hydra_app.typed(ServeSettings, config, "")
    access = AccessPolicy(asked.access, asked.host)
    with contextlib.ExitStack() as stack:
        stack.callback(
            signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_IGN)
        )  # until there is something to look at again
        listening = stack.enter_context(_listening(asked.host, asked.port))
        if not access.needs_key and not is_loopback(asked.host):
            log.warning("everyone who can reach %s may ask: access.keys_file=FILE asks for a key", asked.host)
        places = _places(asked)
        orders = [asked.order(name, place.find()) for name, place in places.items()]
        started = [
            (order, WorkerProcess(order.as_dict())) for order in orders
        ]  # they load while the server is imported
        for _, process in started:
            stack.callback(process.kill)
        from image_classifier.serving.registry import ModelRegistry, Reloader
        from image_classifier.serving.server import make_gateway, serve_until

        models, told = ModelRegistry(started, asked.queue, asked.hang_s, asked.canary_s), ShutdownSignal()
        stack.enter_context(told.listening())
        traffic = DriftWindow(asked.drift)
        stack.callback(traffic.close)
        with async_logging() as log_to:  # until after the last request, which may be ended by the loop's own end
            fence = make_gateway(asked, access, models, traffic, log_to, told.ended.is_set)
            reloader = Reloader(models, places, asked.reload_s)
            try:
                asyncio.run(serve_until(told, asked, fence, models, reloader, listening))
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None
            finally:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the loop has given it back


def _places(asked: ServeSettings) -> dict[str, ModelSource]:
    """Where each model comes from, under the name by which requests ask for it."""
    places: dict[str, ModelSource] = {}
    for given, where in [("", asked.checkpoint_name), *asked.models.items()]:
        place = model_source(where, Path(asked.models_dir), asked.dvc, asked.tracking_uri)
        name = served_name(given or place.name)
        if name in places:
            raise ConfigError(
                f"two models would be served as {name!r}", "give the other its own name: models.NAME=CHECKPOINT"
            )
        places[name] = place
    return places


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens; ConfigError where it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(
            f"host={host!r} is no address of this machine ({error.strerror})", "use 127.0.0.1, or 0.0.0.0 for all"
        ) from error
    with found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {host}:{port} ({error.strerror})", "choose another --port, 0 takes one that is free"
            ) from error
        yield found


class ShutdownSignal:
    """What SIGINT and SIGTERM said: `ended` is set by the first, `hurry` called by a Ctrl-C after it."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.hurry: Callable[[], object] = lambda: None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear them; the program then ends with 0, as it was told to."""
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.ended.is_set() and number == signal.SIGINT:
            self.hurry()
        self.ended.set()
