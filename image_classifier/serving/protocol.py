"""HTTP/1.1 connections that are not held open by whoever sends nothing, half a head, or reads no answer."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from image_classifier.serving.limits import RequestLimits

_UNREAD_S = 20.0  # an answer that nobody reads


class PatientProtocol(H11Protocol):
    """Uvicorn's protocol with a deadline for the head of each request, one for reading an answer, and a bound on connections."""

    headers_s: ClassVar[float]
    max_connections: ClassVar[int]

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

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(_UNREAD_S, self.transport.abort)  # closing waits until all is read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(_UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _late(self) -> None:
        self._head = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def arguments(limits: RequestLimits) -> dict[str, Any]:
    """What uvicorn's Config is told so that it makes such connections."""
    kind = type("Patient", (PatientProtocol,), {"headers_s": limits.headers_s, "max_connections": limits.max_connections})
    return {"http": kind, "h11_max_incomplete_event_size": 2**15, "timeout_keep_alive": max(1, round(limits.keep_alive_s)), "ws": "none"}
