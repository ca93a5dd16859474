"""Export to a TensorRT engine for this machine's GPU.

An engine is native code for one GPU: the bundle keeps its metadata, the engine cache of this machine keeps the engine.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16

from image_classifier.errors import ParityError
from image_classifier.exporting.parity import Parity, check_embeddings
from image_classifier.exporting.parity_data import ParitySet, answers_of
from image_classifier.inference.tensorrt.backend import open_engine
from image_classifier.inference.tensorrt.engine import EngineSettings
from image_classifier.predictions import softmax


def export_tensorrt(parity_set: ParitySet, directory: Path, settings: EngineSettings) -> dict[str, Any]:
    """Build an engine, compare it with the checkpoint, and return the metadata.

    With fp16 also write model.fp16.onnx, from which an engine is built on other machines.

    Raises:
        CheckpointError: TensorRT refuses the model.
        ConfigError: TensorRT or a GPU is missing.
        ParityError: It answers differently, and is not kept.
    """
    bundle = parity_set.bundle
    model = bundle.path("model.onnx")
    if settings.precision == "fp16":
        model = directory / settings.file
        write_float16(bundle.path("model.onnx"), model)
    backend, cache = open_engine(bundle, model, settings, rebuild=True)
    try:
        logits, embeddings = answers_of(backend, parity_set.pixels)
        probabilities = softmax(logits, bundle.info.temperature)
        parity = Parity.of(parity_set.probabilities, probabilities, parity_set.paths, "TensorRT")
        parity.check("TensorRT", settings.tolerance)
        check_embeddings(parity_set.embeddings, embeddings, parity_set.paths, "TensorRT", settings.tolerance)
    except ParityError:
        cache.remove()
        raise
    machine = {key: cache.key[key] for key in ("gpu", "compute_capability", "driver", "tensorrt")}
    return {**parity.as_dict(), "tolerance": settings.tolerance, **asdict(settings), **machine}


def write_float16(source: Path, target: Path) -> None:
    """Write a model with weights and arithmetic in float16; its inputs, outputs and metadata do not change."""
    onnx.save(convert_float_to_float16(onnx.load(str(source)), keep_io_types=True), str(target))
