"""Start a server: listen, start the worker processes, import FastAPI while they load, and serve until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from image_classifier.errors import ConfigError
from image_classifier.serving.async_log import async_logging
from image_classifier.serving.auth import AccessPolicy, is_loopback
from image_classifier.serving.drift_window import DriftWindow
from image_classifier.serving.model_sources import ModelSource
from image_classifier.serving.settings import ServeSettings
from image_classifier.serving.worker.handle import WorkerProcess
from image_classifier.serving.worker.spec import ModelSpec

log = logging.getLogger(__name__)


def run_server(settings: ServeSettings, on_ready: Callable[[str], object]) -> None:
    """Serve until SIGINT or SIGTERM, then finish the requests that have begun.

    Args:
        settings: The server's settings.
        on_ready: Called with the server's URL when all models answer.

    Raises:
        ConfigError: The server cannot listen, or its settings are wrong.
        CheckpointError: A model is missing or damaged.
        KeyboardInterrupt: A second Ctrl-C ended the server at once.
    """
    access = AccessPolicy(settings.access, settings.host)
    with contextlib.ExitStack() as stack:
        # SIGHUP would end the process: ignore it until there is something to reload.
        stack.callback(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_IGN))
        listening = stack.enter_context(_listen(settings.host, settings.port))
        if not access.needs_key and not is_loopback(settings.host):
            log.warning("anyone who can reach %s can send requests: access.keys_file=FILE needs a key", settings.host)
        # The workers load their models while this process imports the server.
        sources = settings.model_sources()
        started = _start_workers(settings, sources, stack)
        from image_classifier.serving.registry import ModelRegistry, Reloader
        from image_classifier.serving.server import ShutdownSignal, make_gateway, serve_until

        models = ModelRegistry(started, settings.queue, settings.hang_s, settings.canary_s)
        shutdown = ShutdownSignal()
        stack.enter_context(shutdown.handled())
        drift_window = DriftWindow(settings.drift)
        stack.callback(drift_window.close)
        # Until after the last request, which the end of the event loop may cancel.
        with async_logging() as log_stream:
            gateway = make_gateway(settings, access, models, drift_window, log_stream, shutdown.requested.is_set)
            reloader = Reloader(models, sources, settings.reload_s)
            try:
                asyncio.run(serve_until(shutdown, settings, gateway, models, reloader, listening, on_ready))
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None
            finally:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the loop has restored the default handler


def _start_workers(
    settings: ServeSettings, sources: Mapping[str, ModelSource], stack: contextlib.ExitStack
) -> list[tuple[ModelSpec, WorkerProcess]]:
    """Start a process for each model; the end of the stack kills them."""
    specs = [settings.model_spec(name, source.find()) for name, source in sources.items()]
    started = [(spec, WorkerProcess(spec.as_dict())) for spec in specs]
    for _, worker in started:
        stack.callback(worker.kill)
    return started


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a bound socket; raise ConfigError where the address is not available."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(
            f"host={host!r} is no address of this machine ({error.strerror})", "use 127.0.0.1, or 0.0.0.0 for all"
        ) from error
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {host}:{port} ({error.strerror})", "choose another --port, or 0 for any free one"
            ) from error
        yield listening
