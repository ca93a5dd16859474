"""OpenVINO behind the seam: reads a `model.onnx` as it is, or the `model.xml` that `export --to openvino` wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from image_classifier.cpu import usable_cores
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.inference.onnx_external_data import is_self_contained
from image_classifier.inference.predictor import check_shapes


class OpenVinoBackend:
    """Runs a model on the processor: pixels uint8 [N, 3, H, W] -> logits float32 [N, C], and embeddings [N, D].

    `precision` is f32, which answers as the other backends do, or bf16, which is what OpenVINO takes by itself where the processor is faster with it.
    """

    def __init__(self, path: Path, precision: str = "f32", read: Callable[[Path], bytes] = Path.read_bytes) -> None:
        try:
            import openvino
        except ImportError as error:
            raise ConfigError(
                "the backend openvino needs a package that is not installed",
                "pip install openvino, or use --backend onnx",
            ) from error
        self.path = path
        hints: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if usable_cores() < (os.cpu_count() or 1):
            hints |= {"INFERENCE_NUM_THREADS": usable_cores()}  # it would take those of the whole machine
        with self._refusals():
            content, core = read(path), openvino.Core()
            own = path.suffix == ".xml"
            if own and not content.startswith(b"<"):
                raise ValueError("it is not OpenVINO's XML")  # but perhaps ONNX, with weights in any file
            if not own and not is_self_contained(content):
                raise ValueError("weights of it lie in another file")
            self.model = core.compile_model(
                core.read_model(content, read(path.with_suffix(".bin")) if own else b""), "CPU", hints
            )
            for found, name, kind in ((self.model.input, "pixels", "u8"), (self.model.output, "logits", "f32")):
                if found(name).element_type.get_type_name() != kind:
                    raise RuntimeError(f"its {name} are {found(name).element_type.get_type_name()}, not {kind}")

    def check(self, size: int, num_classes: int) -> None:
        """CheckpointError where the graph was made for squares of another side, or another number of classes."""
        places = {"pixels": self.model.input("pixels"), "logits": self.model.output("logits")}
        shapes = {name: place.partial_shape for name, place in places.items()}
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
        with self._refusals():
            found = self.model([pixels])
            return [np.array(found[name]) for name in names]

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """What OpenVINO cannot read or run as a CheckpointError."""
        try:
            yield
        except (RuntimeError, KeyError, ValueError, TypeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"OpenVINO cannot run {str(self.path)!r} ({reason})", "export it again, or use --backend onnx"
            ) from error
