"""A sealed model in ONNX Runtime: one decoded picture in, probabilities out; whoever runs it needs none of this code."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from image_classifier.inference.onnx_runtime import metadata_of, session_of


class SealedModel:
    """Runs a `sealed.onnx`: image uint8 [H, W, 3] -> probabilities float32 [C]."""

    def __init__(self, path: Path) -> None:
        self.session = session_of(path)
        self.classes = tuple(metadata_of(self.session).get("classes", ()))

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        return np.asarray(self.session.run(["probabilities"], {"image": image})[0])
