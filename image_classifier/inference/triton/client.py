"""The backend `triton`: pixels go to a server, in batches that it takes, and come back as logits."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from image_classifier.bundle import Bundle, BundleInfo
from image_classifier.errors import ServerError
from image_classifier.inference.golden import Golden
from image_classifier.inference.triton.protocol import Address, Channel, Outputs, Refused, unusable
from image_classifier.predictions import softmax
from image_classifier.program import program

RETRIES, FIRST_WAIT_S = 5, 0.2  # each wait is twice the one before: 6 s in all
TOLERANCE = 1e-4
NAME = "triton"
T = TypeVar("T")


def model_name(info: BundleInfo) -> str:
    """The bundle's name as Triton and a URL take it."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", info.name).lstrip(".") or "model"


def channel_of(address: Address) -> Channel:
    """The way to a server that its address names."""
    if address.scheme.startswith("http"):
        from image_classifier.inference.triton.over_http import HttpChannel

        return HttpChannel(address)
    from image_classifier.inference.triton.over_grpc import GrpcChannel

    return GrpcChannel(address)


class TritonBackend:
    """A model on a Triton server: pixels uint8 [N, 3, H, W] -> logits float32 [N, C], and embeddings [N, D].

    What may pass by itself, a full queue (503) or a connection that fails, is asked again; all else is a ServerError at once.
    """

    def __init__(self, url: str, model: str, num_classes: int, timeout_s: float = 60.0) -> None:
        self.address, self.model, self.num_classes, self.timeout_s = Address.of(url), model, num_classes, timeout_s
        self.channel = channel_of(self.address)
        self.most = max(1, self._asked(lambda: self.channel.max_batch_size(model, timeout_s)))

    @classmethod
    def of(cls, bundle: Bundle, url: str, timeout_s: float = 60.0) -> TritonBackend:
        """A bundle's model on a server, which must answer one golden image as the bundle says.

        Raises:
            ServerError: It is not there, not ready, or another model.
        """
        backend = cls(url, model_name(bundle.info), len(bundle.info.classes), timeout_s)
        backend.check_golden(
            Golden.of(bundle),
            bundle.info.temperature,
            float(bundle.info.exports.get(NAME, {}).get("tolerance", TOLERANCE)),
        )
        return backend

    def check_golden(self, golden: Golden, temperature: float, tolerance: float) -> None:
        """ServerError where the first golden image gets another answer than the bundle's: readiness alone can lie."""
        probabilities = (softmax(logits, temperature) for logits in (self.logits(golden.pixels[:1]), golden.logits[:1]))
        difference = float(np.abs(np.subtract(*probabilities)).max())
        if not difference <= tolerance:
            fact = f"it answers a golden image otherwise than the bundle (difference {difference:.2g}, allowed {tolerance:g})"
            raise unusable(
                self.address,
                self.model,
                fact,
                "serve this bundle's own export: export NAME --to triton, triton start NAME",
            )

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        return self._inferred(pixels, "logits")["logits"]

    def logits_and_embeddings(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self._inferred(pixels, "logits", "embedding")
        return found["logits"], found["embedding"]

    def _inferred(self, pixels: np.ndarray, *outputs: str) -> Outputs:
        parts = [pixels[start : start + self.most] for start in range(0, len(pixels), self.most)]
        found = [self._asked(lambda part=part: self._checked(part, outputs)) for part in parts]  # type: ignore[misc]  # bound at once
        return {name: np.concatenate([part[name] for part in found]) for name in outputs}

    def _checked(self, pixels: np.ndarray, outputs: tuple[str, ...]) -> Outputs:
        found = self.channel.infer(self.model, np.ascontiguousarray(pixels), outputs, self.timeout_s)
        for name in outputs:
            if name not in found:
                raise Refused(f"its answer has no {name}, only {', '.join(found) or 'nothing'}")
            shape = found[name].shape
            if (
                len(shape) != 2
                or shape[0] != len(pixels)
                or shape[1] < 1
                or (name == "logits" and shape[1] != self.num_classes)
            ):
                raise Refused(
                    f"its {name} have the shape {list(shape)} instead of [{len(pixels)}, {self.num_classes if name == 'logits' else 'D'}]"
                )
        return found

    def _asked(self, ask: Callable[[], T]) -> T:
        """The answer, asked for again where that may help; ServerError with the reason where it does not."""
        for attempt in range(RETRIES + 1):
            try:
                return ask()
            except Refused as error:
                if not error.again or attempt == RETRIES:
                    times = f", {attempt + 1} times" if attempt else ""
                    raise unusable(self.address, self.model, f"{error}{times}", _hint(error)) from error
                time.sleep(FIRST_WAIT_S * 2**attempt)
        raise ServerError("no attempt was made")


def _hint(error: Refused) -> str:
    """What to do about the commonest reasons."""
    reason = str(error).lower()
    if "maximum queue size" in reason:
        return "ask when it has less to do, or export with a larger triton.max_queue_size"
    if "no answer within" in reason:
        return "raise server_timeout_s, or look at the server's log"
    if "unknown model" in reason:
        return f"start the server with this bundle: {program()} triton start NAME"
    return (
        f"is it running there? {program()} triton start NAME"
        if error.again or "the connection failed" in reason
        else ""
    )
