"""OpenVINO's own files, model.xml and model.bin, which load faster than ONNX and hold half the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from image_classifier.errors import ConfigError
from image_classifier.exporting.parity import Parity
from image_classifier.exporting.parity_data import ParitySet, answers_of
from image_classifier.inference.openvino_runtime import OpenVinoBackend
from image_classifier.predictions import softmax

NAME = "openvino/model.xml"
TOLERANCE = 1e-3


def export_openvino(reference: ParitySet, directory: Path) -> dict[str, Any]:
    """Write openvino/model.xml and .bin, weights in float32, and hold them against the checkpoint; what was found, in float32 and in bfloat16.

    Raises:
        ConfigError: The package is not installed.
        ParityError: It answers otherwise.
    """
    try:
        import openvino
    except ImportError as error:
        raise ConfigError("--to openvino needs a package that is not installed", "pip install openvino") from error
    (directory / NAME).parent.mkdir()
    openvino.save_model(
        openvino.convert_model(str(reference.bundle.path("model.onnx"))), str(directory / NAME), compress_to_fp16=False
    )
    found = {
        precision: _parity(reference, OpenVinoBackend(directory / NAME, precision)) for precision in ("f32", "bf16")
    }
    found["f32"].check("OpenVINO", TOLERANCE)
    return {
        **found["f32"].as_dict(),
        "tolerance": TOLERANCE,
        "bf16": found["bf16"].as_dict(),
        "version": openvino.__version__,
    }


def _parity(reference: ParitySet, backend: OpenVinoBackend) -> Parity:
    logits, _ = answers_of(backend, reference.pixels)
    return Parity.of(
        reference.probabilities, softmax(logits, reference.bundle.info.temperature), reference.paths, "OpenVINO"
    )
