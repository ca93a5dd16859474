"""A sealed model in ONNX Runtime: one decoded image in, probabilities out. Other programs run it without this code."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from image_classifier.bundle import Bundle
from image_classifier.errors import CheckpointError
from image_classifier.inference.onnx_runtime import one_line_reason, open_session, session_metadata

FILE = "sealed.onnx"


class SealedModel:
    """Runs a `sealed.onnx`: image uint8 [H, W, 3] -> probabilities float32 [C]."""

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        self.session = open_session(path, content=content)
        self.path = path
        self.classes = tuple(session_metadata(self.session).get("classes", ()))

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Return the probabilities float32 [C] of an image uint8 [H, W, 3]; CheckpointError where it cannot be run."""
        try:
            return np.asarray(self.session.run(["probabilities"], {"image": image})[0])
        except Exception as error:  # onnxruntime has no public base class for its errors
            raise CheckpointError(
                f"{str(self.path)!r} cannot be run on an image ({one_line_reason(error)})",
                "export it again: --to sealed",
            ) from error


class SealedSquares:
    """A bundle's sealed model as a backend, for squares of its own size, which it does not resize.

    Its logits are the logarithms of the probabilities, times the temperature.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.model = SealedModel(bundle.path(FILE), bundle.content(FILE))
        self.temperature = bundle.info.temperature

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Return logits float [N, C] of pixels uint8 [N, 3, S, S], one image at a time."""
        images = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        answers = np.stack([self.model.probabilities(image) for image in images])
        return np.asarray(self.temperature * np.log(np.maximum(answers, 1e-30)))
