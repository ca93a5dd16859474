"""ONNX Runtime behind the seam."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from image_classifier.errors import CheckpointError

_FACTS = ("classes", "preprocess", "temperature", "decision")


def session_of(path: Path) -> onnxruntime.InferenceSession:
    """A model ready to run; CheckpointError where it cannot be."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no public base class for its errors
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{str(path)!r} is not an ONNX model that can be run ({reason})", "export it again") from error


def metadata_of(session: onnxruntime.InferenceSession) -> dict[str, Any]:
    """What the file says of itself: classes, preprocess, temperature, decision."""
    found = session.get_modelmeta().custom_metadata_map
    return {key: json.loads(value) for key, value in found.items() if key in _FACTS}


class OnnxBackend:
    """Runs a `model.onnx`: pixels uint8 [N, 3, H, W] -> logits float32 [N, C], and embeddings [N, D] in files that have them."""

    def __init__(self, path: Path) -> None:
        self.session = session_of(path)

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        return np.asarray(self.session.run(["logits"], {"pixels": pixels})[0])

    def logits_and_embeddings(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, embeddings = self.session.run(["logits", "embedding"], {"pixels": pixels})
        return np.asarray(logits), np.asarray(embeddings)

    def metadata(self) -> dict[str, Any]:
        """What the file says of itself: classes, preprocess, temperature, decision."""
        return metadata_of(self.session)
