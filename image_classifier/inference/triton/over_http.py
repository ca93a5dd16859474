"""A Triton server over HTTP: the V2 protocol with its binary tensors, which needs no package of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import quote

import numpy as np

from image_classifier.inference.triton.protocol import MOST_BYTES, Address, Outputs, Refused, tensor
from image_classifier.sources.socket_deadline import SocketDeadline

_HEADER = "Inference-Header-Content-Length"


class HttpChannel:
    """Speaks HTTP to the server at an address; a connection a request, so that none that went stale is used and none holds up the server's end."""

    def __init__(self, address: Address) -> None:
        self.address = address

    def ready(self, model: str, timeout_s: float) -> bool:
        places = ("/v2/health/ready", f"/v2/models/{quote(model, safe='')}/ready")
        return all(self._ask("GET", place, timeout_s)[0] == 200 for place in places)

    def max_batch_size(self, model: str, timeout_s: float) -> int:
        content = _parsed(self._answer("GET", f"/v2/models/{quote(model, safe='')}/config", timeout_s)[1])
        try:
            return int(content.get("max_batch_size", 0))
        except (TypeError, ValueError, OverflowError) as error:
            raise Refused("it answers with something that is not a Triton server's configuration") from error

    def infer(self, model: str, pixels: np.ndarray, outputs: Sequence[str], timeout_s: float) -> Outputs:
        head = {
            "inputs": [
                {
                    "name": "pixels",
                    "shape": pixels.shape,
                    "datatype": "UINT8",
                    "parameters": {"binary_data_size": pixels.nbytes},
                }
            ],
            "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs],
        }
        words = json.dumps(head).encode()
        headers = {_HEADER: str(len(words)), "Content-Type": "application/octet-stream"}
        place = f"/v2/models/{quote(model, safe='')}/infer"
        told, body = self._answer("POST", place, timeout_s, words + pixels.tobytes(), headers)
        return _outputs(told.get(_HEADER.lower()), body)

    def _answer(
        self,
        method: str,
        place: str,
        timeout_s: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[Mapping[str, str], bytes]:
        """The headers and the body of an answer that is not an error."""
        status, told, content = self._ask(method, place, timeout_s, body, headers)
        if status != 200:
            raise Refused(f"{_reason(content)} (HTTP {status})", again=status == 503)
        return told, content

    def _ask(
        self,
        method: str,
        place: str,
        timeout_s: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Mapping[str, str], bytes]:
        kind = HTTPSConnection if self.address.scheme == "https" else HTTPConnection
        watchdog = SocketDeadline(timeout_s)
        try:
            with watchdog, closing(kind(self.address.host, self.address.port, timeout=timeout_s)) as connection:
                connection.connect()
                watchdog.hold(connection.sock)
                connection.request(method, self.address.path + place, body, {"Connection": "close", **(headers or {})})
                with connection.getresponse() as response:
                    return (
                        response.status,
                        {key.lower(): value for key, value in response.getheaders()},
                        _body(response, watchdog),
                    )
        except (OSError, HTTPException) as error:
            if watchdog.expired or isinstance(error, TimeoutError):
                raise Refused(f"no answer within {timeout_s:g} s") from error
            again = isinstance(error, (ConnectionError, IncompleteRead))
            raise Refused(f"the connection failed ({type(error).__name__}: {error})", again) from error


def _body(response: HTTPResponse, watchdog: SocketDeadline) -> bytes:
    """All of an answer; TimeoutError where it is not there in time, however it drips."""
    parts, size = [], 0
    while part := response.read1(2**20):
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise Refused(f"its answer is longer than {MOST_BYTES} bytes")
    if watchdog.expired:
        raise TimeoutError
    if response.length:
        raise Refused("its answer is cut short", again=True)
    return b"".join(parts)


def _reason(content: bytes) -> str:
    """What an error answer says; many are no JSON."""
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return content[:200].decode("utf-8", "replace") or "no reason given"


def _parsed(content: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refused(f"it answers with something that is not JSON ({content[:40]!r})") from error
    if not isinstance(found, dict):
        raise Refused(f"it answers with something that is not the V2 protocol ({content[:40]!r})")
    return found


def _outputs(length: str | None, body: bytes) -> Outputs:
    """The tensors of an answer: the JSON first, `length` bytes, then the bytes of each in its order."""
    try:
        start = len(body) if length is None else int(length)
        if not 0 <= start <= len(body):
            raise ValueError(f"{_HEADER} {start} of {len(body)} bytes")
        found: dict[str, np.ndarray] = {}
        for item in _parsed(body[:start])["outputs"]:
            shape, parameters = [int(side) for side in item["shape"]], item.get("parameters", {})
            if "binary_data_size" in parameters:
                end = start + int(parameters["binary_data_size"])
                if not start <= end <= len(body):
                    raise ValueError(f"binary_data_size {end - start} of {len(body) - start} bytes")
                start, content = end, body[start:end]
            else:
                content = np.asarray(item["data"], "<f4").tobytes()
            found[str(item["name"])] = tensor(str(item["name"]), item["datatype"], shape, content)
        return found
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise Refused(
            f"it answers with something that is not the V2 protocol ({type(error).__name__}: {error})"
        ) from error
