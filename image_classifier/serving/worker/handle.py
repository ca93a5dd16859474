"""The server's side of a worker process: sends requests, and restarts a process that dies without losing any."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from image_classifier.errors import ClassifierError, ServerError
from image_classifier.serving.worker import framing

log = logging.getLogger(__name__)

_CANARY_ID = -1  # id of the canary that a restarted process must answer first
_MAX_ATTEMPTS = 3  # processes that one request may be sent to: first together with others, then alone
_MIN_RESTART_S = 0.1  # pause before a process that dies at once is restarted; doubles up to the next constant
_MAX_RESTART_S = 5.0
_MAX_START_S = 600.0  # building an engine for a GPU may take minutes
_IMAGE_S_WEIGHT = 0.05  # weight of a new sample in the average time per image
_ENVIRONMENT = {
    # numpy's threads would take the model's cores.
    "OPENBLAS_NUM_THREADS": "1",
    # With more arenas the memory of large images stays with the process in fragments, and grows without limit.
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "1048576",
}
_PACKAGE = Path(__file__).resolve().parents[3]


class QueueFull(Exception):  # it is an answer
    """The queue is full; `retry_after_s` is when to try again."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full, try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class WorkerCrash(Exception):  # it is an answer
    """The worker process died repeatedly while it handled this request alone."""


class WorkerEnded(Exception):  # it is an answer
    """The worker process was stopped before it answered, and is not restarted."""


class DeadlineExceeded(Exception):  # it is an answer
    """There was no answer in time."""


@dataclass
class _Pending:
    """A request without an answer; `attempts` counts the processes that it was sent to."""

    future: asyncio.Future[framing.Message]
    header: bytes
    body: bytes
    retry: bool
    attempts: int = 0


class WorkerProcess:
    """A worker process that is starting, before the slow imports of the server, so that both load in parallel."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.spec = spec
        self.connection, other = socket.socketpair()
        python_path = os.pathsep.join(filter(None, (str(_PACKAGE), os.environ.get("PYTHONPATH"))))
        # A session of its own: Ctrl-C reaches only the server, which stops the worker after the last answer.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "image_classifier.serving.worker.main", str(other.fileno())],
            pass_fds=[other.fileno()],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            env={**_ENVIRONMENT, **os.environ, "PYTHONPATH": python_path},
        )
        other.close()
        self.connection.sendall(framing.encode(spec))

    def kill(self) -> None:
        """Kill the process and wait for its end."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.connection.close()
        self.process.wait()


