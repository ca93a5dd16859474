"""Messages between the server and a worker process. Nothing in them can run code.

A message is the length of its header and of its body (uint32, big-endian), then a JSON header, then the raw body.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

_LENGTHS = struct.Struct(">II")

Message = tuple[dict[str, Any], bytes]


def encode_header(header: Mapping[str, Any], body: bytes | memoryview = b"") -> bytes:
    r"""Return the bytes that come before a body on the socket.

    >>> encode_header({"id": 1}, b"abc")
    b'\x00\x00\x00\x08\x00\x00\x00\x03{"id":1}'
    """
    text = json.dumps(header, separators=(",", ":")).encode()
    return _LENGTHS.pack(len(text), len(body)) + text


def encode(header: Mapping[str, Any], body: bytes | memoryview = b"") -> bytes:
    """Return one complete message.

    >>> import io
    >>> read(io.BytesIO(encode({"id": 1}, b"abc")))
    ({'id': 1}, b'abc')
    """
    return encode_header(header, body) + body


def read(stream: BinaryIO) -> Message | None:
    """Read the next message; return None where the other side has closed the socket, even within a message."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    header_bytes, body_bytes = _LENGTHS.unpack(lengths)
    content = stream.read(header_bytes + body_bytes)
    if len(content) < header_bytes + body_bytes:
        return None
    return json.loads(content[:header_bytes]), content[header_bytes:]


async def read_async(stream: asyncio.StreamReader) -> Message | None:
    """Read like `read`, without blocking the event loop."""
    try:
        header_bytes, body_bytes = _LENGTHS.unpack(await stream.readexactly(_LENGTHS.size))
        header = json.loads(await stream.readexactly(header_bytes))
        return header, await stream.readexactly(body_bytes)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
