"""model.onnx anew from the checkpoint, as `train` wrote it: for another version of the exporter, or where the file was lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from image_classifier.exporting.onnx import OPSET, export_onnx
from image_classifier.exporting.parity import TOLERANCE, Parity, check_embeddings
from image_classifier.exporting.parity_data import ParitySet, answers_of
from image_classifier.inference.onnx_runtime import OnnxBackend
from image_classifier.predictions import softmax

NAME = "model.onnx"


def re_export(reference: ParitySet, directory: Path) -> dict[str, Any]:
    """Write model.onnx and hold it against the checkpoint; what was found.

    Raises:
        ParityError: It answers otherwise.
    """
    info = reference.bundle.info
    facts = {key: getattr(info, key) for key in ("classes", "preprocess", "normalise", "temperature", "decision")}
    export_onnx(reference.checkpoint.classifier, reference.preprocess.size, facts, directory / NAME)
    logits, embeddings = answers_of(OnnxBackend(directory / NAME), reference.pixels)
    parity = Parity.of(reference.probabilities, softmax(logits, info.temperature), reference.paths, NAME).check(NAME)
    check_embeddings(reference.embeddings, embeddings, reference.paths, NAME)
    return {**parity.as_dict(), "tolerance": TOLERANCE, "opset": OPSET}
