"""The served models by name: their worker processes, whether they answer correctly, and the change to a new version."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from image_classifier.errors import ClassifierError
from image_classifier.serving.model_sources import ModelSource
from image_classifier.serving.request_limits import Refusal
from image_classifier.serving.worker.handle import (
    DeadlineExceeded,
    WorkerCrash,
    WorkerEnded,
    WorkerHandle,
    WorkerProcess,
)
from image_classifier.serving.worker.spec import ModelSpec, version_of

log = logging.getLogger(__name__)

_FRESH_S = 1.0  # probes within this time share one canary
_PROBE_S = 10.0  # between canaries where nobody probes
_MAX_PAUSE_S = 600.0  # before a version that failed is tried again

T = TypeVar("T")


@dataclass
class ServedModel:
    """One model: its worker process and the result of its last canary, an image with a known answer."""

    spec: ModelSpec
    handle: WorkerHandle
    problem: str = "it was not probed yet"
    probed_at: float = -1e9
    canary: asyncio.Task[None] | None = None

    @property
    def last_problem(self) -> str:
        """Why the model is not ready, by the last canary; "" where it is."""
        return "the worker process is being restarted" if self.handle.starting else self.problem


class ModelRegistry:
    """All models of the server. The first one answers requests that name none."""

    def __init__(
        self, started: Sequence[tuple[ModelSpec, WorkerProcess]], queue_limit: int, hang_s: float, canary_s: float
    ) -> None:
        self._queue_limit = queue_limit
        self._hang_s = hang_s
        self._canary_s = canary_s
        self._served = {
            spec.name: ServedModel(spec, WorkerHandle(worker, queue_limit, hang_s)) for spec, worker in started
        }
        self._retiring: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._served.values())

    @property
    def default(self) -> str:
        """The name of the model that answers requests that name none."""
        return next(iter(self._served))

    def get(self, name: str | None = None) -> WorkerHandle:
        """Return the handle of a model; raise Refusal where there is none of that name."""
        served = self._served.get(self.default if name is None else name)
        if served is None:
            raise Refusal(404, "not_found", "there is no model of that name: GET /models lists them")
        return served.handle

    @contextmanager
    def acquire(self, name: str | None = None) -> Iterator[WorkerHandle]:
        """Yield the handle of a model, which is not stopped while the block runs, even if a new version replaces it."""
        handle = self.get(name)
        handle.users += 1
        try:
            yield handle
        finally:
            handle.users -= 1

    async def start(self) -> None:
        """Wait until all models are loaded and have answered their canary; raise ClassifierError where one fails."""
        await asyncio.gather(*(served.handle.start() for served in self))
        for served in self:
            if problem := await self.probe(served):
                raise ClassifierError(f"the model {served.spec.name!r} does not answer correctly", problem)

    async def stop(self) -> None:
        """Stop all worker processes."""
        await asyncio.gather(*(served.handle.stop() for served in self), *self._retiring)

    async def probe(self, served: ServedModel) -> str:
        """Return why a model is not ready, by a canary that is at most a second old; "" where it is."""
        if not served.handle.starting and time.monotonic() - served.probed_at >= _FRESH_S:
            if served.canary is None or served.canary.done():
                served.canary = asyncio.get_running_loop().create_task(self._send_canary(served))
            # Shielded: a probe that is cancelled must not cancel the canary of the others.
            await asyncio.shield(served.canary)
        return served.last_problem

    async def probe_regularly(self) -> None:
        """Probe all models every few seconds, so that the metrics are correct where nobody else probes."""
        while True:
            await asyncio.sleep(_PROBE_S)
            await asyncio.gather(*(self.probe(served) for served in self))

    async def _send_canary(self, served: ServedModel) -> None:
        handle = served.handle
        problem = await self._canary_problem(handle)
        # The model may have been reloaded meanwhile.
        if served.handle is handle:
            served.problem = problem
            served.probed_at = time.monotonic()

    async def _canary_problem(self, handle: WorkerHandle) -> str:
        try:
            await handle.request({"do": "canary"}, timeout_s=self._canary_s, retry=False)
        except (ClassifierError, DeadlineExceeded, WorkerCrash, WorkerEnded) as error:
            return str(error)
        return ""

    async def reload(self, name: str, spec: ModelSpec) -> None:
        """Replace a model by another version once that is loaded and answers; stop the old one after its last answer.

        Raises:
            ClassifierError: The new version cannot be served; the old one stays.
        """
        served = self._served[name]
        worker = await asyncio.to_thread(WorkerProcess, spec.as_dict())
        new = WorkerHandle(worker, self._queue_limit, self._hang_s)
        try:
            await new.start()
            if problem := await self._canary_problem(new):
                raise ClassifierError(f"the new version of {name!r} does not answer correctly", problem)
        except BaseException:
            await new.stop()
            raise
        old = served.handle
        served.spec = spec
        served.handle = new
        served.problem = ""
        served.probed_at = time.monotonic()
        task = asyncio.get_running_loop().create_task(self._retire(old))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        log.info("the model %s is now version %s, was %s", name, new.metadata["version"], old.metadata["version"])

    async def _retire(self, old: WorkerHandle) -> None:
        await old.wait_until_idle()
        await old.stop()


@dataclass(frozen=True)
class _FailedVersion:
    """A version that could not be served. The reason may pass: it is tried again at `retry_at`, with doubled pauses."""

    version: str
    pause_s: float
    retry_at: float

    @classmethod
    def after(cls, previous: _FailedVersion | None, version: str, every_s: float) -> _FailedVersion:
        """Return the next pause, twice as long where the same version failed before."""
        pause_s = max(1.0, every_s)
        if previous is not None and previous.version == version:
            pause_s = min(_MAX_PAUSE_S, 2 * previous.pause_s)
        return cls(version, pause_s, time.monotonic() + pause_s)


class Reloader:
    """Checks regularly whether a model was replaced, on disk or by an alias, and serves the new version."""

    def __init__(self, models: ModelRegistry, sources: Mapping[str, ModelSource], every_s: float) -> None:
        self._models = models
        self._sources = sources
        self._every_s = every_s
        self._failed: dict[str, _FailedVersion] = {}
        self._logged: dict[str, str] = {}  # the last error of each model
        self._wake = {name: asyncio.Event() for name in sources}

    async def run(self) -> None:
        """Check every `every_s` seconds (0: only after `check_now`), each model in a task of its own."""
        async with asyncio.TaskGroup() as group:
            for served in self._models:
                group.create_task(self._watch(served, self._wake[served.spec.name]))

    def check_now(self) -> None:
        """Check all models at once, also versions that failed before."""
        self._failed.clear()
        for event in self._wake.values():
            event.set()

    async def _watch(self, served: ServedModel, wake: asyncio.Event) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(wake.wait(), self._every_s or None)
            wake.clear()
            try:
                await self._check(served)
            except Exception:
                log.exception("checking the model %s for a new version failed", served.spec.name)

    async def _check(self, served: ServedModel) -> None:
        """Reload a model whose source has another version; log each new error once."""
        name = served.spec.name
        current = served.handle.metadata["version"]
        try:
            up_to_date = await self._reload_if_new(served, current)
        except (ClassifierError, OSError) as error:
            if self._logged.get(name) != str(error):
                log.error("the model %s stays at version %s: %s", name, current, error)
            self._logged[name] = str(error)
        else:
            if up_to_date:
                self._failed.pop(name, None)
                self._logged.pop(name, None)

    async def _reload_if_new(self, served: ServedModel, current: str) -> bool:
        """Return whether the newest version is served now; False while a version that failed is paused."""
        name = served.spec.name
        path = await detached_thread(self._sources[name].find)
        version = await asyncio.to_thread(version_of, path)
        if version == current:
            return True
        failed = self._failed.get(name)
        if failed is not None and failed.version == version and time.monotonic() < failed.retry_at:
            return False
        try:
            await self._models.reload(name, replace(served.spec, path=str(path)))
        except ClassifierError:
            # A version that has changed since is still being written: it is checked again without a pause.
            if await asyncio.to_thread(version_of, path) == version:
                self._failed[name] = _FailedVersion.after(failed, version, self._every_s)
            raise
        return True


async def detached_thread(work: Callable[[], T]) -> T:
    """Run work that may never end, such as asking a registry, in a thread that does not delay the program's end."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)
