"""The outermost layer: request ids, access control, body limits, headers for browsers, error format, request log."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import compile_path

from image_classifier.serving.auth import AccessPolicy
from image_classifier.serving.request_limits import (
    App,
    BodyReader,
    Disconnected,
    Event,
    MemoryLease,
    Receive,
    Refusal,
    Scope,
    Send,
)
from image_classifier.serving.request_log import RequestRecord
from image_classifier.text import printable

log = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]

_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; manifest-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Headers = [
    (b"content-security-policy", _CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"permissions-policy", b"camera=(self), microphone=(), geolocation=()"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_CLIENT_LENGTH = 64  # a proxy may send any name
_MAX_LOGGED_PATH = 200
_CLIENT_CLOSED = 499  # status in the log where the client went away first, as nginx has it
INTERNAL_ERROR = Refusal(500, "internal", "the server failed on this request; see its log")
_STOPPING = Refusal(503, "stopping", "the server is shutting down", 1.0)


class GatewayMiddleware:
    """An ASGI application around another one.

    Args:
        app: The routes. They find the body in `request.state.body`.
        access: Decides who may send requests.
        bodies: Reads request bodies.
        on_done: Called with the record of each finished request.
        stopping: Returns whether the server is shutting down; then new requests are refused.
        paths: Returns the patterns of all routes.
    """

    def __init__(
        self,
        app: App,
        access: AccessPolicy,
        bodies: BodyReader,
        on_done: Callable[[RequestRecord], object],
        stopping: Callable[[], bool],
        paths: Callable[[], Iterable[str]],
    ) -> None:
        self.app = app
        self.access = access
        self.bodies = bodies
        self.on_done = on_done
        self.stopping = stopping
        self.paths = paths
        self._handler: App = self._handle
        if access.cors_origins:
            # It answers preflights, which carry no key, before `access` is asked.
            self._handler = CORSMiddleware(
                self._handle,
                allow_origins=sorted(access.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["content-type", "x-api-key", "authorization", "x-request-id"],
                expose_headers=["x-request-id", "retry-after"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the server's startup and shutdown."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send) if scope["type"] == "lifespan" else None
        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn sends no content then
        given_id = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        state = scope.setdefault("state", {})
        state.update(
            request_id=given_id if _REQUEST_ID.fullmatch(given_id) else uuid.uuid4().hex,
            client=(scope.get("client") or ("unknown", 0))[0][:_MAX_CLIENT_LENGTH],
            images=0,
            received=0,
            key="",
            lease=MemoryLease(self.bodies.budget),
        )
        state["sent"] = sent = _SentResponse(send, state["request_id"])
        start = time.monotonic()
        try:
            await self._handler(scope, receive, sent)
        finally:
            state["lease"].end()
            self.on_done(
                RequestRecord(
                    request_id=state["request_id"],
                    client=state["client"],
                    method=method,
                    path=printable(scope["path"])[:_MAX_LOGGED_PATH],
                    route=self._route_of(scope),
                    status=sent.status,
                    bytes=state["received"],
                    seconds=time.monotonic() - start,
                    images=state["images"],
                    key=state["key"],
                )
            )
        return None

    def _route_of(self, scope: Scope) -> str:
        """Return the pattern of the route, "" where there is none; also for requests refused before routing."""
        if "route" in scope:
            return str(getattr(scope["route"], "path", ""))
        return next((path for path in self.paths() if _compiled(path).match(scope["path"])), "")

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request in any case: with the routes, or with an error."""
        state = scope["state"]
        sent: _SentResponse = state["sent"]
        respond = functools.partial(_send_problem, send, state["request_id"], is_v2(scope["path"]))
        try:
            await self._admit(scope, receive, send)
        except Refusal as refusal:
            await respond(refusal)
        except Disconnected:
            sent.status = _CLIENT_CLOSED
        except asyncio.CancelledError:
            if not self.stopping() or sent.is_partial:
                raise
            if not sent.status:
                await respond(_STOPPING)  # the time for unfinished requests is over
        except Exception:
            log.exception("the request %s failed", state["request_id"])
            if sent.is_partial:
                raise  # the connection must break: the client has a part of the answer
            if not sent.status:
                await respond(INTERNAL_ERROR)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check access before the body is read, read it, and run the routes."""
        if self.stopping():
            raise _STOPPING
        state = scope["state"]
        state["key"] = self.access.check(scope["method"], scope["path"], dict(scope["headers"]), state["client"])
        state["body"] = await self.bodies.read(scope, receive, state["lease"])
        state["received"] = len(state["body"])
        await self._run_app(scope, receive, send)

    async def _run_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the routes, and cancel them when the client closes the connection."""
        gone = asyncio.Event()
        delivered = False

        async def replay() -> Event:
            # An empty body: the routes take it from the state, without a copy.
            nonlocal delivered
            if not delivered:
                delivered = True
                return {"type": "http.request", "body": b"", "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def wait_for_disconnect() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        app = asyncio.ensure_future(self.app(scope, replay, send))
        leaving = asyncio.ensure_future(wait_for_disconnect())
        try:
            await asyncio.wait({app, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not app.done() and not scope["state"]["sent"].status:
                app.cancel()
                with suppress(asyncio.CancelledError):
                    await app
                raise Disconnected
            await app
        finally:
            for task in (app, leaving):
                task.cancel()
            await asyncio.gather(app, leaving, return_exceptions=True)


@functools.cache
def _compiled(path: str) -> re.Pattern[str]:
    return compile_path(path)[0]


def is_v2(path: str) -> bool:
    """Check whether a path belongs to the V2 protocol, whose errors have another format.

    >>> is_v2("/v2/models/cats"), is_v2("/predict")
    (True, False)
    """
    return path == "/v2" or path.startswith("/v2/")


def problem_response(refusal: Refusal, request_id: str, v2: bool) -> tuple[bytes, Headers]:
    """Return the content and the headers of an error, in the format of this API or of the V2 protocol."""
    content: dict[str, Any] = {
        "error": {"code": refusal.code, "message": refusal.message},
        "request_id": request_id,
    }
    headers = [(b"content-type", b"application/json")]
    if refusal.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(refusal.retry_after_s))).encode()))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="image_classifier"'))
    if refusal.status in (408, 413) or refusal.code == "stopping":
        headers.append((b"connection", b"close"))
    return json.dumps({"error": refusal.message} if v2 else content).encode(), headers


async def _send_problem(send: Send, request_id: str, v2: bool, refusal: Refusal) -> None:
    content, headers = problem_response(refusal, request_id, v2)
    headers.append((b"content-length", str(len(content)).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


class _SentResponse:
    """Sends a response with the headers that every response carries; `status` is 0 until it starts."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status = 0
        self.complete = False

    @property
    def is_partial(self) -> bool:
        """Whether the response has started and is not complete."""
        return bool(self.status) and not self.complete

    async def __call__(self, event: Event) -> None:
        if event["type"] == "http.response.start":
            self.status = event["status"]
            event = {**event, "headers": self._complete_headers(event["headers"])}
        await self._send(event)
        self.complete = event["type"] == "http.response.body" and not event.get("more_body", False)

    def _complete_headers(self, headers: Iterable[tuple[bytes, bytes]]) -> Headers:
        """Add the headers for browsers, where the route has not set them, and the request id."""
        headers = list(headers)
        names = {name for name, _ in headers}
        defaults = [*HEADERS, (b"cache-control", b"no-store")]
        missing = [(name, value) for name, value in defaults if name not in names]
        return [*headers, *missing, (b"x-request-id", self._request_id.encode())]
