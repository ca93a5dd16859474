"""The backend `triton`: sends pixels to a Triton server, in batches that it accepts, and returns its logits."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np

from image_classifier.bundle import Bundle, BundleInfo
from image_classifier.errors import ServerError
from image_classifier.inference.golden import Golden
from image_classifier.inference.triton.protocol import Address, Channel, Outputs, Refused, unusable
from image_classifier.predictions import softmax
from image_classifier.program import program

RETRIES = 5
FIRST_WAIT_S = 0.2  # each wait is twice the one before: 6 s in all
TOLERANCE = 1e-4
NAME = "triton"
T = TypeVar("T")


def model_name(info: BundleInfo) -> str:
    """Return the bundle's name in characters that Triton and URLs accept."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", info.name).lstrip(".") or "model"


def channel_of(address: Address) -> Channel:
    """Return the channel for the scheme of an address: HTTP or gRPC."""
    if address.scheme.startswith("http"):
        from image_classifier.inference.triton.over_http import HttpChannel

        return HttpChannel(address)
    from image_classifier.inference.triton.over_grpc import GrpcChannel

    return GrpcChannel(address)


class TritonBackend:
    """A model on a Triton server: pixels uint8 [N, 3, H, W] -> logits float32 [N, C], and embeddings [N, D].

    A full queue (503) and a connection that fails are retried; everything else is a ServerError at once.
    """

    def __init__(self, url: str, model: str, num_classes: int, timeout_s: float = 60.0) -> None:
        self.address = Address.of(url)
        self.model = model
        self.num_classes = num_classes
        self.timeout_s = timeout_s
        self.channel = channel_of(self.address)
        self.max_batch_size = max(1, self._retried(lambda: self.channel.max_batch_size(model, timeout_s)))

    @classmethod
    def of(cls, bundle: Bundle, url: str, timeout_s: float = 60.0) -> TritonBackend:
        """Return a bundle's model on a server, which must answer one golden image as the bundle does.

        Raises:
            ServerError: It does not answer, is not ready, or is another model.
        """
        backend = cls(url, model_name(bundle.info), len(bundle.info.classes), timeout_s)
        tolerance = float(bundle.info.exports.get(NAME, {}).get("tolerance", TOLERANCE))
        backend.check_golden(Golden.of(bundle), bundle.info.temperature, tolerance)
        return backend

    def check_golden(self, golden: Golden, temperature: float, tolerance: float) -> None:
        """Raise ServerError where the first golden image gets another answer than the bundle's.

        Readiness alone is not enough: a server can be ready with another model of the same name.
        """
        actual = softmax(self.logits(golden.pixels[:1]), temperature)
        expected = softmax(golden.logits[:1], temperature)
        difference = float(np.abs(actual - expected).max())
        if not difference <= tolerance:
            raise unusable(
                self.address,
                self.model,
                f"its answer for a golden image differs from the bundle's by {difference:.2g} (allowed {tolerance:g})",
                "serve this bundle's export: export NAME --to triton, triton start NAME",
            )

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        return self._infer(pixels, "logits")["logits"]

    def logits_and_embeddings(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        answer = self._infer(pixels, "logits", "embedding")
        return answer["logits"], answer["embedding"]

    def _infer(self, pixels: np.ndarray, *outputs: str) -> Outputs:
        """Return the named outputs, float32 [N, ...], for pixels uint8 [N, 3, S, S]."""
        batches = [pixels[start : start + self.max_batch_size] for start in range(0, len(pixels), self.max_batch_size)]
        answers = [self._retried(partial(self._infer_batch, batch, outputs)) for batch in batches]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in outputs}

    def _infer_batch(self, pixels: np.ndarray, outputs: tuple[str, ...]) -> Outputs:
        answer = self.channel.infer(self.model, np.ascontiguousarray(pixels), outputs, self.timeout_s)
        for name in outputs:
            if name not in answer:
                raise Refused(f"its answer has no {name}, only {', '.join(answer) or 'nothing'}")
            shape = answer[name].shape
            is_matrix = len(shape) == 2 and shape[0] == len(pixels) and shape[1] >= 1
            if not is_matrix or (name == "logits" and shape[1] != self.num_classes):
                width = self.num_classes if name == "logits" else "D"
                raise Refused(f"its {name} have the shape {list(shape)} instead of [{len(pixels)}, {width}]")
        return answer

    def _retried(self, call: Callable[[], T]) -> T:
        """Return the result of a call, repeated where that may help; ServerError with the reason where it does not."""
        for attempt in range(RETRIES + 1):
            try:
                return call()
            except Refused as error:
                if not error.retryable or attempt == RETRIES:
                    times = f", {attempt + 1} times" if attempt else ""
                    raise unusable(self.address, self.model, f"{error}{times}", _hint(error)) from error
                time.sleep(FIRST_WAIT_S * 2**attempt)
        raise ServerError("no attempt was made")


def _hint(error: Refused) -> str:
    """Return what to do about the commonest reasons."""
    reason = str(error).lower()
    if "maximum queue size" in reason:
        return "try again when it is less busy, or export with a larger triton.max_queue_size"
    if "no answer within" in reason:
        return "raise server_timeout_s, or look at the server's log"
    if "unknown model" in reason:
        return f"start the server with this bundle: {program()} triton start NAME"
    if error.retryable or "the connection failed" in reason:
        return f"is it running there? {program()} triton start NAME"
    return ""
