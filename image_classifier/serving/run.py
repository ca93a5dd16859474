"""The verb `serve`: models behind HTTP, ready when each has really answered, ended when the last answer is out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from image_classifier import settings
from image_classifier.errors import ConfigError
from image_classifier.evaluation.decision import DecisionSettings
from image_classifier.images import DecodeLimits
from image_classifier.inference.backends import NAMES, ServerAt
from image_classifier.inference.urls import UrlLimits, Web
from image_classifier.serving.access import Access, AccessSettings, is_loopback
from image_classifier.serving.batches import BatchSettings
from image_classifier.serving.limits import Bodies, RequestLimits
from image_classifier.serving.order import Order, served_name
from image_classifier.serving.places import Place, place_of
from image_classifier.serving.process import Started
from image_classifier.serving.traffic import DriftSettings, Traffic

if TYPE_CHECKING:
    from image_classifier.serving.models import Models

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
        ServerAt(self.url, self.server_timeout_s).fits(self.backend)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} cannot be", "it is a number from 0 (any that is free) to 65535")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold} cannot be", "it is a confidence from 0 to 1, such as 0.8")
        if self.queue < self.request.max_images:
            raise ConfigError(f"queue={self.queue} is less than one request of request.max_images={self.request.max_images}")
        if min(self.canary_s, self.hang_s, self.drain_s) <= 0 or self.reload_s < 0:
            raise ConfigError("canary_s, hang_s and drain_s must be above 0, reload_s at least 0")
        if self.hang_s <= self.canary_s:
            raise ConfigError(f"hang_s={self.hang_s} must be above canary_s={self.canary_s}")

    def order(self, name: str, path: Path) -> Order:
        """What the process of one model is told."""
        server = ServerAt(self.url, self.server_timeout_s)
        trusted = tuple(self.trusted_packages)
        return Order(
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
    asked = settings.typed(ServeSettings, config, "")
    access = Access(asked.access, asked.host)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listening(asked.host, asked.port))
        if not access.needs_key and not is_loopback(asked.host):
            log.warning("everyone who can reach %s may ask: access.keys_file=FILE asks for a key", asked.host)
        places = _places(asked)
        orders = [asked.order(name, place.find()) for name, place in places.items()]
        started = [(order, Started(order.as_dict())) for order in orders]  # they load while the server is imported
        for _, process in started:
            stack.callback(process.kill)
        from image_classifier.serving.models import Models

        models = Models(started, asked.queue, asked.hang_s, asked.canary_s)
        told = _Told()
        with told.listening():
            try:
                asyncio.run(_serve(asked, access, models, places, listening, told))
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None


def _places(asked: ServeSettings) -> dict[str, Place]:
    """Where each model comes from, under the name by which requests ask for it."""
    places: dict[str, Place] = {}
    for given, where in [("", asked.checkpoint_name), *asked.models.items()]:
        place = place_of(where, Path(asked.models_dir), asked.dvc, asked.tracking_uri)
        name = served_name(given or place.name)
        if name in places:
            raise ConfigError(f"two models would be served as {name!r}", "give the other its own name: models.NAME=CHECKPOINT")
        places[name] = place
    return places


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens; ConfigError where it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host={host!r} is no address of this machine ({error.strerror})", "use 127.0.0.1, or 0.0.0.0 for all") from error
    with found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
        except OSError as error:
            raise ConfigError(f"cannot listen at {host}:{port} ({error.strerror})", "choose another --port, 0 takes one that is free") from error
        yield found


class _Told:
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


async def _serve(asked: ServeSettings, access: Access, models: Models, places: Mapping[str, Place], listening: socket.socket, told: _Told) -> None:
    import uvicorn

    from image_classifier.serving import protocol
    from image_classifier.serving.answers import Parts
    from image_classifier.serving.app import make_app
    from image_classifier.serving.fence import Fence, Seen
    from image_classifier.serving.models import Reloader
    from image_classifier.serving.observe import Metrics, RequestLog
    from image_classifier.serving.uploads import Uploads

    traffic = Traffic(asked.drift)
    metrics = Metrics(lambda: _gauges(models), lambda: [(served.order.name, *row) for served in models for row in traffic.figures(served.order.name)])
    web = Web(asked.fetch) if asked.fetch.enabled else None
    uploads = Uploads(asked.request, web, asked.limits.max_bytes)
    app = make_app(Parts(models, uploads, metrics, traffic, asked.request, asked.fetch.enabled), access.needs_key)
    request_log = RequestLog() if asked.request_log else None

    def tell(request: Seen) -> None:
        metrics.seen(request)
        if request_log is not None:
            request_log(request)

    fence = Fence(app, access, Bodies(asked.request), tell, told.ended.is_set)
    options = protocol.arguments(asked.request)
    config = uvicorn.Config(
        fence,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(asked.drain_s + 0.5) or 1,
        **options,
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            _say(models, listening)

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # `_Told` does, also while models are loaded and ended

    server, reloader = Server(config), Reloader(models, places, asked.reload_s)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloader.now.set)  # from now on all signals wake the loop
    if (main := asyncio.current_task()) is not None:
        told.hurry = main.cancel
    async with _running(models, told.ended) as are_running, asyncio.TaskGroup() as group:
        if not are_running:
            return
        looking = group.create_task(reloader.run())
        asking = group.create_task(models.keep_asking())
        ending = group.create_task(_end(server, told.ended))
        await server.serve([listening])
        told.ended.set()
        for task in (looking, asking, ending):
            task.cancel()
        uploads.stop()


@asynccontextmanager
async def _running(models: Models, ended: asyncio.Event) -> AsyncIterator[bool]:
    """Models that answer; false where the program was told to end before they did."""
    starting, ending = asyncio.ensure_future(models.start()), asyncio.ensure_future(ended.wait())
    try:
        await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
        yield starting.done()
    finally:
        for task in (starting, ending):
            task.cancel()
        await asyncio.gather(starting, ending, return_exceptions=True)
        await models.stop()


async def _end(server: Any, ended: asyncio.Event) -> None:
    await ended.wait()
    log.info("no new requests are taken, those that were begun are finished")
    server.should_exit = True


def _gauges(models: Models) -> Iterator[tuple[str, dict[str, float]]]:
    for served in models:
        handle = served.handle
        state = {
            "queue_images": handle.waiting,
            "queue_limit_images": handle.most,
            "ready": float(not served.known_trouble),
            "restarts": handle.restarts,
        }
        yield served.order.name, state


def _say(models: Models, listening: socket.socket) -> None:
    host, port = listening.getsockname()[:2]
    for served in models:
        facts = served.handle.facts
        log.info("model     %s %s, %d classes, backend %s", facts["name"], facts["version"], len(facts["classes"]), facts["backend"])
    shown = f"[{host}]" if ":" in host else host
    print(f"serving   http://{shown}:{port}", flush=True)
