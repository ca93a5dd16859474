"""A connection whose client stops reading is closed in time, however much of the answer is left."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from image_classifier.serving import http_protocol
from image_classifier.serving.request_limits import RequestLimits


def app_of(size: int) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(size).encode())]})
        await send({"type": "http.response.body", "body": bytes(size)})

    return app


@pytest.mark.slow
@pytest.mark.parametrize("size", [40_000, 60_000, 400_000])
@pytest.mark.parametrize("more", [b"Connection: close\r\n", b""])
def test_it_is_gone_in_time(monkeypatch: pytest.MonkeyPatch, size: int, more: bytes) -> None:
    monkeypatch.setattr(http_protocol, "_READ_S", 0.1)

    async def scenario() -> int:
        config = uvicorn.Config(
            app_of(size),
            lifespan="off",
            log_config=None,
            **http_protocol.uvicorn_options(RequestLimits(keep_alive_s=1)),
        )
        config.load()
        state = ServerState()
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        make: Any = config.http_protocol_class
        await loop.connect_accepted_socket(lambda: make(config=config, server_state=state, app_state={}), ours)
        theirs.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + more + b"\r\n")
        async with asyncio.timeout(10):
            while state.connections:
                await asyncio.sleep(0.01)
        theirs.setblocking(False)
        found = b""
        try:
            while part := theirs.recv(2**16):
                found += part
        except ConnectionError:
            pass
        theirs.close()
        return len(found)

    assert 0 < asyncio.run(scenario()) < size  # it was not all read, or this tests nothing


@pytest.mark.slow
def test_a_client_that_goes_on_reading_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "_READ_S", 0.2)
    size = 3_000_000

    async def scenario() -> int:
        config = uvicorn.Config(
            app_of(size), lifespan="off", log_config=None, **http_protocol.uvicorn_options(RequestLimits())
        )
        config.load()
        make: Any = config.http_protocol_class
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: make(config=config, server_state=ServerState(), app_state={}), "127.0.0.1", 0
        )
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=2**14)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        count = 0
        while part := await reader.read(2**15):
            count += len(part)
            await asyncio.sleep(0.02)
        writer.close()
        server.close()
        return count

    assert asyncio.run(scenario()) > size
