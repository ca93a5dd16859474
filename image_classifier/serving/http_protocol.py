"""HTTP/1.1 connections that no client can hold open: by sending nothing or half a request head, or by not reading.

It extends uvicorn's protocol on h11. The rules come from RFC 9112 (HTTP/1.1), sections named where they apply; the
deadlines answer slow HTTP attacks ("Slowloris" and slow reading), for which a server may close a connection at any time
(RFC 9112, section 9.5).
"""

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

from image_classifier.serving.middleware import HEADERS, problem_response
from image_classifier.serving.request_limits import Refusal, RequestLimits

log = logging.getLogger(__name__)

_BACKLOG = 128  # connections that the loop accepts in one round, before it can close any of them
_OTHER_FILES = (
    3 * _BACKLOG + 64
)  # three rounds lie between accepting and closing; and models, logs, the listening socket
_READ_S = 20.0  # a client must read some of its answer in this time
_MIN_READ_BYTES = 2**14  # reading less does not count
_MAX_HEAD_BYTES = 2**15
_TINY_CHUNK_BYTES = 64  # parsing one takes as long as parsing one of a thousand times the size
_MAX_TINY_CHUNKS = 10_000  # in one body
_UNREADABLE = Refusal(400, "bad_request", "this is not a valid HTTP request")


class _Parser(h11.Connection):
    """h11, with two more refusals: a body with two lengths, and a body in very many tiny chunks."""

    _tiny_chunks = 0

    def next_event(self) -> Any:
        """Return the client's next event.

        A request with both Content-Length and Transfer-Encoding may be request smuggling: a proxy in front may have
        used the other one (RFC 9112, section 11.2). A server may refuse it (sections 6.1 and 6.3). Tiny chunks cost far
        more time than their bytes are worth; a server ought to limit such overhead of chunked coding (section 7.1.1).
        """
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._tiny_chunks += len(event.data) < _TINY_CHUNK_BYTES
            if self._tiny_chunks > _MAX_TINY_CHUNKS:
                raise h11.RemoteProtocolError("too many tiny chunks in a body")
        elif isinstance(event, h11.Request):
            self._tiny_chunks = 0
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
        return event


class TimeoutH11Protocol(H11Protocol):
    """Uvicorn's protocol with deadlines for each request head and for reading an answer, and a limit on connections."""

    headers_s: ClassVar[float]
    max_connections: ClassVar[int]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = _Parser(h11.SERVER, _MAX_HEAD_BYTES)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Start the deadline for the first head; close the connection where too many are open."""
        super().connection_made(transport)
        self._read_timer: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Stop the deadline when the head is complete; start it with the first bytes of another request."""
        super().data_received(data)
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        elif not busy and self._head_timer is None and not self.transport.is_closing():
            self._start_head_timer()

    def on_response_complete(self) -> None:
        """Start the deadline where part of the next head came with this request (RFC 9112, section 9.3.2)."""
        super().on_response_complete()
        if self.cycle.response_complete and self.conn.trailing_data[0] and self._head_timer is None:
            self._start_head_timer()
        self._limit_closing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        for timer in (self._head_timer, self._read_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection (RFC 9112, section 9.5)."""
        super().timeout_keep_alive_handler()
        self._limit_closing()

    def pause_writing(self) -> None:
        """Start to check that the client reads: the write buffer is full."""
        super().pause_writing()
        self._check_reading(None)

    def resume_writing(self) -> None:
        """Stop to check: the client has read enough."""
        super().resume_writing()
        if self._read_timer is not None and not self.transport.is_closing():
            self._read_timer.cancel()
            self._read_timer = None

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.headers_s, self._on_header_timeout)

    def _on_header_timeout(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def _limit_closing(self) -> None:
        """Check that the client reads while a connection closes: closing waits until all is read (section 9.6)."""
        if self.transport.is_closing() and self._read_timer is None:
            self._check_reading(None)

    def _check_reading(self, unread_before: int | None) -> None:
        """Abort the connection unless the client has read since the last check, which found `unread_before` bytes."""
        unread = self.transport.get_write_buffer_size() + _bytes_in_kernel(self.transport)
        if unread_before is not None and unread_before - unread < _MIN_READ_BYTES:
            self.transport.abort()
        else:
            self._read_timer = self.loop.call_later(_READ_S, self._check_reading, unread)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no valid request with 400 and close the connection (RFC 9112, sections 2.2 and 9.6).

        In the middle of an answer nothing is sent: it would become a part of that answer.
        """
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            request_id = uuid.uuid4().hex
            content, headers = problem_response(_UNREADABLE, request_id, False)
            headers += [
                *HEADERS,
                (b"x-request-id", request_id.encode()),
                (b"content-length", str(len(content)).encode()),
                (b"connection", b"close"),
            ]
            events = (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=content),
                h11.EndOfMessage(),
            )
            # The answer to HEAD has no content: h11 refuses to send it (RFC 9112, section 6.3).
            with suppress(h11.LocalProtocolError):
                for event in events:
                    self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._limit_closing()

    def _unsupported_upgrade_warning(self) -> None:
        """Ignore Upgrade silently: a server may continue with HTTP/1.1 (RFC 9110, section 7.8)."""


def _bytes_in_kernel(transport: asyncio.Transport) -> int:
    """Return the bytes of an answer that the system holds and the client has not received."""
    queued = array.array("i", [0])
    with suppress(OSError):  # not every system and socket supports it
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
    return queued[0]


def uvicorn_options(limits: RequestLimits) -> dict[str, Any]:
    """Return the options of uvicorn's Config for connections with these limits."""
    protocol = type(
        "LimitedH11Protocol",
        (TimeoutH11Protocol,),
        {"headers_s": limits.headers_s, "max_connections": _allowed_connections(limits.max_connections)},
    )
    return {
        "http": protocol,
        "timeout_keep_alive": max(1, round(limits.keep_alive_s)),
        "ws": "none",
        "backlog": _BACKLOG,
    }


def _allowed_connections(connections: int) -> int:
    """Raise this process's limit of open files; return fewer connections where the system does not allow enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + _OTHER_FILES
    if soft < needed and soft != resource.RLIM_INFINITY:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return connections
    allowed = max(soft // 4, soft - _OTHER_FILES)
    log.warning(
        "request.max_connections=%d is reduced to %d: this process may open only %d files (ulimit -n)",
        connections,
        allowed,
        soft,
    )
    return allowed
