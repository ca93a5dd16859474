"""A Triton server over HTTP, with the standard library alone.

Specification: KServe's Open Inference Protocol V2, HTTP/REST
(https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md), with Triton's
extension "Binary Tensor Data" (https://github.com/triton-inference-server/server/blob/main/docs/protocol/
extension_binary_data.md): a JSON header of `Inference-Header-Content-Length` bytes, then the bytes of each tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import quote

import numpy as np

from image_classifier.inference.triton.protocol import MAX_ANSWER_BYTES, Address, Outputs, Refused, tensor
from image_classifier.sources.socket_deadline import SocketDeadline

_HEADER = "Inference-Header-Content-Length"


class HttpChannel:
    """A client over HTTP.

    Each request has its own connection: none can go stale, and none delays the server's shutdown.
    """

    def __init__(self, address: Address) -> None:
        self.address = address

    def ready(self, model: str, timeout_s: float) -> bool:
        routes = ("/v2/health/ready", f"/v2/models/{quote(model, safe='')}/ready")
        return all(self._request("GET", route, timeout_s)[0] == 200 for route in routes)

    def max_batch_size(self, model: str, timeout_s: float) -> int:
        content = _parsed(self._successful("GET", f"/v2/models/{quote(model, safe='')}/config", timeout_s)[1])
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
        header = json.dumps(head).encode()
        headers = {_HEADER: str(len(header)), "Content-Type": "application/octet-stream"}
        route = f"/v2/models/{quote(model, safe='')}/infer"
        answered, body = self._successful("POST", route, timeout_s, header + pixels.tobytes(), headers)
        return _outputs(answered.get(_HEADER.lower()), body)

    def _successful(
        self,
        method: str,
        route: str,
        timeout_s: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[Mapping[str, str], bytes]:
        """Return the headers and the body of an answer that is not an error."""
        status, answered, content = self._request(method, route, timeout_s, body, headers)
        if status != 200:
            raise Refused(f"{_reason(content)} (HTTP {status})", retryable=status == 503)
        return answered, content

    def _request(
        self,
        method: str,
        route: str,
        timeout_s: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Return the status, the headers (names in lower case) and the body of an answer."""
        connection_class = HTTPSConnection if self.address.scheme == "https" else HTTPConnection
        watchdog = SocketDeadline(timeout_s)
        try:
            with (
                watchdog,
                closing(connection_class(self.address.host, self.address.port, timeout=timeout_s)) as connection,
            ):
                connection.connect()
                watchdog.hold(connection.sock)
                connection.request(method, self.address.path + route, body, {"Connection": "close", **(headers or {})})
                with connection.getresponse() as response:
                    answered = {key.lower(): value for key, value in response.getheaders()}
                    return response.status, answered, _body(response, watchdog)
        except (OSError, HTTPException) as error:
            if watchdog.expired or isinstance(error, TimeoutError):
                raise Refused(f"no answer within {timeout_s:g} s") from error
            retryable = isinstance(error, (ConnectionError, IncompleteRead))
            raise Refused(f"the connection failed ({type(error).__name__}: {error})", retryable) from error


def _body(response: HTTPResponse, watchdog: SocketDeadline) -> bytes:
    """Return the full body; TimeoutError where it is not complete in time, however slowly it comes."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(2**20):
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise Refused(f"its answer is longer than {MAX_ANSWER_BYTES} bytes")
    if watchdog.expired:
        raise TimeoutError
    if response.length:
        raise Refused("its answer is cut short", retryable=True)
    return b"".join(parts)


def _reason(content: bytes) -> str:
    """Return the reason in an error answer; many are not JSON."""
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return content[:200].decode("utf-8", "replace") or "no reason given"


def _parsed(content: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refused(f"it answers with something that is not JSON ({content[:40]!r})") from error
    if not isinstance(value, dict):
        raise Refused(f"it answers with something that is not the V2 protocol ({content[:40]!r})")
    return value


def _outputs(length: str | None, body: bytes) -> Outputs:
    """Return the tensors of an answer: `length` bytes of JSON, then the bytes of each tensor in its order."""
    try:
        start = len(body) if length is None else int(length)
        if not 0 <= start <= len(body):
            raise ValueError(f"{_HEADER} {start} of {len(body)} bytes")
        outputs: dict[str, np.ndarray] = {}
        for item in _parsed(body[:start])["outputs"]:
            shape = [int(side) for side in item["shape"]]
            parameters = item.get("parameters", {})
            if "binary_data_size" in parameters:
                end = start + int(parameters["binary_data_size"])
                if not start <= end <= len(body):
                    raise ValueError(f"binary_data_size {end - start} of {len(body) - start} bytes")
                content = body[start:end]
                start = end
            else:
                with np.errstate(over="raise"):  # a number that float32 cannot hold
                    content = np.asarray(item["data"], "<f4").tobytes()
            outputs[str(item["name"])] = tensor(str(item["name"]), item["datatype"], shape, content)
        return outputs
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise Refused(
            f"it answers with something that is not the V2 protocol ({type(error).__name__}: {error})"
        ) from error
