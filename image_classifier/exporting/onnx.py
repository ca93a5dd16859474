"""Export to one ONNX file with its weights.

Pixels uint8 [batch, 3, H, W] -> logits float32 [batch, C] and embedding float32 [batch, D].
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from image_classifier.exporting.parity import TOLERANCE, Parity, check_embeddings
from image_classifier.exporting.parity_data import ParitySet, answers_of
from image_classifier.inference.onnx_runtime import OnnxBackend
from image_classifier.modeling.classifier import Classifier
from image_classifier.predictions import softmax

log = logging.getLogger(__name__)

NAME = "model.onnx"
OPSET = 20
_METADATA = ("classes", "preprocess", "normalise", "temperature", "decision")
_EXPORTER_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
_GRAPH_PRINTER = "_jit_onnx_log"


def export_onnx(classifier: Classifier, image_size: int, metadata: Mapping[str, Any], path: Path) -> None:
    """Write `classifier` (on the CPU, in float32) to `path`, with `metadata` as JSON values in the file.

    The TorchScript exporter, which takes a second, comes first; a network that it cannot trace goes through
    `torch.export`, which takes ten (docs/decisions/025).
    """
    import onnx

    classifier.eval()
    with _quiet_exporter(), torch.inference_mode(mode=False):
        if not _traced(classifier, image_size, path):
            _torch_export(classifier, image_size, path)
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()})
    onnx.save(model, str(path))


def _traced(classifier: Classifier, image_size: int, path: Path) -> bool:
    """Write a trace to `path`; return whether it is right for a batch of another size than it was traced with."""
    try:
        trace(_EmbeddingAndLogits(classifier), image_size, ["logits", "embedding"], path)
        pixels = np.random.default_rng(0).integers(0, 256, (3, 3, image_size, image_size), np.uint8)
        with torch.no_grad():
            expected = classifier(torch.from_numpy(pixels)).numpy()
        actual = OnnxBackend(path).logits(pixels)
    except Exception as error:  # the exporter raises anything
        log.debug("the TorchScript exporter refuses the network: %s", error)
        return False
    return actual.shape == expected.shape and bool(np.allclose(softmax(actual), softmax(expected), atol=TOLERANCE))


def trace(module: nn.Module, image_size: int, outputs: Sequence[str], path: Path) -> None:
    """Write a module that takes `pixels` uint8 [batch, 3, S, S] by the TorchScript exporter, for any batch."""
    with _quiet_exporter(), torch.inference_mode(mode=False):
        torch.onnx.export(
            module.eval(),
            (_example(image_size),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=list(outputs),
            dynamic_axes={name: {0: "batch"} for name in ("pixels", *outputs)},
        )


def _torch_export(classifier: Classifier, image_size: int, path: Path) -> None:
    program = torch.onnx.export(
        _EmbeddingAndLogits(classifier),
        (_example(image_size),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["pixels"],
        output_names=["logits", "embedding"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    program.save(str(path), external_data=False)


def _example(image_size: int) -> torch.Tensor:
    return torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)


def re_export(parity_set: ParitySet, directory: Path) -> dict[str, Any]:
    """Write model.onnx again from the checkpoint, compare it with that, and return its metadata for bundle.json.

    For another version of the exporter, or a file that was lost.

    Raises:
        ParityError: It answers differently.
    """
    info = parity_set.bundle.info
    path = directory / NAME
    metadata = {key: getattr(info, key) for key in _METADATA}
    export_onnx(parity_set.checkpoint.classifier, parity_set.preprocess.size, metadata, path)
    logits, embeddings = answers_of(OnnxBackend(path), parity_set.pixels)
    probabilities = softmax(logits, info.temperature)
    parity = Parity.of(parity_set.probabilities, probabilities, parity_set.paths, NAME).check(NAME)
    check_embeddings(parity_set.embeddings, embeddings, parity_set.paths, NAME)
    return {**parity.as_dict(), "tolerance": TOLERANCE, "opset": OPSET}


class _EmbeddingAndLogits(nn.Module):
    """A classifier whose forward pass returns both outputs: the exporter exports the forward pass."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.eval()

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.classifier.answer(pixels)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hide the exporter's warnings about its own internals; parity is measured afterwards."""
    # It prints the graph of a network that it refuses, whatever `verbose` says: its own switch is always on.
    printer = getattr(torch._C, _GRAPH_PRINTER, None)
    setattr(torch._C, _GRAPH_PRINTER, lambda *_: None)
    levels = {name: logging.getLogger(name).level for name in _EXPORTER_LOGGERS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            setattr(torch._C, _GRAPH_PRINTER, printer)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
