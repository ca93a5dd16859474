"""Messages between the server and the process that holds a model: a JSON head and raw bytes, nothing that could run code."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

_LENGTHS = struct.Struct(">II")

Message = tuple[dict[str, Any], bytes]


def encode_header(head: Mapping[str, Any], body: bytes | memoryview = b"") -> bytes:
    """What goes over the wire before a body."""
    text = json.dumps(head, separators=(",", ":")).encode()
    return _LENGTHS.pack(len(text), len(body)) + text


def encode(head: Mapping[str, Any], body: bytes | memoryview = b"") -> bytes:
    """One message as it goes over the wire."""
    return encode_header(head, body) + body


def read(stream: BinaryIO) -> Message | None:
    """The next message; None where the other side is gone, be it in the middle of one."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    head_bytes, body_bytes = _LENGTHS.unpack(lengths)
    content = stream.read(head_bytes + body_bytes)
    if len(content) < head_bytes + body_bytes:
        return None
    return json.loads(content[:head_bytes]), content[head_bytes:]


async def read_soon(stream: asyncio.StreamReader) -> Message | None:
    """`read` for the server's loop."""
    try:
        head_bytes, body_bytes = _LENGTHS.unpack(await stream.readexactly(_LENGTHS.size))
        head = json.loads(await stream.readexactly(head_bytes))
        return head, await stream.readexactly(body_bytes)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
