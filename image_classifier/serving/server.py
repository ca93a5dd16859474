"""The server itself: the application in uvicorn over models that answer, until it is told to end and the last answer is out."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

from image_classifier.serving import http_protocol
from image_classifier.serving.app import make_app
from image_classifier.serving.auth import AccessPolicy
from image_classifier.serving.drift_window import DriftWindow
from image_classifier.serving.metrics import Drift, LogWriter, RequestLog, ServerMetrics
from image_classifier.serving.middleware import GatewayMiddleware
from image_classifier.serving.registry import ModelRegistry, Reloader
from image_classifier.serving.request_limits import BodyReader
from image_classifier.serving.routes.predict import AppState
from image_classifier.serving.uploads import Uploads
from image_classifier.sources.web import WebClient

if TYPE_CHECKING:
    from image_classifier.serving.settings import ServeSettings, ShutdownSignal

log = logging.getLogger(__name__)


def make_gateway(
    asked: ServeSettings,
    access: AccessPolicy,
    models: ModelRegistry,
    traffic: DriftWindow,
    log_to: LogWriter,
    stopping: Callable[[], bool],
) -> GatewayMiddleware:
    """All routes and what stands around them."""
    uploads = Uploads(asked.request, WebClient(asked.fetch) if asked.fetch.enabled else None, asked.limits.max_bytes)
    metrics = ServerMetrics(lambda: _gauges(models), lambda: _drift(models, traffic))
    app = make_app(AppState(models, uploads, metrics, traffic, asked.request, asked.fetch.enabled), access.needs_key)
    hear = (metrics.seen, RequestLog(log_to)) if asked.request_log else (metrics.seen,)
    return GatewayMiddleware(
        app,
        access,
        BodyReader(asked.request),
        lambda seen: [one(seen) for one in hear],
        stopping,
        lambda: app.openapi()["paths"],
    )


async def serve_until(
    told: ShutdownSignal,
    asked: ServeSettings,
    fence: GatewayMiddleware,
    models: ModelRegistry,
    reloader: Reloader,
    listening: socket.socket,
) -> None:
    """Serve at a socket that listens, until `told` to end."""
    server = _Server(_config(asked, fence), lambda: _say(models, listening))

    def look() -> None:
        fence.access.reread()
        reloader.look()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, look)  # from now on all signals wake the loop
    if (main := asyncio.current_task()) is not None:
        told.hurry = main.cancel
    async with _running(models, told.ended) as are_running, asyncio.TaskGroup() as group:
        if not are_running:
            return
        tasks = [
            group.create_task(work)
            for work in (
                reloader.run(),
                _reread(fence.access, asked.reload_s),
                models.keep_asking(),
                _end(server, told.ended),
            )
        ]
        await server.serve([listening])
        told.ended.set()
        for task in tasks:
            task.cancel()


def _config(asked: ServeSettings, fence: GatewayMiddleware) -> uvicorn.Config:
    return uvicorn.Config(
        fence,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(asked.access.proxies),
        forwarded_allow_ips=asked.access.trusted_proxies(),
        timeout_graceful_shutdown=max(1, round(asked.drain_s)),
        **http_protocol.arguments(asked.request),
    )


class _Server(uvicorn.Server):
    """Uvicorn, which says when it answers, and leaves signals to `Told`, which also hears them while models are loaded and ended."""

    def __init__(self, config: uvicorn.Config, say: Callable[[], None]) -> None:
        super().__init__(config)
        self._say = say

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._say()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def _running(models: ModelRegistry, ended: asyncio.Event) -> AsyncIterator[bool]:
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


async def _reread(access: AccessPolicy, every_s: float) -> None:
    while every_s:
        await asyncio.sleep(every_s)
        access.reread()


async def _end(server: Any, ended: asyncio.Event) -> None:
    await ended.wait()
    log.info("no new requests are taken, those that were begun are finished")
    server.should_exit = True


def _drift(models: ModelRegistry, traffic: DriftWindow) -> list[Drift]:
    return [(served.order.name, *figures) for served in models for figures in traffic.figures(served.order.name)]


def _gauges(models: ModelRegistry) -> Iterator[tuple[str, dict[str, float]]]:
    for served in models:
        handle = served.handle
        state = {
            "queue_images": handle.waiting,
            "queue_limit_images": handle.most,
            "ready": float(not served.known_trouble),
            "restarts": handle.restarts,
        }
        yield served.order.name, state


def _say(models: ModelRegistry, listening: socket.socket) -> None:
    host, port = listening.getsockname()[:2]
    for served in models:
        facts = served.handle.facts
        log.info(
            "model     %s %s, %d classes, backend %s",
            facts["name"],
            facts["version"],
            len(facts["classes"]),
            facts["backend"],
        )
    shown = f"[{host}]" if ":" in host else host
    print(f"serving   http://{shown}:{port}", flush=True)
