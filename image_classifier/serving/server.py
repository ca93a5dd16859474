"""The server: the application in uvicorn, from the first answer of all models to the last answer after a signal."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType

import uvicorn

from image_classifier.evaluation.drift import Shift
from image_classifier.serving import http_protocol
from image_classifier.serving.app import make_app
from image_classifier.serving.app_state import AppState
from image_classifier.serving.auth import AccessPolicy
from image_classifier.serving.drift_window import DriftWindow
from image_classifier.serving.metrics import ServerMetrics
from image_classifier.serving.middleware import GatewayMiddleware
from image_classifier.serving.registry import ModelRegistry, Reloader
from image_classifier.serving.request_limits import BodyReader
from image_classifier.serving.request_log import LogWriter, RequestLog, RequestRecord
from image_classifier.serving.settings import ServeSettings
from image_classifier.serving.uploads import Uploads
from image_classifier.sources.web import WebClient

log = logging.getLogger(__name__)


class ShutdownSignal:
    """SIGINT and SIGTERM: the first sets `requested`; a Ctrl-C after that calls `on_second_interrupt`."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.on_second_interrupt: Callable[[], object] = lambda: None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals while the block runs; the process does not end by them."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested.is_set() and number == signal.SIGINT:
            self.on_second_interrupt()
        self.requested.set()


def make_gateway(
    settings: ServeSettings,
    access: AccessPolicy,
    models: ModelRegistry,
    drift_window: DriftWindow,
    log_stream: LogWriter,
    stopping: Callable[[], bool],
) -> GatewayMiddleware:
    """Return the complete ASGI application: the routes inside the gateway."""
    web = WebClient(settings.fetch.url_limits()) if settings.fetch.enabled else None
    uploads = Uploads(settings.request, web, settings.limits.max_bytes)
    metrics = ServerMetrics(lambda: _gauges(models), lambda: _shifts(models, drift_window))
    state = AppState(models, uploads, metrics, drift_window, settings.request, settings.fetch.enabled)
    app = make_app(state, access.needs_key)
    request_log = RequestLog(log_stream) if settings.request_log else None

    def on_done(record: RequestRecord) -> None:
        metrics.count_request(record)
        if request_log is not None:
            request_log(record)

    return GatewayMiddleware(
        app, access, BodyReader(settings.request), on_done, stopping, lambda: app.openapi()["paths"]
    )


async def serve_until(
    shutdown: ShutdownSignal,
    settings: ServeSettings,
    gateway: GatewayMiddleware,
    models: ModelRegistry,
    reloader: Reloader,
    listening: socket.socket,
    on_ready: Callable[[str], object],
) -> None:
    """Serve on a listening socket until the shutdown signal; call `on_ready` with the URL when all models answer."""
    server = _Server(_uvicorn_config(settings, gateway), lambda: _announce(models, listening, on_ready))

    def reload() -> None:
        gateway.access.reload_keys()
        reloader.check_now()

    # A handler of the loop makes every signal wake the loop from now on.
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    if (main := asyncio.current_task()) is not None:
        shutdown.on_second_interrupt = main.cancel
    async with _running_models(models, shutdown.requested) as ready, asyncio.TaskGroup() as group:
        if not ready:
            return
        background = [
            group.create_task(reloader.run()),
            group.create_task(_reload_keys(gateway.access, settings.reload_s)),
            group.create_task(models.probe_regularly()),
            group.create_task(_stop_when(shutdown.requested, server)),
        ]
        await server.serve([listening])
        shutdown.requested.set()
        for task in background:
            task.cancel()


def _uvicorn_config(settings: ServeSettings, gateway: GatewayMiddleware) -> uvicorn.Config:
    return uvicorn.Config(
        gateway,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.access.proxies),
        forwarded_allow_ips=settings.access.trusted_proxies(),
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        **http_protocol.uvicorn_options(settings.request),
    )


class _Server(uvicorn.Server):
    """Uvicorn that calls back when it is ready, and leaves signals to ShutdownSignal, which handles them earlier."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def _running_models(models: ModelRegistry, shutdown: asyncio.Event) -> AsyncIterator[bool]:
    """Start all models and stop them at the end; yield False where the shutdown came before they were ready."""
    starting = asyncio.ensure_future(models.start())
    stopping = asyncio.ensure_future(shutdown.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
        yield starting.done()
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)
        await models.stop()


async def _reload_keys(access: AccessPolicy, every_s: float) -> None:
    while every_s:
        await asyncio.sleep(every_s)
        access.reload_keys()


async def _stop_when(shutdown: asyncio.Event, server: uvicorn.Server) -> None:
    await shutdown.wait()
    log.info("shutting down: no new requests are accepted, those that have begun are finished")
    server.should_exit = True


def _shifts(models: ModelRegistry, drift_window: DriftWindow) -> Iterator[tuple[str, Shift]]:
    for served in models:
        for shift in drift_window.shifts(served.spec.name):
            yield served.spec.name, shift


def _gauges(models: ModelRegistry) -> Iterator[tuple[str, dict[str, float]]]:
    for served in models:
        handle = served.handle
        gauges = {
            "queue_images": handle.queued,
            "queue_limit_images": handle.queue_limit,
            "ready": float(not served.last_problem),
            "restarts": handle.restarts,
        }
        yield served.spec.name, gauges


def _announce(models: ModelRegistry, listening: socket.socket, on_ready: Callable[[str], object]) -> None:
    for served in models:
        metadata = served.handle.metadata
        log.info(
            "model     %s %s, %d classes, backend %s",
            metadata["name"],
            metadata["version"],
            len(metadata["classes"]),
            metadata["backend"],
        )
    host, port = listening.getsockname()[:2]
    on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
