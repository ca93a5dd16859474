"""An engine for this machine's GPU. It is native code and belongs to one GPU, so the bundle keeps what was found of it, and not the engine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16

from image_classifier.errors import ParityError
from image_classifier.exporting.parity import Parity, check_embeddings
from image_classifier.exporting.parity_data import ParitySet, answers_of
from image_classifier.inference.tensorrt.backend import opened
from image_classifier.inference.tensorrt.engine import EngineSettings
from image_classifier.predictions import softmax


def export_tensorrt(reference: ParitySet, directory: Path, asked: EngineSettings) -> dict[str, Any]:
    """Build an engine and hold it against the checkpoint; what was found. With fp16 write model.fp16.onnx, from which it is built again elsewhere.

    Raises:
        CheckpointError: TensorRT refuses the model.
        ConfigError: TensorRT or a GPU is missing.
        ParityError: It answers otherwise, and is not kept.
    """
    info, model = reference.bundle.info, reference.bundle.path("model.onnx")
    if asked.precision == "fp16":
        model = directory / asked.file
        write_halves(reference.bundle.path("model.onnx"), model)
    backend, kept = opened(reference.bundle, model, asked, anew=True)
    try:
        logits, embeddings = answers_of(backend, reference.pixels)
        parity = Parity.of(
            reference.probabilities, softmax(logits, info.temperature), reference.paths, "TensorRT"
        ).check("TensorRT", asked.tolerance)
        check_embeddings(reference.embeddings, embeddings, reference.paths, "TensorRT", asked.tolerance)
    except ParityError:
        kept.forget()
        raise
    machine = {key: kept.facts[key] for key in ("gpu", "compute_capability", "driver", "tensorrt")}
    return {**parity.as_dict(), "tolerance": asked.tolerance, **asdict(asked), **machine}


def write_halves(source: Path, target: Path) -> None:
    """A model with weights and arithmetic in float16; inputs and outputs stay, and what it says of itself."""
    onnx.save(convert_float_to_float16(onnx.load(str(source)), keep_io_types=True), str(target))
