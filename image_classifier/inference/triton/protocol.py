"""What the two ways to a Triton server share: its address, what is asked and answered, and how an answer may fail."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import numpy as np

from image_classifier.errors import ConfigError, ServerError

PORTS = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}
MOST_BYTES = 256 * 2**20  # of one answer

Outputs = Mapping[str, np.ndarray]


class Refused(Exception):  # it is an answer
    """The server, or the network before it, said no; `again` where the same request may succeed a little later."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(" ".join(reason.split())[:300])
        self.again = again


class Channel(Protocol):
    """One way to a server; each method raises Refused."""

    def ready(self, model: str, timeout_s: float) -> bool:
        """Whether server and model say that they are ready."""
        ...

    def max_batch_size(self, model: str, timeout_s: float) -> int:
        """The most images in a request; 0: the model knows no batches."""
        ...

    def infer(self, model: str, pixels: np.ndarray, outputs: Sequence[str], timeout_s: float) -> Outputs:
        """The named outputs, float32, for pixels uint8 [N, 3, S, S]."""
        ...


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @classmethod
    def of(cls, url: str) -> Address:
        """That of `http://host:port`, `https://…`, `grpc://…` or `grpcs://…`; ConfigError for anything else."""
        try:
            parts = urlsplit(url)
            scheme, host, port = parts.scheme, parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(
                f"url={url!r} is no address ({error})", "write http://HOST:8000 or grpc://HOST:8001"
            ) from error
        if (
            scheme not in PORTS
            or not host
            or parts.query
            or parts.fragment
            or "@" in parts.netloc
            or (scheme.startswith("grpc") and parts.path.strip("/"))
        ):
            raise ConfigError(
                f"url={url!r} is no address of a Triton server", "write http://HOST:8000 or grpc://HOST:8001"
            )
        return cls(scheme, host, PORTS[scheme] if port is None else port, parts.path.rstrip("/"))

    @property
    def target(self) -> str:
        """Host and port in one."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.target}{self.path}"


def tensor(name: str, datatype: object, shape: Sequence[int], content: bytes) -> np.ndarray:
    """One output of an answer, a writable float32 array; Refused where its bytes are not what is said of them."""
    if datatype != "FP32":
        raise Refused(f"its {name} is {datatype}, not FP32")
    if min(shape, default=0) < 0 or len(content) != 4 * math.prod(shape):
        raise Refused(f"its {name} of shape {list(shape)} has {len(content)} bytes")
    try:
        return np.frombuffer(content, "<f4").astype(np.float32).reshape(shape)
    except ValueError as error:  # more sides than numpy knows
        raise Refused(f"its {name} have {len(shape)} sides") from error


def unusable(address: object, model: str, reason: object, hint: str = "") -> ServerError:
    """The one line for a server that cannot be used."""
    return ServerError(f"the model {model!r} at {address} cannot be used: {reason}", hint)
