"""The backend `openvino`: runs a `model.onnx` as it is, or the `model.xml` that `export --to openvino` wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.cpu import usable_cores
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.extras import install
from image_classifier.inference.backends import OpenOptions
from image_classifier.inference.onnx_external_data import is_self_contained
from image_classifier.inference.predictor import check_shapes


def open_float32(path: Path, options: OpenOptions) -> tuple[OpenVinoBackend, Mapping[str, Any]]:
    """Return a backend that computes in float32, and no metadata; see `backends.Opener`."""
    return OpenVinoBackend(path, "f32", options.read), {}


def open_bfloat16(path: Path, options: OpenOptions) -> tuple[OpenVinoBackend, Mapping[str, Any]]:
    """Return a backend that computes in bfloat16, and no metadata; see `backends.Opener`."""
    return OpenVinoBackend(path, "bf16", options.read), {}


class OpenVinoBackend:
    """Runs a model on the processor: pixels uint8 [N, 3, H, W] -> logits float32 [N, C], and embeddings [N, D].

    `precision` is f32, which answers as the other backends do, or bf16, OpenVINO's default where that is faster.
    """

    def __init__(self, path: Path, precision: str = "f32", read: Callable[[Path], bytes] = Path.read_bytes) -> None:
        try:
            import openvino
        except ImportError as error:
            raise ConfigError(
                "the backend openvino needs a package that is not installed",
                f"{install('openvino')}, or use --backend onnx",
            ) from error
        self.path = path
        hints: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if usable_cores() < (os.cpu_count() or 1):
            hints |= {"INFERENCE_NUM_THREADS": usable_cores()}  # the default is all cores of the machine
        with self._as_checkpoint_error():
            content = read(path)
            core = openvino.Core()
            is_xml = path.suffix == ".xml"
            if is_xml and not content.startswith(b"<"):
                raise ValueError("it is not OpenVINO's XML")  # perhaps ONNX, with weights in any file
            if not is_xml and not is_self_contained(content):
                raise ValueError("its weights are in another file")
            weights = read(path.with_suffix(".bin")) if is_xml else b""
            self.model = core.compile_model(core.read_model(content, weights), "CPU", hints)
            for port, name, expected in ((self.model.input, "pixels", "u8"), (self.model.output, "logits", "f32")):
                actual = port(name).element_type.get_type_name()
                if actual != expected:
                    raise RuntimeError(f"its {name} are {actual}, not {expected}")

    def check(self, size: int, num_classes: int) -> None:
        """Raise CheckpointError where the graph was made for squares of another side, or another number of classes."""
        ports = {"pixels": self.model.input("pixels"), "logits": self.model.output("logits")}
        shapes = {name: port.partial_shape for name, port in ports.items()}
        known = {
            name: [side.get_length() if side.is_static else None for side in shape]
            for name, shape in shapes.items()
            if shape.rank.is_static
        }
        check_shapes({"pixels": [], "logits": [], **known}, size, num_classes, self.path)

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        return self._answers(pixels, "logits")[0]

    def logits_and_embeddings(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, embeddings = self._answers(pixels, "logits", "embedding")
        return logits, embeddings

    def _answers(self, pixels: np.ndarray, *names: str) -> list[np.ndarray]:
        with self._as_checkpoint_error():
            outputs = self.model([pixels])
            return [np.array(outputs[name]) for name in names]

    @contextmanager
    def _as_checkpoint_error(self) -> Iterator[None]:
        """Raise CheckpointError for a model that OpenVINO cannot read or run."""
        try:
            yield
        except (RuntimeError, KeyError, ValueError, TypeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"OpenVINO cannot run {str(self.path)!r} ({reason})", "export it again, or use --backend onnx"
            ) from error
