"""The forward pass of a network that is not being trained, by the fastest way of this machine."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from image_classifier.exporting.onnx import export_onnx, trace
from image_classifier.inference.checkpoint import CheckpointBackend
from image_classifier.inference.onnx_runtime import OnnxBackend, open_session
from image_classifier.inference.predictor import EmbeddingBackend
from image_classifier.modeling.classifier import Classifier, in_evaluation
from image_classifier.modeling.embeddings import Gather, finite, prefetched

log = logging.getLogger(__name__)

_MIN_PIXELS = 5_000_000  # a hundred images of 224 px
BATCH = 16  # images of a forward pass: as fast as larger ones on a processor, in a fraction of the memory


def fast_backend(classifier: Classifier, image_size: int, num_images: int) -> EmbeddingBackend:
    """Return what computes logits and embeddings of so many images, pixels uint8 [N, 3, S, S], in float32.

    On a processor that is ONNX Runtime, two to three times as fast as torch (docs/decisions/025), where the images
    repay the second that an export takes; on a GPU torch.
    """
    if classifier.scale.device.type != "cpu":
        return CheckpointBackend(classifier)
    # A copy: a backend changes the mode, the exporter wants channels first, and the training goes on as it was.
    network = copy.deepcopy(classifier).to(memory_format=torch.contiguous_format)
    if num_images * image_size**2 < _MIN_PIXELS:
        return CheckpointBackend(network)
    try:
        with TemporaryDirectory() as directory:
            path = Path(directory) / "model.onnx"
            export_onnx(network, image_size, {}, path)
            return OnnxBackend(path)
    except Exception as error:  # of an exporter; what cannot be exported can still be computed
        log.info("forward passes by torch: the network has no ONNX form (%s)", " ".join(str(error).split())[:120])
        return CheckpointBackend(network)


def fast_function(module: nn.Module, image_size: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return what computes a module of pixels uint8 [N, 3, S, S] in float32: by ONNX Runtime, on a GPU by torch."""
    device = next(module.parameters()).device

    def by_torch(pixels: np.ndarray) -> np.ndarray:
        with in_evaluation(module), torch.inference_mode():
            values: np.ndarray = module(torch.from_numpy(pixels).to(device)).float().cpu().numpy()
        return values

    if device.type != "cpu":
        return by_torch
    try:
        with TemporaryDirectory() as directory, in_evaluation(module):
            path = Path(directory) / "module.onnx"
            trace(copy.deepcopy(module).to(memory_format=torch.contiguous_format), image_size, ["values"], path)
            session = open_session(path)
    except Exception as error:  # of an exporter; what cannot be exported can still be computed
        log.info("forward passes by torch: the layers have no ONNX form (%s)", " ".join(str(error).split())[:120])
        return by_torch
    return lambda pixels: np.asarray(session.run(["values"], {"pixels": pixels})[0])


def forward(
    backend: EmbeddingBackend, rows: np.ndarray, gather: Gather
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield pixels uint8 [n, 3, S, S], logits float32 [n, C] and embeddings float32 [n, D] of some rows, in order.

    Raises:
        TrainingError: An embedding is not finite.
    """
    for squares in prefetched(rows, gather):
        for first in range(0, len(squares), BATCH):
            pixels = np.ascontiguousarray(squares[first : first + BATCH].transpose(0, 3, 1, 2))
            logits, embeddings = backend.logits_and_embeddings(pixels)
            yield pixels, logits, finite(embeddings)