@dataclass(eq=False)
class WorkerHandle:
    """One model in a worker process, seen from the server.

    Args:
        worker: The process.
        queue_limit: Maximum number of images that wait for an answer.
        hang_s: A process that sends nothing for this long while answers are due is killed.
    """

    worker: WorkerProcess
    queue_limit: int
    hang_s: float
    metadata: dict[str, Any] = field(default_factory=dict)
    restarts: int = 0
    users: int = 0
    starting: bool = False
    _pending: dict[int, _Pending] = field(default_factory=dict)
    _queued: int = 0
    _last_id: int = 0
    _silent_since: float | None = None  # set only while answers are due
    _writer: asyncio.StreamWriter | None = None
    _image_s: float = 0.05  # average time per image, for Retry-After
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._no_retries = asyncio.Event()  # set while no request is being sent again
        self._no_retries.set()

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.worker.spec["name"])

    @property
    def queued(self) -> int:
        """The number of images without an answer."""
        return self._queued

    async def start(self) -> None:
        """Wait until the model is loaded; raises the ClassifierError that the process reports."""
        await self._connect()
        self._spawn(self._supervise())

    async def stop(self) -> None:
        """Stop the process; requests without an answer get WorkerEnded."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._kill()
        self._fail_all(WorkerEnded("the server is shutting down"))

    async def wait_until_idle(self) -> None:
        """Wait until no answer is due and nobody is about to send a request."""
        while self._pending or self.users:
            await asyncio.sleep(0.02)

    @contextmanager
    def queue_slots(self, images: int) -> Iterator[None]:
        """Reserve room in the queue while the block runs; raise QueueFull at once where there is not enough."""
        if self._queued + images > self.queue_limit:
            raise QueueFull(max(1.0, round(self._queued * self._image_s)))
        self._queued += images
        start = time.monotonic()
        ahead = self._queued
        try:
            yield
            image_s = (time.monotonic() - start) / max(1, ahead)
            self._image_s += _IMAGE_S_WEIGHT * (image_s - self._image_s)
        finally:
            self._queued -= images

    async def request(
        self, header: Mapping[str, Any], body: bytes = b"", timeout_s: float = 30.0, retry: bool = True
    ) -> framing.Message:
        """Send one message and return the answer; with `retry` it is sent again where the process dies first.

        Raises:
            WorkerCrash: The process dies of this request.
            WorkerEnded: The process was stopped.
            DeadlineExceeded: There is no answer within `timeout_s`.
            ServerError: The model failed.
        """
        if self.starting and not retry:
            raise ServerError("the worker process is being restarted")
        self._last_id += 1
        request_id = self._last_id
        encoded = framing.encode_header({**header, "id": request_id}, body)
        pending = _Pending(asyncio.get_running_loop().create_future(), encoded, body, retry)
        self._pending[request_id] = pending
        try:
            async with asyncio.timeout(timeout_s):
                if retry:
                    # After a crash the suspects run alone: new requests wait until they are done.
                    await self._no_retries.wait()
                self._send_request(pending)
                answer = await asyncio.shield(pending.future)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
        finally:
            self._pending.pop(request_id, None)
            if not pending.future.done():
                pending.future.cancel()
                # The process acknowledges this: a sign of life.
                self._send(framing.encode({"cancel": request_id}))
        if "failed" in answer[0]:
            raise ServerError(str(answer[0]["failed"]))
        return answer

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self) -> None:
        """Wait for the first message of the process: its metadata, or why the model cannot be loaded."""
        self._reader, self._writer = await asyncio.open_connection(sock=self.worker.connection, limit=2**20)
        self._silent_since = None
        try:
            first = await asyncio.wait_for(framing.read_async(self._reader), _MAX_START_S)
        except TimeoutError:
            first = None
        if first is not None and "ready" in first[0]:
            self.metadata = first[0]["ready"]
            return
        await self._kill()
        if first is None:
            raise ServerError(
                f"the worker process of the model {self.name!r} ended with {self.worker.process.returncode} "
                "before it was ready",
                "its error message is above",
            )
        raise ClassifierError(*first[0]["refused"])

    async def _supervise(self) -> None:
        """Deliver answers; when the process dies, restart it and send the unanswered requests again."""
        watchdog = asyncio.get_running_loop().create_task(self._kill_when_hung())
        try:
            while True:
                try:
                    await self._deliver_answers()
                except (ValueError, KeyError, TypeError, AttributeError):
                    log.exception("the worker process of the model %s sent an invalid message", self.name)
                await self._restart()
        finally:
            watchdog.cancel()

    async def _deliver_answers(self) -> None:
        """Give each answer to the request that waits for it, until the process ends."""
        while (message := await framing.read_async(self._reader)) is not None:
            pending = self._pending.get(message[0]["id"])
            if pending is not None and not pending.future.done():
                pending.future.set_result(message)
            answers_due = any(other.attempts and not other.future.done() for other in self._pending.values())
            self._silent_since = time.monotonic() if answers_due else None

    async def _kill(self) -> None:
        """Kill the process. Drop the connection first: the next process may get the same file descriptor."""
        if self._writer is not None:
            self._writer.transport.abort()
        await asyncio.to_thread(self.worker.kill)

    async def _restart(self) -> None:
        """Restart the process until it answers the canary, then send the unanswered requests again."""
        await self._kill()
        log.error(
            "the worker process of the model %s ended with %s and is restarted",
            self.name,
            self.worker.process.returncode,
        )
        self.starting = True
        # Any request that was in the process may have killed it. Hold back new requests until all suspects are done.
        suspects = [pending for pending in self._pending.values() if pending.retry and pending.attempts]
        self._no_retries.clear()
        pause_s = _MIN_RESTART_S
        while True:
            try:
                self.worker = await asyncio.to_thread(WorkerProcess, self.worker.spec)
                self.restarts += 1
                await self._connect()
                await asyncio.wait_for(self._check_canary(), self.hang_s)
                break
            except (ClassifierError, OSError, TimeoutError) as error:
                log.error("the model %s cannot be restarted: %s", self.name, error or "no answer to the canary")
                await self._kill()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _MAX_RESTART_S)
        self.starting = False
        self._silent_since = None
        self._spawn(self._retry_one_by_one(suspects))

    async def _check_canary(self) -> None:
        """Raise ServerError unless the new process answers the golden image correctly; it may hold another version."""
        self._send(framing.encode({"id": _CANARY_ID, "do": "canary"}))
        while (message := await framing.read_async(self._reader)) is not None:
            if message[0].get("id") == _CANARY_ID:
                if "failed" in message[0]:
                    raise ServerError(str(message[0]["failed"]))
                return
        raise ServerError("it died while it answered the golden image")

    async def _retry_one_by_one(self, suspects: list[_Pending]) -> None:
        """Send the suspects again one at a time: a request that kills the process while it is alone is the culprit."""
        for pending in suspects:
            if pending.future.done():
                continue
            if pending.attempts >= _MAX_ATTEMPTS:
                pending.future.set_exception(WorkerCrash("the worker process died of this request"))
                continue
            worker = self.worker
            self._send_request(pending)
            while not pending.future.done():
                await asyncio.sleep(0.005)
                # It died again, of this request: `_restart` continues with those that are left.
                if self.worker is not worker or worker.process.poll() is not None:
                    return
        self._no_retries.set()

    async def _kill_when_hung(self) -> None:
        """Kill a process that sends nothing for `hang_s` while answers are due; `_supervise` then restarts it."""
        while True:
            await asyncio.sleep(min(1.0, self.hang_s / 4))
            if self.starting or self._silent_since is None:
                continue
            if time.monotonic() - self._silent_since > self.hang_s:
                log.error("the worker process of the model %s sent nothing for %g s: killed", self.name, self.hang_s)
                self._silent_since = None
                with suppress(ProcessLookupError):
                    self.worker.process.kill()

    def _send_request(self, pending: _Pending) -> None:
        pending.attempts += 1
        if self._silent_since is None:
            self._silent_since = time.monotonic()
        self._send(pending.header, pending.body)

    def _send(self, *parts: bytes) -> None:
        if self._writer is None or self._writer.transport.is_closing():
            return  # `_supervise` notices that the process is gone
        for part in parts:
            self._writer.write(part)

    def _fail_all(self, error: Exception) -> None:
        for pending in self._pending.values():
            if not pending.future.done():
                pending.future.set_exception(error)
                # Mark it as seen: the client may be gone, and asyncio would log it as never retrieved.
                pending.future.exception()
