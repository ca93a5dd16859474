"""The backends by name: which file of a bundle each runs, which package it needs, and how it is opened."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from image_classifier.bundle import Bundle
from image_classifier.errors import ConfigError
from image_classifier.inference.predictor import Backend
from image_classifier.inference.tensorrt import engine as tensorrt

log = logging.getLogger(__name__)

# Reads a file: the bytes that are run are those that were compared with a hash, where there is one.
Read = Callable[[Path], bytes]
# A file, the packages it may take its network from, what reads files, how many will ask at once -> what runs it, and what the file says of itself.
Open = Callable[[Path, Sequence[str], Read, int], tuple[Backend, Mapping[str, Any]]]


@dataclass(frozen=True)
class BackendSpec:
    """One backend: the files of a bundle that it can run, the best first, and whether what runs them is installed.

    A probability may differ by `tolerance` from the checkpoint's, unless its export says otherwise; `mend` is what to do where it differs more.
    """

    files: tuple[str, ...]
    installed: Callable[[], bool]
    open: Open
    tolerance: float = 1e-4
    mend: str = ""

    def file(self, bundle: Bundle) -> str:
        """The file that it runs of this bundle; the last resort where none is there."""
        return next((name for name in self.files if name in bundle.info.files), self.files[-1])

    def fits(self, bundle: Bundle) -> bool:
        """Whether it is installed and the bundle has a file for it."""
        return self.file(bundle) in bundle.info.files and self.installed()


def _package(name: str) -> Callable[[], bool]:
    return lambda: find_spec(name) is not None


def _tensorrt_in_onnx_runtime() -> bool:
    import onnxruntime

    return "TensorrtExecutionProvider" in onnxruntime.get_available_providers()


def _onnx(
    path: Path, trusted: Sequence[str], read: Read, callers: int, tensorrt: bool = False
) -> tuple[Backend, Mapping[str, Any]]:
    from image_classifier.inference.onnx_runtime import OnnxBackend

    runner = OnnxBackend(path, tensorrt, read(path), callers)
    return runner, runner.metadata()


def _checkpoint(path: Path, trusted: Sequence[str], read: Read, callers: int) -> tuple[Backend, Mapping[str, Any]]:
    from image_classifier.inference.checkpoint import CheckpointBackend, load_classifier

    classifier, blueprint = load_classifier(path, trusted)
    return CheckpointBackend(classifier), blueprint


def _openvino(precision: str) -> Open:
    def opened(path: Path, trusted: Sequence[str], read: Read, callers: int) -> tuple[Backend, Mapping[str, Any]]:
        from image_classifier.inference.openvino_runtime import OpenVinoBackend

        return OpenVinoBackend(path, precision, read), {}

    return opened


def _has_tensorrt() -> bool:
    return tensorrt.usable() or _tensorrt_in_onnx_runtime()


_OPENVINO, _FLOAT32 = ("openvino/model.xml", "model.onnx"), "use --backend openvino, which computes in float32"
BACKENDS: dict[str, BackendSpec] = {
    "onnx": BackendSpec(("model.onnx",), _package("onnxruntime"), _onnx, mend="export it again: --to onnx"),
    "checkpoint": BackendSpec(
        ("model.ckpt",), _package("torch"), _checkpoint, mend="copy the bundle anew, or train again"
    ),
    "openvino": BackendSpec(_OPENVINO, _package("openvino"), _openvino("f32"), mend="export it again: --to openvino"),
    "openvino-bf16": BackendSpec(
        _OPENVINO, _package("openvino"), _openvino("bf16"), 2e-2, _FLOAT32
    ),  # 8 bits of a number are kept
    "int8": BackendSpec(("model.int8.onnx",), _package("onnxruntime"), _onnx, mend="export it again: --to int8"),
    tensorrt.NAME: BackendSpec(
        tensorrt.FILES, _has_tensorrt, partial(_onnx, tensorrt=True), tensorrt.TOLERANCE["tf32"], "use --backend onnx"
    ),
}
REMOTE = "triton"  # runs no file of a bundle: a server does, whose address must be given
NAMES = (*BACKENDS, REMOTE)
EXACT = ("onnx", "checkpoint", "openvino")  # answer as the checkpoint but for rounding


def fitting(bundle: Bundle) -> list[str]:
    """The backends that are installed and whose file the bundle has."""
    return [name for name, kind in BACKENDS.items() if kind.fits(bundle)]


def exported(bundle: Bundle, name: str) -> bool:
    """Whether the bundle has this form, which its export held against the checkpoint."""
    found = bundle.info.exports.get(name)
    return isinstance(found, dict) and "refused" not in found


def takes_minutes(bundle: Bundle, name: str) -> bool:
    """Whether this backend has something to build before its first answer."""
    if name != tensorrt.NAME:
        return False
    if not tensorrt.usable():
        return True
    from image_classifier.inference.tensorrt.cache import EngineCache

    asked = tensorrt.EngineSettings.of(bundle)
    return not EngineCache.of(bundle.path(asked.file), asked).is_there


@dataclass(frozen=True)
class ServerAddress:
    """A model server's address, null for none, and how long one of its answers may take."""

    url: str | None = None
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < float("inf"):
            raise ConfigError(f"server_timeout_s must be more than 0, not {self.timeout_s}")

    def fits(self, backend: str | None) -> None:
        """ConfigError where a backend needs an address and there is none, or there is one and it needs none."""
        if backend == REMOTE and not self.url:
            raise ConfigError(
                "the backend triton needs the server's address", "--url http://HOST:8000 or --url grpc://HOST:8001"
            )
        if self.url and backend != REMOTE:
            raise ConfigError(f"url={self.url!r} is for a server", f"add --backend {REMOTE}")


def open_backend(
    bundle: Bundle, name: str, trusted: Sequence[str] = (), server: ServerAddress = ServerAddress(), callers: int = 1
) -> Backend:  # frozen
    """A backend over the bundle's file for it, whose hash is checked first, or over a server, which must give a golden answer first.

    Where `callers` are more than one, a backend that can run batches beside each other leaves each of them its share of the cores.

    Raises:
        CheckpointError: The file is missing or damaged.
        ConfigError: The package or a GPU is missing, or a server's address is.
        ParityError: An engine that was built answers otherwise than the bundle.
        ServerError: The server does not answer, or not as the bundle.
    """
    server.fits(name)
    if name == REMOTE:
        from image_classifier.inference.triton.client import TritonBackend

        return TritonBackend.of(bundle, str(server.url), server.timeout_s)
    file = BACKENDS[name].file(bundle)
    if name == tensorrt.NAME and not _only_onnx_runtime_has_tensorrt():
        return _engine(bundle)
    if name == "checkpoint":
        bundle.verify([file])  # torch reads the file itself, which may be large
    return BACKENDS[name].open(
        bundle.path(file), trusted, lambda path: bundle.content(path.relative_to(bundle.directory).as_posix()), callers
    )[0]


def _only_onnx_runtime_has_tensorrt() -> bool:
    only = not tensorrt.is_installed() and _tensorrt_in_onnx_runtime()
    if only:
        log.info("TensorRT through ONNX Runtime, as the package tensorrt is not installed")
    return only


def _engine(bundle: Bundle) -> Backend:
    from image_classifier.inference.tensorrt.backend import opened

    asked = tensorrt.EngineSettings.of(bundle)
    bundle.verify([asked.file, "golden.npz"])
    return opened(bundle, bundle.path(asked.file), asked)[0]
