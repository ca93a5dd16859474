"""OpenVINO behind the seam: reads a `model.onnx` as it is, or the `model.xml` that `export --to openvino` wrote."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.inference.predictor import cores


class OpenVinoBackend:
    """Runs a model on the processor: pixels uint8 [N, 3, H, W] -> logits float32 [N, C], and embeddings [N, D].

    `precision` is f32, which answers as the other backends do, or bf16, which is what OpenVINO takes by itself where the processor is faster with it.
    """

    def __init__(self, path: Path, precision: str = "f32") -> None:
        try:
            import openvino
        except ImportError as error:
            raise ConfigError("the backend openvino needs a package that is not installed", "pip install openvino, or use --backend onnx") from error
        hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"} | (
            {"INFERENCE_NUM_THREADS": cores()} if cores() < (os.cpu_count() or 1) else {}
        )
        try:
            self.model = openvino.Core().compile_model(str(path), "CPU", hints)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"OpenVINO cannot run {str(path)!r} ({reason})", "export it again, or use --backend onnx") from error

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        return np.array(self.model([pixels])["logits"])

    def logits_and_embeddings(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self.model([pixels])
        return np.array(found["logits"]), np.array(found["embedding"])
