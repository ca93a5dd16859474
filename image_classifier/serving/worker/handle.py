"""The server's end of a model process: what is asked of it, how it is started anew, and that no request is lost when it dies."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from image_classifier.errors import ClassifierError, ServerError
from image_classifier.serving.worker import framing

log = logging.getLogger(__name__)

_PROOF = -1  # the number of the first canary
_ATTEMPTS = 3  # how often a request may be in a process that dies: in company at first, then alone
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0  # before a process that dies at once is started again
_START_S = 600.0  # an engine for a GPU may take minutes to build
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # numpy's threads would take the model's cores
    "MALLOC_ARENA_MAX": "2",  # what large pictures took goes back to the system: else it stays, in pieces, and there is ever more of it
    "MALLOC_MMAP_THRESHOLD_": "1048576",
}
_PACKAGE = Path(__file__).resolve().parents[3]


class QueueFull(Exception):  # it is an answer
    """More images wait than may; `after_s` is when to ask again."""

    def __init__(self, after_s: float) -> None:
        super().__init__(f"the queue is full, ask again in {after_s:.0f} s")
        self.after_s = after_s


class WorkerCrash(Exception):  # it is an answer
    """A request with which the model process died again, alone."""


class WorkerEnded(Exception):  # it is an answer
    """The process was ended before it answered, and no other takes its place."""


class DeadlineExceeded(Exception):  # it is an answer
    """No answer in time."""


@dataclass
class _Pending:
    future: asyncio.Future[framing.Message]
    head: bytes
    body: bytes
    again: bool
    attempts: int = 0


class WorkerProcess:
    """A process that is starting: made before anything slow is imported, so that both start at once."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        self.order = order
        self.connection, other = socket.socketpair()
        path = os.pathsep.join(filter(None, (str(_PACKAGE), os.environ.get("PYTHONPATH"))))
        line = [sys.executable, "-m", "image_classifier.serving.worker.main", str(other.fileno())]
        # A session of its own: Ctrl-C is for the server, which ends it when the last answer is out.
        environment = {**_ENVIRONMENT, **os.environ, "PYTHONPATH": path}
        self.process = subprocess.Popen(
            line, pass_fds=[other.fileno()], start_new_session=True, stdin=subprocess.DEVNULL, env=environment
        )
        other.close()
        self.connection.sendall(framing.encode(order))

    def kill(self) -> None:
        """End it at once."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.connection.close()
        self.process.wait()


@dataclass(eq=False)
class WorkerHandle:
    """One model in a process of its own, from the server's side.

    Args:
        started: The process.
        most: Images that may wait.
        hang_s: A process that owes answers and gives none for so long is killed.
    """

    started: WorkerProcess
    most: int
    hang_s: float
    facts: dict[str, Any] = field(default_factory=dict)
    restarts: int = 0
    users: int = 0
    starting: bool = False
    _pending: dict[int, _Pending] = field(default_factory=dict)
    _rows: int = 0
    _last: int = 0
    _silent_since: float | None = None  # while answers are owed
    _writer: asyncio.StreamWriter | None = None
    _image_s: float = 0.05
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._calm = asyncio.Event()  # no request is being tried again
        self._calm.set()

    @property
    def name(self) -> str:
        """The model's."""
        return str(self.started.order["name"])

    @property
    def waiting(self) -> int:
        """Images that are not answered yet."""
        return self._rows

    async def start(self) -> None:
        """Wait until the model is loaded; ClassifierError with its own words where it cannot be."""
        await self._connected()
        self._spawn(self._watch())

    async def stop(self) -> None:
        """End the process; what it still owed gets `Ended`."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._kill()
        self._fail_all(WorkerEnded("the server is being stopped"))

    async def drained(self) -> None:
        """Wait until nothing is owed and nobody is about to ask."""
        while self._pending or self.users:
            await asyncio.sleep(0.02)

    @contextmanager
    def room_for(self, images: int) -> Iterator[None]:
        """Places in the queue for so many, held while the block runs; QueueFull at once where there are not enough."""
        if self._rows + images > self.most:
            raise QueueFull(max(1.0, round(self._rows * self._image_s)))
        self._rows += images
        begun, ahead = time.monotonic(), self._rows
        try:
            yield
            self._image_s += 0.05 * ((time.monotonic() - begun) / max(1, ahead) - self._image_s)
        finally:
            self._rows -= images

    async def ask(
        self, head: Mapping[str, Any], body: bytes = b"", timeout_s: float = 30.0, again: bool = True
    ) -> framing.Message:
        """The answer to one message, which is asked `again` where the process dies before it.

        Raises:
            Deadly: The process dies of it.
            Ended: It was stopped.
            TooLate: There is no answer within `timeout_s`.
            ServerError: The model cannot answer.
        """
        if self.starting and not again:
            raise ServerError("its process is being started again")
        self._last += 1
        number = self._last
        pending = _Pending(
            asyncio.get_running_loop().create_future(), framing.encode_header({**head, "id": number}, body), body, again
        )
        self._pending[number] = pending
        try:
            async with asyncio.timeout(timeout_s):
                if again:
                    await self._calm.wait()
                self._write(pending)
                found = await asyncio.shield(pending.future)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
        finally:
            self._pending.pop(number, None)
            if not pending.future.done():
                pending.future.cancel()
                self._send(framing.encode({"cancel": number}))  # which is answered too, by a sign of life
        if "failed" in found[0]:
            raise ServerError(str(found[0]["failed"]))
        return found

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connected(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(sock=self.started.connection, limit=2**20)
        self._silent_since = None
        try:
            first = await asyncio.wait_for(framing.read_soon(self._reader), _START_S)
        except TimeoutError:
            first = None
        if first is not None and "ready" in first[0]:
            self.facts = first[0]["ready"]
            return
        await self._kill()
        if first is None:
            code = self.started.process.returncode
            raise ServerError(
                f"the process of the model {self.name!r} ended with {code} before it was ready",
                "its own words are above",
            )
        raise ClassifierError(*first[0]["refused"])

    async def _watch(self) -> None:
        """Hand out answers; when the process dies start another, and ask it again what was owed, one request at a time."""
        hung = asyncio.get_running_loop().create_task(self._kill_when_hung())
        try:
            while True:
                try:
                    await self._hand_out()
                except (ValueError, KeyError, TypeError, AttributeError):
                    log.exception("the process of the model %s says what cannot be understood", self.name)
                await self._replace()
        finally:
            hung.cancel()

    async def _hand_out(self) -> None:
        """To whoever waits for each answer, until the process ends."""
        while (message := await framing.read_soon(self._reader)) is not None:
            pending = self._pending.get(message[0]["id"])
            if pending is not None and not pending.future.done():
                pending.future.set_result(message)
            owed = any(other.attempts and not other.future.done() for other in self._pending.values())
            self._silent_since = time.monotonic() if owed else None

    async def _kill(self) -> None:
        """End the process and what is left of the connection to it, whose number the next one may get."""
        if self._writer is not None:
            self._writer.transport.abort()
        await asyncio.to_thread(self.started.kill)

    async def _replace(self) -> None:
        await self._kill()
        log.error(
            "the process of the model %s ended with %s, another is started", self.name, self.started.process.returncode
        )
        self.starting = True
        suspects = [pending for pending in self._pending.values() if pending.again and pending.attempts]
        self._calm.clear()
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                self.started = await asyncio.to_thread(WorkerProcess, self.started.order)
                self.restarts += 1
                await self._connected()
                await asyncio.wait_for(self._proven(), self.hang_s)
                break
            except (ClassifierError, OSError, TimeoutError) as error:
                log.error("the model %s cannot be started again: %s", self.name, error or "it answers nothing")
                await self._kill()
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        self.starting, self._silent_since = False, None
        self._spawn(self._try_again(suspects))

    async def _proven(self) -> None:
        """Ask what lies there now, maybe another version, the known image; ServerError where it answers otherwise."""
        self._send(framing.encode({"id": _PROOF, "do": "canary"}))
        while (message := await framing.read_soon(self._reader)) is not None:
            if message[0].get("id") == _PROOF:
                if "failed" in message[0]:
                    raise ServerError(str(message[0]["failed"]))
                return
        raise ServerError("it died of the known image")

    async def _try_again(self, suspects: list[_Pending]) -> None:
        """Ask again what was owed, one at a time: what dies alone is guilty."""
        for pending in suspects:
            if pending.future.done():
                continue
            if pending.attempts >= _ATTEMPTS:
                pending.future.set_exception(WorkerCrash("the process that holds the model died of this request"))
                continue
            process = self.started
            self._write(pending)
            while not pending.future.done():
                await asyncio.sleep(0.005)
                if self.started is not process or process.process.poll() is not None:
                    return  # it died again, of this one: `_replace` begins anew with those that are left
        self._calm.set()

    async def _kill_when_hung(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.hang_s / 4))
            if (
                not self.starting
                and self._silent_since is not None
                and time.monotonic() - self._silent_since > self.hang_s
            ):
                log.error(
                    "the process of the model %s owes answers and gave none for %g s: it is killed",
                    self.name,
                    self.hang_s,
                )
                self._silent_since = None
                with suppress(ProcessLookupError):
                    self.started.process.kill()

    def _write(self, pending: _Pending) -> None:
        pending.attempts += 1
        if self._silent_since is None:
            self._silent_since = time.monotonic()
        self._send(pending.head, pending.body)

    def _send(self, *parts: bytes) -> None:
        if self._writer is None or self._writer.transport.is_closing():
            return  # `_watch` sees that it is gone
        for part in parts:
            self._writer.write(part)

    def _fail_all(self, error: Exception) -> None:
        for pending in self._pending.values():
            if not pending.future.done():
                pending.future.set_exception(error)
                pending.future.exception()  # whoever asked may be gone: then nobody is to be told
