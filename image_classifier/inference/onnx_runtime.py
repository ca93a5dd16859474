"""The backend `onnx`: ONNX Runtime on the processor or a GPU."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from image_classifier.cpu import usable_cores
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.inference.backends import OpenOptions
from image_classifier.inference.onnx_external_data import is_self_contained
from image_classifier.inference.predictor import check_shapes

log = logging.getLogger(__name__)

_METADATA = ("classes", "preprocess", "temperature", "decision")
_TENSORRT, _CUDA, _CPU = (f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU"))
_PROVIDER_OPTIONS = {_CUDA: {"use_tf32": "0"}}  # TF32 rounds products to 10 bits and answers differently
_MAX_REASON = 200  # characters of ONNX Runtime's own message


def open_onnx(path: Path, options: OpenOptions, tensorrt: bool = False) -> tuple[OnnxBackend, Mapping[str, Any]]:
    """Return a backend over an ONNX file, and the file's metadata; see `backends.Opener`."""
    backend = OnnxBackend(path, tensorrt, options.read(path), options.concurrent_runs)
    return backend, backend.metadata()


def open_onnx_with_tensorrt(path: Path, options: OpenOptions) -> tuple[OnnxBackend, Mapping[str, Any]]:
    """Return a backend over an ONNX file, run by TensorRT through ONNX Runtime."""
    return open_onnx(path, options, tensorrt=True)


def providers(tensorrt: bool = False) -> list[str]:
    """Return what this build of ONNX Runtime runs a model on, the best first.

    TensorRT is among them only on request, as it takes minutes to prepare a model.

    Raises:
        ConfigError: TensorRT is requested and missing.
    """
    available = onnxruntime.get_available_providers()
    if tensorrt and _TENSORRT not in available:
        raise ConfigError(
            "this ONNX Runtime has no TensorRT",
            "pip install onnxruntime-gpu on a machine with TensorRT, or use --backend onnx",
        )
    return [name for name in (_TENSORRT, _CUDA, _CPU) if name in available and (tensorrt or name != _TENSORRT)]


def open_session(
    path: Path, tensorrt: bool = False, content: bytes | None = None, concurrent_runs: int = 1
) -> onnxruntime.InferenceSession:
    """Return a session over a model, or over `content` where its bytes were read already.

    Raises:
        CheckpointError: The model cannot be run.
        ConfigError: As `providers`, or TensorRT does not load.
    """
    wanted = providers(tensorrt)
    try:
        content = path.read_bytes() if content is None else content
        if not is_self_contained(content):
            raise ValueError("its weights are in another file")
        session = _session(content, wanted, concurrent_runs)
    except Exception as error:  # onnxruntime has no public base class for its errors
        if tensorrt:
            raise ConfigError(
                f"ONNX Runtime cannot run {path.name} with TensorRT ({one_line_reason(error)})",
                "check nvidia-smi, or use --backend onnx",
            ) from error
        raise CheckpointError(
            f"{str(path)!r} is not an ONNX model that can be run ({one_line_reason(error)})", "export it again"
        ) from error
    if tensorrt and _TENSORRT not in session.get_providers():
        raise ConfigError(
            "this ONNX Runtime has TensorRT built in, but its libraries cannot be loaded",
            "check nvidia-smi, or use --backend onnx",
        )
    if _CUDA in wanted and _CUDA not in session.get_providers():
        log.warning("ONNX Runtime has CUDA built in, but its libraries cannot be loaded: the CPU is used")
    # The session keeps the bytes to try other providers later: a second copy of the weights, as long as it lives.
    session._model_bytes = None
    return session


def _session(content: bytes, wanted: list[str], concurrent_runs: int) -> onnxruntime.InferenceSession:
    """Return a session on the first provider that loads.

    ONNX Runtime's own fallback is off: it prints several lines among the answers.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Waiting threads leave the cores to decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # ONNX Runtime's own file format could refer to data that `is_self_contained` does not see.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    onnxruntime.set_default_logger_severity(4)  # `open_session` reports what does not load
    if concurrent_runs > 1:
        # Each calling thread computes too, next to the threads that all calls share.
        options.intra_op_num_threads = max(1, usable_cores() - concurrent_runs + 1)
    elif usable_cores() < (os.cpu_count() or 1):
        options.intra_op_num_threads = usable_cores()  # the default is all cores of the machine
    provider_options = [_PROVIDER_OPTIONS.get(name, {}) for name in wanted]
    try:
        return onnxruntime.InferenceSession(
            content, options, providers=wanted, provider_options=provider_options, enable_fallback=0
        )
    except Exception:
        if _TENSORRT in wanted or wanted == [_CPU]:
            raise
        return _session(content, [_CPU], concurrent_runs)


def one_line_reason(error: Exception) -> str:
    r"""Return the message of another package's error, shortened to one line.

    >>> one_line_reason(ValueError("two\n   lines"))
    'two lines'
    """
    return " ".join(str(error).split())[:_MAX_REASON]


def session_metadata(session: onnxruntime.InferenceSession) -> dict[str, Any]:
    """Return the metadata in the file: classes, preprocess, temperature, decision."""
    try:
        values = session.get_modelmeta().custom_metadata_map
        return {key: json.loads(value) for key, value in values.items() if key in _METADATA}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the metadata of an ONNX model cannot be read ({error})", "export it again") from error


class OnnxBackend:
    """Runs a `model.onnx`: pixels uint8 [N, 3, H, W] -> logits float32 [N, C], and embeddings [N, D] if it has them."""

    def __init__(
        self, path: Path, tensorrt: bool = False, content: bytes | None = None, concurrent_runs: int = 1
    ) -> None:
        self.session = open_session(path, tensorrt, content, concurrent_runs)
        self.path = path
        is_on_cpu = self.session.get_providers() == [_CPU]
        self.concurrent_runs = concurrent_runs if is_on_cpu else 1  # a GPU has one queue
        values = (*self.session.get_inputs(), *self.session.get_outputs())
        self._types = {value.name: value.type for value in values}
        self._shapes = {value.name: list(value.shape) for value in values}
        if self._types.get("pixels") != "tensor(uint8)" or self._types.get("logits") != "tensor(float)":
            raise CheckpointError(
                f"{str(path)!r} does not take pixels uint8 and return logits", "use a model exported by this package"
            )

    def check(self, size: int, num_classes: int) -> None:
        """Raise CheckpointError where the graph was made for squares of another side, or another number of classes."""
        check_shapes(self._shapes, size, num_classes, self.path)

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        return np.asarray(self._run(["logits"], pixels)[0])

    def logits_and_embeddings(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, embeddings = self._run(["logits", "embedding"], pixels)
        return np.asarray(logits), np.asarray(embeddings)

    def _run(self, outputs: Sequence[str], pixels: np.ndarray) -> list[Any]:
        try:
            return list(self.session.run(list(outputs), {"pixels": pixels}))
        except Exception as error:  # onnxruntime has no public base class for its errors
            raise CheckpointError(
                f"{str(self.path)!r} cannot be run on these images ({one_line_reason(error)})", "export it again"
            ) from error

    def metadata(self) -> dict[str, Any]:
        """Return the metadata in the file: classes, preprocess, temperature, decision."""
        return session_metadata(self.session)
