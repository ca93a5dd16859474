"""The request log: a JSON line for each request. No image content, no key, no query."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class RequestRecord:
    """One finished request, for the log and the metrics; nothing of its content.

    Args:
        request_id: The client's X-Request-Id, or a random one.
        client: The client's address.
        method: The HTTP method.
        path: The path, printable and without the query.
        route: The pattern of the route, "" where there is none.
        status: The HTTP status; 499 where the client went away first.
        bytes: Size of the body.
        seconds: From the head of the request to the end of the answer.
        images: Images in the request.
        key: The name of the API key, "" where none is needed.
    """

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


class LogWriter(Protocol):
    """A stream that takes log lines."""

    def write(self, text: str, /) -> object: ...


class RequestLog:
    """Writes one line for each request."""

    def __init__(self, stream: LogWriter) -> None:
        self._stream = stream

    def __call__(self, record: RequestRecord) -> None:
        """Write one line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": record.request_id,
            "client": record.client,
            "method": record.method,
            "path": record.path,
            "status": record.status,
            "bytes": record.bytes,
            "images": record.images,
            "ms": round(1000 * record.seconds, 1),
        }
        if record.key:
            line["key"] = record.key
        self._stream.write(json.dumps(line) + "\n")
