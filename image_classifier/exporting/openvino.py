"""Export to OpenVINO's files, model.xml and model.bin, which load faster than ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from image_classifier.errors import ConfigError
from image_classifier.exporting.parity import Parity
from image_classifier.exporting.parity_data import ParitySet, answers_of
from image_classifier.extras import install
from image_classifier.inference.openvino_runtime import OpenVinoBackend
from image_classifier.predictions import softmax

NAME = "openvino/model.xml"
TOLERANCE = 1e-3


def export_openvino(parity_set: ParitySet, directory: Path) -> dict[str, Any]:
    """Write openvino/model.xml and .bin, weights in float32, compare them with the checkpoint, and return the metadata.

    The metadata has the parity in float32, and under `bf16` that in bfloat16.

    Raises:
        ConfigError: The package is not installed.
        ParityError: It answers differently.
    """
    try:
        import openvino
    except ImportError as error:
        raise ConfigError("--to openvino needs a package that is not installed", install("openvino")) from error
    (directory / NAME).parent.mkdir()
    openvino.save_model(
        openvino.convert_model(str(parity_set.bundle.path("model.onnx"))), str(directory / NAME), compress_to_fp16=False
    )
    parities = {
        precision: _parity(parity_set, OpenVinoBackend(directory / NAME, precision)) for precision in ("f32", "bf16")
    }
    parities["f32"].check("OpenVINO", TOLERANCE)
    return {
        **parities["f32"].as_dict(),
        "tolerance": TOLERANCE,
        "bf16": parities["bf16"].as_dict(),
        "version": openvino.__version__,
    }


def _parity(parity_set: ParitySet, backend: OpenVinoBackend) -> Parity:
    logits, _ = answers_of(backend, parity_set.pixels)
    return Parity.of(
        parity_set.probabilities, softmax(logits, parity_set.bundle.info.temperature), parity_set.paths, "OpenVINO"
    )
