"""The common part of the HTTP and gRPC clients of a Triton server: addresses, channels, tensors and refusals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import numpy as np

from image_classifier.errors import ConfigError, ServerError

PORTS = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}
MAX_ANSWER_BYTES = 256 * 2**20

Outputs = Mapping[str, np.ndarray]


class Refused(Exception):  # not an error of this program
    """A refusal by the server or the network; `retryable` where the same request may succeed a little later."""

    def __init__(self, reason: str, retryable: bool = False) -> None:
        super().__init__(" ".join(reason.split())[:300])
        self.retryable = retryable


class Channel(Protocol):
    """A connection to a server over one protocol; each method raises Refused."""

    def ready(self, model: str, timeout_s: float) -> bool:
        """Return whether server and model report that they are ready."""
        ...

    def max_batch_size(self, model: str, timeout_s: float) -> int:
        """Return the largest number of images in a request; 0: the model takes no batches."""
        ...

    def infer(self, model: str, pixels: np.ndarray, outputs: Sequence[str], timeout_s: float) -> Outputs:
        """Return the named outputs, float32 [N, ...], for pixels uint8 [N, 3, S, S]."""
        ...


@dataclass(frozen=True)
class Address:
    """The address of a server."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @classmethod
    def of(cls, url: str) -> Address:
        """Parse `http://host:port`, `https://…`, `grpc://…` or `grpcs://…`; ConfigError for anything else.

        >>> Address.of("grpc://localhost").target, str(Address.of("http://[::1]:9000/triton/"))
        ('localhost:8001', 'http://[::1]:9000/triton')
        """
        try:
            parts = urlsplit(url)
            scheme, host, port = parts.scheme, parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"invalid url {url!r}: {error}", "write http://HOST:8000 or grpc://HOST:8001") from error
        if (
            scheme not in PORTS
            or not host
            or parts.query
            or parts.fragment
            or "@" in parts.netloc
            or (scheme.startswith("grpc") and parts.path.strip("/"))
        ):
            raise ConfigError(
                f"invalid url {url!r}: not the address of a Triton server", "write http://HOST:8000 or grpc://HOST:8001"
            )
        return cls(scheme, host, PORTS[scheme] if port is None else port, parts.path.rstrip("/"))

    @property
    def target(self) -> str:
        """Host and port, separated by a colon."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.target}{self.path}"


def tensor(name: str, datatype: object, shape: Sequence[int], content: bytes) -> np.ndarray:
    """Return one output of an answer as a writable float32 array; Refused where its bytes do not fit type and shape.

    >>> tensor("logits", "FP32", [1, 2], bytes(8))
    array([[0., 0.]], dtype=float32)
    """
    if datatype != "FP32":
        raise Refused(f"its {name} is {datatype}, not FP32")
    if min(shape, default=0) < 0 or len(content) != 4 * math.prod(shape):
        raise Refused(f"its {name} of shape {list(shape)} has {len(content)} bytes")
    try:
        return np.frombuffer(content, "<f4").astype(np.float32).reshape(shape)
    except ValueError as error:  # more dimensions than numpy supports
        raise Refused(f"its {name} have {len(shape)} dimensions") from error


def unusable(address: object, model: str, reason: object, hint: str = "") -> ServerError:
    """Return the error for a server that cannot be used."""
    return ServerError(f"the model {model!r} at {address} cannot be used: {reason}", hint)
