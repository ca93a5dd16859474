"""What stands around every route: request id, who may ask, limits on the body, headers for browsers, one shape of errors, the log."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.routing import compile_path

from image_classifier.serving.auth import AccessPolicy, preflight
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
from image_classifier.text import printable

log = logging.getLogger(__name__)

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self'; "
    "manifest-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"permissions-policy", b"camera=(self), microphone=(), geolocation=()"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
FAILED = Refusal(500, "internal", "the server failed at this request; its log says why")
_CLIENT_CHARACTERS = 64  # a proxy may say any name


@dataclass(frozen=True)
class RequestRecord:
    """What one request was, for the log and the metrics; nothing of its content."""

    request_id: str
    client: str
    method: str
    path: str
    route: str
    status: int
    bytes: int
    seconds: float
    images: int
    key: str


class GatewayMiddleware:
    """An ASGI application around another, whose routes have these `paths`.

    `tell` hears of each request when it is over, and `stopping` says whether new ones are refused.
    """

    def __init__(
        self,
        app: App,
        access: AccessPolicy,
        bodies: BodyReader,
        tell: Callable[[RequestRecord], object],
        stopping: Callable[[], bool],
        paths: Callable[[], Iterable[str]],
    ) -> None:
        self.app, self.access, self.bodies, self.tell, self.stopping, self.paths = (
            app,
            access,
            bodies,
            tell,
            stopping,
            paths,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the server's own start and end."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send) if scope["type"] == "lifespan" else None
        method, headers = scope["method"], dict(scope["headers"])
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn leaves the content out
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        state = scope.setdefault("state", {})
        state.update(
            request_id=given if _ID.fullmatch(given) else uuid.uuid4().hex,
            images=0,
            received=0,
            key="",
            share=MemoryLease(self.bodies.memory),
        )
        answer = _Answer(send, state["request_id"], self.access.cors(headers), is_v2(scope["path"]))
        client = (scope.get("client") or ("unknown", 0))[0][:_CLIENT_CHARACTERS]
        start = time.monotonic()
        try:
            await self._answered(self._take(scope, method, client, receive, answer), answer)
        finally:
            state["share"].end()
            seconds = time.monotonic() - start
            path = printable(scope["path"])[:200]
            self.tell(
                RequestRecord(
                    state["request_id"],
                    client,
                    method,
                    path,
                    self._route(scope),
                    answer.status,
                    state["received"],
                    seconds,
                    state["images"],
                    state["key"],
                )
            )
        return None

    def _route(self, scope: Scope) -> str:
        """The route's pattern, "" where there is none; of a request that was refused before it was looked up too."""
        if "route" in scope:
            return str(getattr(scope["route"], "path", ""))
        return next((path for path in self.paths() if _pattern(path).match(scope["path"])), "")

    async def _take(self, scope: Scope, method: str, client: str, receive: Receive, answer: _Answer) -> None:
        """Whoever may not ask is refused before the body is read."""
        if self.stopping():
            raise _stopping()
        headers = dict(scope["headers"])
        if method == "OPTIONS" and b"access-control-request-method" in headers and answer.cors_allowed:
            return await answer.plain(204, b"", preflight(["GET", "POST"]))
        scope["state"]["key"] = self.access.check(method, scope["path"], headers, client)
        body = await self.bodies.read(scope, receive, scope["state"]["share"])
        scope["state"].update(received=len(body), body=body)
        return await self._run(scope, receive, answer)

    async def _answered(self, work: Awaitable[None], answer: _Answer) -> None:
        """Whatever becomes of the work, there is an answer."""
        try:
            await work
        except Refusal as refusal:
            await answer.refuse(refusal)
        except Disconnected:
            answer.status = 499
        except asyncio.CancelledError:
            if not self.stopping() or (answer.status and not answer.complete):
                raise
            if not answer.status:
                await answer.refuse(_stopping())  # there is no more time to finish it
        except Exception:
            log.exception("the request %s failed", answer.request_id)
            if answer.status and not answer.complete:
                raise  # the answer has begun: the connection must break
            if not answer.status:
                await answer.refuse(FAILED)

    async def _run(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """The application, with a body that is there already; ended when the client goes away."""
        gone = asyncio.Event()
        delivered = False

        async def replay() -> Event:
            nonlocal delivered
            if not delivered:
                delivered = True
                return {
                    "type": "http.request",
                    "body": b"",
                    "more_body": False,
                }  # routes take it from the state, without a copy
            await gone.wait()
            return {"type": "http.disconnect"}

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        app = asyncio.ensure_future(self.app(scope, replay, answer))
        leaving = asyncio.ensure_future(leave())
        try:
            await asyncio.wait({app, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not app.done() and not answer.status:
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
def _pattern(path: str) -> re.Pattern[str]:
    return compile_path(path)[0]


def is_v2(path: str) -> bool:
    """Whether a path is one of the V2 protocol, whose errors look different."""
    return path == "/v2" or path.startswith("/v2/")


def _stopping() -> Refusal:
    return Refusal(503, "stopping", "the server is being stopped", 1.0)


def problem_body(refusal: Refusal, request_id: str, is_v2: bool) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Content and headers: one shape for every error, but for those of the V2 protocol, which has its own."""
    words: dict[str, Any] = {"error": {"code": refusal.code, "message": refusal.message}, "request_id": request_id}
    headers = [(b"content-type", b"application/json")]
    if refusal.after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(refusal.after_s))).encode()))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="image_classifier"'))
    if refusal.status in (408, 413) or refusal.code == "stopping":
        headers.append((b"connection", b"close"))
    return json.dumps({"error": refusal.message} if is_v2 else words).encode(), headers


class _Answer:
    """Sends one answer with what every answer carries, and remembers its status (0 while there is none) and its end."""

    def __init__(self, send: Send, request_id: str, cors: list[tuple[bytes, bytes]], is_v2: bool) -> None:
        self._send, self.request_id, self._cors, self._is_v2 = send, request_id, cors, is_v2
        self.status, self.complete = 0, False
        self.cors_allowed = any(name == b"access-control-allow-origin" for name, _ in cors)

    async def __call__(self, event: Event) -> None:
        if event["type"] == "http.response.start":
            self.status = event["status"]
            own = {name for name, _ in event["headers"]}
            fixed = [pair for pair in HEADERS if pair[0] not in own]
            stored = [] if b"cache-control" in own else [(b"cache-control", b"no-store")]
            event = {
                **event,
                "headers": [
                    *event["headers"],
                    *fixed,
                    *stored,
                    *self._cors,
                    (b"x-request-id", self.request_id.encode()),
                ],
            }
        await self._send(event)
        self.complete = event["type"] == "http.response.body" and not event.get("more_body", False)

    async def refuse(self, refusal: Refusal) -> None:
        """The one shape of errors."""
        content, headers = problem_body(refusal, self.request_id, self._is_v2)
        await self.plain(refusal.status, content, headers)

    async def plain(self, status: int, content: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """A whole answer."""
        length = [] if status == 204 else [(b"content-length", str(len(content)).encode())]
        start: dict[str, Any] = {"type": "http.response.start", "status": status, "headers": [*headers, *length]}
        await self(start)
        await self({"type": "http.response.body", "body": content})
