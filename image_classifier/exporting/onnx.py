"""The classifier as one ONNX file: pixels uint8 [batch, 3, H, W] -> logits float32 [batch, C] and embedding [batch, D], weights inside."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from image_classifier.modeling.classifier import Classifier

OPSET = 20


def export_onnx(classifier: Classifier, image_size: int, metadata: Mapping[str, Any], path: Path) -> None:
    """Write `classifier` (on the CPU, in float32) to `path`; `metadata` goes into the file as JSON values."""
    classifier.eval()
    example = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    with _QuietExport(), torch.inference_mode(mode=False):
        program = torch.onnx.export(
            _EmbeddingAndLogits(classifier),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=["logits", "embedding"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update({key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()})
    program.save(str(path), external_data=False)


class _EmbeddingAndLogits(nn.Module):
    """Both outputs of a classifier as the forward pass, which is what is exported."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.eval()

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.classifier.answer(pixels)


class _QuietExport:
    """The exporter warns about its own internals; what matters here, parity, is measured afterwards."""

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        self._levels = {
            name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
        }
        for name in self._levels:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        self._warnings.__exit__(None, None, None)
