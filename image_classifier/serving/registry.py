"""The models that are served, by name: which process answers for each, whether it really answers, and another version in its place."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from image_classifier.errors import ClassifierError
from image_classifier.serving.model_sources import ModelSource
from image_classifier.serving.request_limits import Refusal
from image_classifier.serving.unattended import unattended
from image_classifier.serving.worker.handle import (
    DeadlineExceeded,
    WorkerCrash,
    WorkerEnded,
    WorkerHandle,
    WorkerProcess,
)
from image_classifier.serving.worker.spec import ModelSpec, version_of

log = logging.getLogger(__name__)

_FRESH_S = 1.0  # probes that come more often share an answer
_OWN_S = 10.0  # between canaries that nobody asked for
_LONGEST_PAUSE_S = 600.0  # before a version that could not be served is tried again


@dataclass
class ServedModel:
    """One model: its process, and what its last canary said."""

    order: ModelSpec
    handle: WorkerHandle
    trouble: str = "it was not asked yet"
    asked_at: float = field(default=-1e9)
    canary: asyncio.Task[None] | None = None

    @property
    def known_trouble(self) -> str:
        """Why it was not ready when it was last asked, or is not now; "" where it was."""
        return "its process is being started again" if self.handle.starting else self.trouble


class ModelRegistry:
    """All models of the server; the first one answers where a request names none."""

    def __init__(
        self, started: Sequence[tuple[ModelSpec, WorkerProcess]], most: int, hang_s: float, canary_s: float
    ) -> None:
        self._most, self._hang_s, self._canary_s = most, hang_s, canary_s
        self._served = {
            order.name: ServedModel(order, WorkerHandle(process, most, hang_s)) for order, process in started
        }
        self._leaving: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._served.values())

    @property
    def first(self) -> str:
        """The name of the model that answers where none is named."""
        return next(iter(self._served))

    def get(self, name: str | None = None) -> WorkerHandle:
        """The process that answers for a model; Refusal where there is none of that name."""
        served = self._served.get(self.first if name is None else name)
        if served is None:
            raise Refusal(404, "not_found", "there is no model of that name: GET /models lists them")
        return served.handle

    @contextmanager
    def held(self, name: str | None = None) -> Iterator[WorkerHandle]:
        """The same, which does not end while the block runs, though another version may take its place."""
        handle = self.get(name)
        handle.users += 1
        try:
            yield handle
        finally:
            handle.users -= 1

    async def start(self) -> None:
        """Wait until all are loaded and have answered their canary; a ClassifierError says what cannot be served."""
        await asyncio.gather(*(served.handle.start() for served in self))
        for served in self:
            if trouble := await self.trouble(served):
                raise ClassifierError(f"the model {served.order.name!r} does not answer as it should", trouble)

    async def stop(self) -> None:
        """End all processes."""
        await asyncio.gather(*(served.handle.stop() for served in self), *self._leaving)

    async def trouble(self, served: ServedModel) -> str:
        """Why a model is not ready, by a canary image that it really answers, at most a second ago; "" where it is."""
        if not served.handle.starting and time.monotonic() - served.asked_at >= _FRESH_S:
            if served.canary is None or served.canary.done():
                served.canary = asyncio.get_running_loop().create_task(self._ask(served))
            await asyncio.shield(served.canary)  # a probe that goes away takes no answer from the others
        return served.known_trouble

    async def _ask(self, served: ServedModel) -> None:
        handle = served.handle
        trouble = await self._canary(handle)
        if served.handle is handle:
            served.trouble, served.asked_at = trouble, time.monotonic()

    async def keep_asking(self) -> None:
        """Ask now and then, so that figures are true where nobody probes."""
        while True:
            await asyncio.sleep(_OWN_S)
            await asyncio.gather(*(self.trouble(served) for served in self))

    async def _canary(self, handle: WorkerHandle) -> str:
        try:
            await handle.ask({"do": "canary"}, timeout_s=self._canary_s, again=False)
        except (ClassifierError, DeadlineExceeded, WorkerCrash, WorkerEnded) as error:
            return str(error)
        return ""

    async def reload(self, name: str, order: ModelSpec) -> None:
        """Put another version in a model's place, once it is loaded and answers; the old one ends when it owes nothing more.

        Raises:
            ClassifierError: The new one cannot be served; the old one stays.
        """
        served = self._served[name]
        process = await asyncio.to_thread(WorkerProcess, order.as_dict())
        fresh = WorkerHandle(process, self._most, self._hang_s)
        try:
            await fresh.start()
            if trouble := await self._canary(fresh):
                raise ClassifierError(f"the new version of {name!r} does not answer as it should", trouble)
        except BaseException:
            await fresh.stop()
            raise
        old, served.order, served.handle = served.handle, order, fresh
        served.trouble, served.asked_at = "", time.monotonic()
        task = asyncio.get_running_loop().create_task(self._leave(old))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        log.info("the model %s is now version %s, was %s", name, fresh.facts["version"], old.facts["version"])

    async def _leave(self, old: WorkerHandle) -> None:
        await old.drained()
        await old.stop()


@dataclass(frozen=True)
class _Refused:
    """A version that could not be served, maybe for a reason that passes: not tried again before `until`, and then after twice the pause."""

    version: str
    pause_s: float
    until: float

    @classmethod
    def again(cls, version: str, before: _Refused | None, every_s: float) -> _Refused:
        pause_s = min(
            _LONGEST_PAUSE_S,
            2 * before.pause_s if before is not None and before.version == version else max(1.0, every_s),
        )
        return cls(version, pause_s, time.monotonic() + pause_s)


class Reloader:
    """Looks now and then whether a model was replaced, on disk or by an alias of the registry, and serves the new version."""

    def __init__(self, models: ModelRegistry, places: Mapping[str, ModelSource], every_s: float) -> None:
        self._models, self._places, self._every_s = models, places, every_s
        self._refused: dict[str, _Refused] = {}
        self._said: dict[str, str] = {}
        self._now = {name: asyncio.Event() for name in places}

    async def run(self) -> None:
        """Look every `every_s` seconds (0: only when it is told to); a place that does not answer holds up no other model."""
        async with asyncio.TaskGroup() as group:
            for served in self._models:
                group.create_task(self._follow(served, self._now[served.order.name]))

    def look(self) -> None:
        """Look at once, also at versions that could not be served."""
        self._refused.clear()
        for now in self._now.values():
            now.set()

    async def _follow(self, served: ServedModel, now: asyncio.Event) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(now.wait(), self._every_s or None)
            now.clear()
            try:
                await self._look(served)
            except Exception:
                log.exception("the model %s could not be looked after", served.order.name)

    async def _look(self, served: ServedModel) -> None:
        name, current = served.order.name, served.handle.facts["version"]
        try:
            path = await unattended(self._places[name].find)
            version = await asyncio.to_thread(version_of, path)
            refused = self._refused.get(name)
            if version == current:
                self._refused.pop(name, None)
                self._said.pop(name, None)
                return
            if refused is not None and refused.version == version and time.monotonic() < refused.until:
                return
            try:
                await self._models.reload(name, replace(served.order, path=str(path)))
            except ClassifierError:
                if (
                    await asyncio.to_thread(version_of, path) == version
                ):  # else it is still being written, and looked at again
                    self._refused[name] = _Refused.again(version, refused, self._every_s)
                raise
        except (ClassifierError, OSError) as error:
            if self._said.get(name) != str(error):
                log.error("the model %s stays at version %s: %s", name, current, error)
            self._said[name] = str(error)
        else:
            self._refused.pop(name, None)
            self._said.pop(name, None)
