"""The backends by name: which file of a bundle each runs, which package it needs, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from image_classifier.bundle import Bundle
from image_classifier.errors import ConfigError
from image_classifier.inference.predictor import Backend

# A file and the packages it may take its network from -> what runs it, and what the file says of itself.
Open = Callable[[Path, Sequence[str]], tuple[Backend, Mapping[str, Any]]]


@dataclass(frozen=True)
class Kind:
    """One backend: the files of a bundle that it can run, the best first, and the package it needs, perhaps in a build that has a `provider`."""

    files: tuple[str, ...]
    package: str
    open: Open
    provider: str = ""

    def file(self, bundle: Bundle) -> str:
        """The file that it runs of this bundle; the last resort where none is there."""
        return next((name for name in self.files if name in bundle.info.files), self.files[-1])

    def fits(self, bundle: Bundle) -> bool:
        """Whether the package is installed and the bundle has a file for it."""
        return find_spec(self.package) is not None and self.file(bundle) in bundle.info.files and self._provided()

    def _provided(self) -> bool:
        if not self.provider:
            return True
        import onnxruntime

        return self.provider in onnxruntime.get_available_providers()


def _onnx(path: Path, trusted: Sequence[str], tensorrt: bool = False) -> tuple[Backend, Mapping[str, Any]]:
    from image_classifier.inference.onnx_runtime import OnnxBackend

    runner = OnnxBackend(path, tensorrt)
    return runner, runner.metadata()


def _checkpoint(path: Path, trusted: Sequence[str]) -> tuple[Backend, Mapping[str, Any]]:
    from image_classifier.inference.checkpoint import CheckpointBackend, load_classifier

    classifier, blueprint = load_classifier(path, trusted)
    return CheckpointBackend(classifier), blueprint


def _openvino(precision: str) -> Open:
    def opened(path: Path, trusted: Sequence[str]) -> tuple[Backend, Mapping[str, Any]]:
        from image_classifier.inference.openvino_runtime import OpenVinoBackend

        return OpenVinoBackend(path, precision), {}

    return opened


BACKENDS: dict[str, Kind] = {
    "onnx": Kind(("model.onnx",), "onnxruntime", _onnx),
    "checkpoint": Kind(("model.ckpt",), "torch", _checkpoint),
    "openvino": Kind(("openvino/model.xml", "model.onnx"), "openvino", _openvino("f32")),
    "openvino-bf16": Kind(("openvino/model.xml", "model.onnx"), "openvino", _openvino("bf16")),
    "int8": Kind(("model.int8.onnx",), "onnxruntime", _onnx),
    "tensorrt": Kind(("model.onnx",), "onnxruntime", partial(_onnx, tensorrt=True), "TensorrtExecutionProvider"),
}
REMOTE = "triton"  # runs no file of a bundle: a server does, whose address must be given
NAMES = (*BACKENDS, REMOTE)
EXACT = ("onnx", "checkpoint", "openvino")  # answer as the checkpoint but for rounding


def fitting(bundle: Bundle) -> list[str]:
    """The backends that are installed and whose file the bundle has."""
    return [name for name, kind in BACKENDS.items() if kind.fits(bundle)]


@dataclass(frozen=True)
class ServerAt:
    """A model server's address, null for none, and how long one of its answers may take."""

    url: str | None = None
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < float("inf"):
            raise ConfigError(f"server_timeout_s must be more than 0, not {self.timeout_s}")

    def fits(self, backend: str | None) -> None:
        """ConfigError where a backend needs an address and there is none, or there is one and it needs none."""
        if backend == REMOTE and not self.url:
            raise ConfigError("the backend triton needs the server's address", "--url http://HOST:8000 or --url grpc://HOST:8001")
        if self.url and backend != REMOTE:
            raise ConfigError(f"url={self.url!r} is for a server", f"add --backend {REMOTE}")


def open_backend(bundle: Bundle, name: str, trusted: Sequence[str] = (), server: ServerAt = ServerAt()) -> Backend:  # frozen
    """A backend over the bundle's file for it, whose hash is checked first, or over a server, which must give a golden answer first.

    Raises:
        CheckpointError: The file is missing or damaged.
        ConfigError: The package is not installed, or a server's address is missing.
        ServerError: The server does not answer, or not as the bundle.
    """
    server.fits(name)
    if name == REMOTE:
        from image_classifier.inference.triton.client import TritonBackend

        return TritonBackend.of(bundle, str(server.url), server.timeout_s)
    file = BACKENDS[name].file(bundle)
    beside = [other for other in bundle.info.files if other != file and other.rpartition(".")[0] == file.rpartition(".")[0] and "/" in file]
    bundle.verify([file, *beside])
    return BACKENDS[name].open(bundle.path(file), trusted)[0]
