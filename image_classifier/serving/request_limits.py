"""Limits of one request, and the reader of request bodies that keeps them."""

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

_PROGRESS_BYTES = 2**14  # an upload that receives this many bytes is not stalled
_STALLED_S = 2.0  # a stalled upload is dropped when other requests need its memory
_DRAIN_S = 2.0  # how long a refused body is read: a client whose connection closes at once never sees the answer


@dataclass(frozen=True)
class RequestLimits:
    """The keys of `request`.

    Args:
        max_bytes: Maximum size of a body.
        max_images: Maximum number of images in one request.
        body_s: Seconds until a body must be complete.
        headers_s: Seconds until the head of a request must be complete; also how long a new connection may be idle.
        keep_alive_s: Seconds that a connection may be idle between two requests.
        answer_s: Seconds that an answer may take.
        max_memory: Maximum bytes of all bodies and fetched images at the same time.
        max_connections: Maximum number of open connections; more are closed at once.

    Raises:
        ConfigError: A value is out of range.
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
                raise ConfigError(f"invalid request.{name} {value}", "expected a number above 0")
        if self.max_memory < self.max_bytes:
            raise ConfigError(
                f"request.max_memory={self.max_memory} is less than request.max_bytes={self.max_bytes}",
                "it must hold at least one body",
            )


class Refusal(Exception):  # it is an answer
    """A refused request: the HTTP status, a code for programs and a message for people."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


class Disconnected(Exception):  # not an error of the server
    """The client has closed the connection."""


class MemoryBudget:
    """The bytes that all requests together may hold."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.lock = threading.Lock()
        self.uploads: set[MemoryLease] = set()  # requests whose body is still coming in


class MemoryLease:
    """The memory that one request holds. It may be counted from any thread, and is returned when the request ends."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._held = 0
        self._ended = False
        self._last_progress = 0.0
        self._new_bytes = 0  # since the last progress
        self._timeout = asyncio.timeout(None)

    def take(self, count: int) -> None:
        """Add bytes; raise Refusal where they do not fit, or the request has ended."""
        with self._budget.lock:
            if self._ended or self._budget.used + count > self._budget.limit:
                raise Refusal(503, "queue_full", "the memory for request bodies and images is full", 1.0)
            self._budget.used += count
            self._held += count

    @asynccontextmanager
    async def upload(self, seconds: float) -> AsyncIterator[None]:
        """Limit the time of an upload; raise TimeoutError where it is over, or where the upload was evicted."""
        self._last_progress = time.monotonic()
        try:
            async with asyncio.timeout(seconds) as self._timeout:
                self._budget.uploads.add(self)
                yield
        finally:
            self._budget.uploads.discard(self)

    def take_for_upload(self, count: int) -> None:
        """Add bytes of a body. Where they do not fit, evict stalled uploads until they do."""
        # Every _PROGRESS_BYTES the upload counts as alive again.
        self._new_bytes += count
        if self._new_bytes >= _PROGRESS_BYTES:
            self._last_progress = time.monotonic()
            self._new_bytes = 0
        while True:
            try:
                return self.take(count)
            except Refusal:
                # Evict the upload that made no progress for the longest time, unless that is this one or it is not
                # stalled: then this request is refused.
                slowest = min(self._budget.uploads, key=lambda lease: lease._last_progress, default=self)
                stalled = time.monotonic() - slowest._last_progress >= _STALLED_S
                if self._ended or slowest is self or not stalled:
                    raise
                slowest._evict()

    def _evict(self) -> None:
        """Return the memory of a stalled upload and let its time be over."""
        self._budget.uploads.discard(self)
        self.end()
        if not self._timeout.expired():
            self._timeout.reschedule(0)

    def end(self) -> None:
        """Return all memory: the request has ended."""
        with self._budget.lock:
            self._budget.used -= self._held
            self._held = 0
            self._ended = True


class BodyReader:
    """Reads request bodies, each within its limits and all together within the memory budget."""

    def __init__(self, limits: RequestLimits) -> None:
        self.limits = limits
        self.budget = MemoryBudget(limits.max_memory)

    async def read(self, scope: Scope, receive: Receive, lease: MemoryLease) -> bytearray:
        """Return the body of a request and count it in its lease.

        Raises:
            Refusal: The body is too large or too slow, or there is no memory for it.
            Disconnected: The client has closed the connection.
        """
        headers = dict(scope["headers"])
        # A compressed body could unpack to any size.
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refusal(415, "unsupported_media_type", "compressed bodies are not supported: send it uncompressed")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.limits.max_bytes:
            await self._drain(receive)
            raise self._too_large()
        body = bytearray()
        try:
            async with lease.upload(self.limits.body_s):
                fits = await self._read_into(body, receive, lease)
        except TimeoutError:
            reason = f"it took longer than {self.limits.body_s:g} s, or stalled while others needed the memory"
            raise Refusal(408, "timeout", f"the body came too slowly: {reason}") from None
        if not fits:
            await self._drain(receive)
            raise self._too_large()
        return body

    async def _read_into(self, body: bytearray, receive: Receive, lease: MemoryLease) -> bool:
        """Read all blocks; return whether the body stays within its limit."""
        more = True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                raise Disconnected
            block = event.get("body", b"")
            if len(body) + len(block) > self.limits.max_bytes:
                return False
            lease.take_for_upload(len(block))
            body += block
            more = event.get("more_body", False)
        return True

    def _too_large(self) -> Refusal:
        return Refusal(413, "too_large", f"the body is larger than {self.limits.max_bytes / 2**20:.3g} MiB")

    async def _drain(self, receive: Receive) -> None:
        """Read and discard for a short time, so that the client can read the refusal (RFC 9112, section 9.6)."""
        end = time.monotonic() + _DRAIN_S
        try:
            while (left_s := end - time.monotonic()) > 0:
                event = await asyncio.wait_for(receive(), left_s)
                if event["type"] == "http.disconnect" or not event.get("more_body", False):
                    return
        except TimeoutError:
            return
