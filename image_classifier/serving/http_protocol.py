"""HTTP/1.1 connections that are not held open by whoever sends nothing, half a head, or reads no answer."""

from __future__ import annotations

import array
import asyncio
import fcntl
import logging
import resource
import termios
import uuid
from contextlib import suppress
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from image_classifier.serving.middleware import HEADERS, problem_body
from image_classifier.serving.request_limits import Refusal, RequestLimits

log = logging.getLogger(__name__)

_BACKLOG = 128  # connections that are accepted at once, before any of them can be refused
_OTHER_FILES = (
    3 * _BACKLOG + 64
)  # three rounds of the loop lie between accepting and closing; models, logs, the listening socket
_UNREAD_S = 20.0  # in which a client must read some of its answer
_LEAST_READ = 2**14  # bytes; less is nothing
_MOST_HEAD = 2**15  # bytes
_SMALL_CHUNK = 64  # bytes; reading one takes as long as reading a thousand times as many
_MOST_SMALL_CHUNKS = 10_000  # in one body


class _Parser(h11.Connection):
    """h11, which also refuses bodies of two lengths and bodies in crumbs."""

    _crumbs = 0

    def next_event(self) -> Any:
        """The next event of the client's."""
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._crumbs += len(event.data) < _SMALL_CHUNK
            if self._crumbs > _MOST_SMALL_CHUNKS:
                raise h11.RemoteProtocolError("a body in crumbs")
        elif isinstance(event, h11.Request):
            self._crumbs = 0
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:  # a proxy in front may have read the other one
                raise h11.RemoteProtocolError("a body of two lengths")
        return event


class TimeoutH11Protocol(H11Protocol):
    """Uvicorn's protocol with a deadline for the head of each request, one for reading an answer, and a bound on connections."""

    headers_s: ClassVar[float]
    max_connections: ClassVar[int]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = _Parser(h11.SERVER, _MOST_HEAD)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self._unread: asyncio.TimerHandle | None = None
        self._head: asyncio.TimerHandle | None = None
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._head = self.loop.call_later(self.headers_s, self._late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy and self._head is not None:
            self._head.cancel()
            self._head = None
        elif not busy and self._head is None and not self.transport.is_closing():  # the first bytes of another request
            self._head = self.loop.call_later(self.headers_s, self._late)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if (
            self.cycle.response_complete and self.conn.trailing_data[0] and self._head is None
        ):  # half a head came with the request before
            self._head = self.loop.call_later(self.headers_s, self._late)
        self._close_in_time()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._close_in_time()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_on(None)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None and not self.transport.is_closing():
            self._unread.cancel()
            self._unread = None

    def _close_in_time(self) -> None:
        """A connection that is being closed waits until its client has read all, or reads no more."""
        if self.transport.is_closing() and self._unread is None:
            self._read_on(None)

    def _read_on(self, before: int | None) -> None:
        """End the connection unless its client has read something since there were `before` bytes left."""
        left = self.transport.get_write_buffer_size() + _queued(self.transport)
        if before is not None and before - left < _LEAST_READ:
            self.transport.abort()
        else:
            self._unread = self.loop.call_later(_UNREAD_S, self._read_on, left)

    def send_400_response(self, msg: str) -> None:
        """What cannot be read is told so, but not in the middle of an answer; the connection ends."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            request_id = uuid.uuid4().hex
            content, headers = problem_body(
                Refusal(400, "bad_request", "this is no HTTP request that can be read"), request_id, False
            )
            head = [
                *headers,
                *HEADERS,
                (b"x-request-id", request_id.encode()),
                (b"content-length", str(len(content)).encode()),
                (b"connection", b"close"),
            ]
            with suppress(h11.LocalProtocolError):  # an answer to HEAD has no content
                for event in (
                    h11.Response(status_code=400, headers=head, reason=b"Bad Request"),
                    h11.Data(data=content),
                    h11.EndOfMessage(),
                ):
                    self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._close_in_time()

    def _unsupported_upgrade_warning(self) -> None:
        """Another protocol is not taken up: HTTP/1.1 goes on, as it may."""

    def _late(self) -> None:
        self._head = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def _queued(transport: asyncio.Transport) -> int:
    """Bytes of an answer that the system has and the client not yet."""
    queued = array.array("i", [0])
    with suppress(OSError):  # not every system tells, nor of every socket
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
    return queued[0]


def arguments(limits: RequestLimits) -> dict[str, Any]:
    """What uvicorn's Config is told so that it makes such connections."""
    kind = type(
        "Patient",
        (TimeoutH11Protocol,),
        {"headers_s": limits.headers_s, "max_connections": _possible(limits.max_connections)},
    )
    return {"http": kind, "timeout_keep_alive": max(1, round(limits.keep_alive_s)), "ws": "none", "backlog": _BACKLOG}


def _possible(connections: int) -> int:
    """So many connections, or fewer where this process may not open as many files as they and others need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + _OTHER_FILES
    if soft < needed and soft != resource.RLIM_INFINITY:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return connections
    found = max(soft // 4, soft - _OTHER_FILES)
    log.warning(
        "request.max_connections=%d is %d here: the system allows this process %d open files (ulimit -n)",
        connections,
        found,
        soft,
    )
    return found
