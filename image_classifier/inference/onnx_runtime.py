"""ONNX Runtime behind the seam."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from image_classifier.cpu import usable_cores
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.inference.onnx_external_data import is_self_contained
from image_classifier.inference.predictor import check_shapes

log = logging.getLogger(__name__)

_FACTS = ("classes", "preprocess", "temperature", "decision")
_TENSORRT, _CUDA, _CPU = (f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU"))
_OPTIONS = {_CUDA: {"use_tf32": "0"}}  # products rounded to 10 bits are not what the checkpoint answers


def providers(tensorrt: bool = False) -> list[str]:
    """What this build of ONNX Runtime runs a model on, the best first; TensorRT, which takes minutes to get ready, where it is asked for.

    Raises:
        ConfigError: TensorRT is asked for and is not there.
    """
    available = onnxruntime.get_available_providers()
    if tensorrt and _TENSORRT not in available:
        raise ConfigError(
            "this ONNX Runtime has no TensorRT",
            "pip install onnxruntime-gpu on a machine with TensorRT, or use --backend onnx",
        )
    return [name for name in (_TENSORRT, _CUDA, _CPU) if name in available and (tensorrt or name != _TENSORRT)]


def session_of(
    path: Path, tensorrt: bool = False, content: bytes | None = None, callers: int = 1
) -> onnxruntime.InferenceSession:
    """A model ready to run, of `content` where its bytes are read already, by so many threads at once.

    Raises:
        CheckpointError: It cannot be run.
        ConfigError: As `providers`, or TensorRT does not load.
    """
    places = providers(tensorrt)
    try:
        content = path.read_bytes() if content is None else content
        if not is_self_contained(content):
            raise ValueError("weights of it lie in another file")
        session = _session(content, places, callers)
    except Exception as error:  # onnxruntime has no public base class for its errors
        reason = " ".join(str(error).split())[:200]
        if tensorrt:
            raise ConfigError(
                f"ONNX Runtime cannot run {path.name} with TensorRT ({reason})",
                "look at nvidia-smi, or use --backend onnx",
            ) from error
        raise CheckpointError(
            f"{str(path)!r} is not an ONNX model that can be run ({reason})", "export it again"
        ) from error
    if tensorrt and _TENSORRT not in session.get_providers():
        raise ConfigError(
            "this ONNX Runtime was built for TensorRT, which does not load here",
            "look at nvidia-smi, or use --backend onnx",
        )
    if _CUDA in places and _CUDA not in session.get_providers():
        log.warning("ONNX Runtime was built for CUDA, which does not load here: the processor is used")
    session._model_bytes = (
        None  # kept for other providers to be tried later, as long as the session lives: a second copy of the weights
    )
    return session


def _session(content: bytes, places: list[str], callers: int) -> onnxruntime.InferenceSession:
    """A session on the first of these that loads. ONNX Runtime's own way to the next one is off: it prints among the answers, in several lines."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # threads that wait leave the cores to decoding
    options.add_session_config_entry(
        "session.load_model_format", "ONNX"
    )  # its own format could hold what `is_self_contained` does not see
    onnxruntime.set_default_logger_severity(4)  # `session_of` says what does not load
    chosen = [_OPTIONS.get(name, {}) for name in places]
    if callers > 1:
        options.intra_op_num_threads = max(
            1, usable_cores() - callers + 1
        )  # whoever calls computes too, beside threads that all of them share
    elif usable_cores() < (os.cpu_count() or 1):
        options.intra_op_num_threads = usable_cores()  # it would take those of the whole machine
    try:
        return onnxruntime.InferenceSession(
            content, options, providers=places, provider_options=chosen, enable_fallback=0
        )
    except Exception:
        if _TENSORRT in places or places == [_CPU]:
            raise
        return _session(content, [_CPU], callers)


def metadata_of(session: onnxruntime.InferenceSession) -> dict[str, Any]:
    """What the file says of itself: classes, preprocess, temperature, decision."""
    try:
        found = session.get_modelmeta().custom_metadata_map
        return {key: json.loads(value) for key, value in found.items() if key in _FACTS}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"an ONNX model says of itself what cannot be read ({error})", "export it again"
        ) from error


class OnnxBackend:
    """Runs a `model.onnx`: pixels uint8 [N, 3, H, W] -> logits float32 [N, C], and embeddings [N, D] in files that have them."""

    def __init__(self, path: Path, tensorrt: bool = False, content: bytes | None = None, callers: int = 1) -> None:
        self.session, self.path = session_of(path, tensorrt, content, callers), path
        self.callers = callers if self.session.get_providers() == [_CPU] else 1  # a GPU has one queue
        self._form = {
            value.name: (value.type, value.shape) for value in (*self.session.get_inputs(), *self.session.get_outputs())
        }
        if (
            self._form.get("pixels", ("",))[0] != "tensor(uint8)"
            or self._form.get("logits", ("",))[0] != "tensor(float)"
        ):
            raise CheckpointError(
                f"{str(path)!r} does not take pixels uint8 and answer with logits",
                "use a model exported by this package",
            )

    def check(self, size: int, num_classes: int) -> None:
        """CheckpointError where the graph was made for squares of another side, or another number of classes."""
        check_shapes({name: list(shape) for name, (_, shape) in self._form.items()}, size, num_classes, self.path)

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        return np.asarray(self._run(["logits"], pixels)[0])

    def logits_and_embeddings(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, embeddings = self._run(["logits", "embedding"], pixels)
        return np.asarray(logits), np.asarray(embeddings)

    def _run(self, outputs: Sequence[str], pixels: np.ndarray) -> list[Any]:
        try:
            return list(self.session.run(list(outputs), {"pixels": pixels}))
        except Exception as error:  # onnxruntime has no public base class for its errors
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{str(self.path)!r} cannot be run on these images ({reason})", "export it again"
            ) from error

    def metadata(self) -> dict[str, Any]:
        """What the file says of itself: classes, preprocess, temperature, decision."""
        return metadata_of(self.session)
