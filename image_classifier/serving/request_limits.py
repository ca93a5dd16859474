"""What one request may ask of the server, and what reads a body within that."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from image_classifier.errors import ConfigError

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_STALLED_S = 2.0  # a body of which less than _STEP came in so long gives way where others need its place
_STEP = 2**14  # bytes
_LINGER_S = 2.0  # a body that is refused is read for so long: whoever closes at once cuts off its own answer


@dataclass(frozen=True)
class RequestLimits:
    """The keys of `request`.

    Args:
        max_bytes: Of a body.
        max_images: In one request.
        body_s: Seconds in which a body must arrive.
        headers_s: Seconds in which the head of a request must arrive, and that a connection may be idle before its first.
        keep_alive_s: Seconds that a connection may be idle between two requests.
        answer_s: Seconds that an answer may take.
        max_memory: Bytes of all bodies, and of what is fetched for them, that are held at once.
        max_connections: Open at once; more are closed as they come.

    Raises:
        ConfigError: A value that cannot be.
    """

    max_bytes: int = 64 * 2**20
    max_images: int = 64
    body_s: float = 60.0
    headers_s: float = 10.0
    keep_alive_s: float = 75.0
    answer_s: float = 30.0
    max_memory: int = 512 * 2**20
    max_connections: int = 1000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise ConfigError(f"request.{name} must be above 0, not {value}")
        if self.max_memory < self.max_bytes:
            raise ConfigError(
                f"request.max_memory={self.max_memory} is less than one body of request.max_bytes={self.max_bytes}"
            )


class Refusal(Exception):  # it is an answer
    """An answer that is no: its status, its code for programs and its words for people."""

    def __init__(self, status: int, code: str, message: str, after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.after_s = status, code, message, after_s


class Disconnected(Exception):  # it is no error of ours
    """The client is gone."""


class MemoryBudget:
    """What all requests hold together: a number of bytes that has a limit."""

    def __init__(self, most: int) -> None:
        self.most, self.held, self.lock = most, 0, threading.Lock()
        self.coming: set[MemoryLease] = set()  # whose bodies are not there yet


class MemoryLease:
    """What one request holds of it, counted from any thread until the request is over."""

    def __init__(self, memory: MemoryBudget) -> None:
        self._memory, self._count, self._over = memory, 0, False
        self._since, self._new, self._limit = 0.0, 0, asyncio.timeout(None)

    def take(self, count: int) -> None:
        """Count so many bytes more; Refusal where there is no room for them, or the request is over."""
        with self._memory.lock:
            if self._over or self._memory.held + count > self._memory.most:
                raise Refusal(503, "queue_full", "the server holds as many bytes of bodies and images as it may", 1.0)
            self._memory.held += count
            self._count += count

    @asynccontextmanager
    async def of_body(self, seconds: float) -> AsyncIterator[None]:
        """The time of a body; TimeoutError where it is over, or where others need the place of one that does not go on."""
        self._since = time.monotonic()
        try:
            async with asyncio.timeout(seconds) as self._limit:
                self._memory.coming.add(self)
                yield
        finally:
            self._memory.coming.discard(self)

    def take_for_body(self, count: int) -> None:
        """As `take`, in the place of bodies that do not go on where there is no other."""
        self._new += count
        if self._new >= _STEP:
            self._since, self._new = time.monotonic(), 0
        while True:
            try:
                return self.take(count)
            except Refusal:
                slowest = min(self._memory.coming, key=lambda share: share._since, default=self)
                if self._over or slowest is self or time.monotonic() - slowest._since < _STALLED_S:
                    raise
                slowest._give_way()

    def _give_way(self) -> None:
        self._memory.coming.discard(self)
        self.end()
        if not self._limit.expired():
            self._limit.reschedule(0)

    def end(self) -> None:
        """Give all of it back: the request is over."""
        with self._memory.lock:
            self._memory.held -= self._count
            self._count, self._over = 0, True


class BodyReader:
    """Reads bodies, each within its limits and all together within the memory that they may take."""

    def __init__(self, limits: RequestLimits) -> None:
        self.limits, self.memory = limits, MemoryBudget(limits.max_memory)

    async def read(self, scope: Scope, receive: Receive, share: MemoryLease) -> bytearray:
        """The body of a request, counted in its share.

        Raises:
            Refusal: It is too large, takes too long, or there is no room for it.
            Disconnected: The client went away.
        """
        parts = bytearray()
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":  # what it would unpack to has no limit
            raise Refusal(415, "unsupported_media_type", "send the body as it is: compressed ones are not unpacked")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.limits.max_bytes:
            await self._linger(receive)
            raise self._too_large()
        try:
            async with share.of_body(self.limits.body_s):
                whole = await self._read(receive, share, parts)
        except TimeoutError:
            words = f"longer than {self.limits.body_s:g} s, or too long while others needed its place in memory"
            raise Refusal(408, "timeout", f"the body took {words}") from None
        if not whole:
            await self._linger(receive)
            raise self._too_large()
        return parts

    async def _read(self, receive: Receive, share: MemoryLease, parts: bytearray) -> bool:
        """Whether the body fits into its limit."""
        more = True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                raise Disconnected
            block = event.get("body", b"")
            if len(parts) + len(block) > self.limits.max_bytes:
                return False
            share.take_for_body(len(block))
            parts += block
            more = event.get("more_body", False)
        return True

    def _too_large(self) -> Refusal:
        return Refusal(413, "too_large", f"the body is larger than {self.limits.max_bytes / 2**20:.3g} MiB")

    async def _linger(self, receive: Receive) -> None:
        """Read on for a moment and keep nothing."""
        end = time.monotonic() + _LINGER_S
        try:
            while (left := end - time.monotonic()) > 0:
                event = await asyncio.wait_for(receive(), left)
                if event["type"] == "http.disconnect" or not event.get("more_body", False):
                    return
        except TimeoutError:
            return
