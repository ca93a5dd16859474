"""A sealed model in ONNX Runtime: one decoded picture in, probabilities out; whoever runs it needs none of this code."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from image_classifier.bundle import Bundle
from image_classifier.errors import CheckpointError
from image_classifier.inference.onnx_runtime import metadata_of, session_of

FILE = "sealed.onnx"


class SealedModel:
    """Runs a `sealed.onnx`: image uint8 [H, W, 3] -> probabilities float32 [C]."""

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        self.session, self.path = session_of(path, content=content), path
        self.classes = tuple(metadata_of(self.session).get("classes", ()))

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(self.session.run(["probabilities"], {"image": image})[0])
        except Exception as error:  # onnxruntime has no public base class for its errors
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{str(self.path)!r} cannot be run on a picture ({reason})", "export it again: --to sealed"
            ) from error


class SealedSquares:
    """A bundle's sealed model as a backend for squares of its own size, which it need not resize: the logarithms of its answers are the logits."""

    def __init__(self, bundle: Bundle) -> None:
        self.model = SealedModel(bundle.path(FILE), bundle.content(FILE))
        self.temperature = bundle.info.temperature

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        images = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        answers = np.stack([self.model.probabilities(image) for image in images])
        return np.asarray(self.temperature * np.log(np.maximum(answers, 1e-30)))
