"""The backends by name: the files of a bundle that each runs, the module that opens them, and its tolerance.

A new backend is one module with an `open_…` function (see `Opener`) and one row in `BACKENDS`. The modules are named as
text and imported when a backend is opened, as each needs a package that may be missing or takes seconds to import.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from image_classifier.bundle import Bundle
from image_classifier.errors import ConfigError
from image_classifier.inference.predictor import Backend
from image_classifier.inference.tensorrt import engine as tensorrt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenOptions:
    """How a model file is opened.

    Args:
        read: Reads a file: in a bundle it returns the bytes that were compared with their hash.
        trusted: Packages of the user that a checkpoint's network may come from.
        concurrent_runs: Batches that will run at the same time, each on its share of the cores.
    """

    read: Callable[[Path], bytes] = Path.read_bytes
    trusted: Sequence[str] = ()
    concurrent_runs: int = 1


# Opens a file: the backend that runs it, and the metadata in the file (classes, preprocess, temperature, decision).
Opener = Callable[[Path, OpenOptions], tuple[Backend, Mapping[str, Any]]]


@dataclass(frozen=True)
class BackendSpec:
    """One backend.

    Args:
        files: The files of a bundle that it can run, the best first.
        installed: Whether the package that it needs is there.
        opener: The function that opens a file, as "module:function"; see `Opener`.
        tolerance: Allowed difference of a probability from the checkpoint's, unless the export has another.
        remedy: What to do where the difference is larger.
    """

    files: tuple[str, ...]
    installed: Callable[[], bool]
    opener: str
    tolerance: float = 1e-4
    remedy: str = ""

    def file(self, bundle: Bundle) -> str:
        """Return the file of this bundle that it runs; the last of `files` where there is none."""
        return next((name for name in self.files if name in bundle.info.files), self.files[-1])

    def fits(self, bundle: Bundle) -> bool:
        """Return whether it is installed and the bundle has a file for it."""
        return self.file(bundle) in bundle.info.files and self.installed()

    def open(self, path: Path, options: OpenOptions) -> tuple[Backend, Mapping[str, Any]]:
        """Return a backend over the file, and the metadata in the file; raises as `open_backend`."""
        opener: Opener = _imported(self.opener)
        return opener(path, options)


def _imported(name: str) -> Any:
    """Return an object named as "module:object", its module imported now."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _package(name: str) -> Callable[[], bool]:
    return lambda: find_spec(name) is not None


def _onnxruntime_has_tensorrt() -> bool:
    import onnxruntime

    return "TensorrtExecutionProvider" in onnxruntime.get_available_providers()


def _has_tensorrt() -> bool:
    return tensorrt.usable() or _onnxruntime_has_tensorrt()


_HERE = "image_classifier.inference"
_OPENVINO_FILES = ("openvino/model.xml", "model.onnx")
BACKENDS: dict[str, BackendSpec] = {
    "onnx": BackendSpec(
        ("model.onnx",),
        _package("onnxruntime"),
        f"{_HERE}.onnx_runtime:open_onnx",
        remedy="export it again: --to onnx",
    ),
    "checkpoint": BackendSpec(
        ("model.ckpt",),
        _package("torch"),
        f"{_HERE}.checkpoint:open_checkpoint",
        remedy="copy the bundle again, or train again",
    ),
    "openvino": BackendSpec(
        _OPENVINO_FILES,
        _package("openvino"),
        f"{_HERE}.openvino_runtime:open_float32",
        remedy="export it again: --to openvino",
    ),
    "openvino-bf16": BackendSpec(
        _OPENVINO_FILES,
        _package("openvino"),
        f"{_HERE}.openvino_runtime:open_bfloat16",
        tolerance=2e-2,  # bfloat16 keeps 8 bits of a number
        remedy="use --backend openvino, which computes in float32",
    ),
    "int8": BackendSpec(
        ("model.int8.onnx",),
        _package("onnxruntime"),
        f"{_HERE}.onnx_runtime:open_onnx",
        remedy="export it again: --to int8",
    ),
    tensorrt.NAME: BackendSpec(
        tensorrt.FILES,
        _has_tensorrt,
        f"{_HERE}.onnx_runtime:open_onnx_with_tensorrt",
        tolerance=tensorrt.TOLERANCE["tf32"],
        remedy="use --backend onnx",
    ),
}
# Opened in other ways than from a file of the bundle: an engine of this machine's GPU, and a model on a server.
_OPEN_ENGINE = f"{_HERE}.tensorrt.backend:open_engine"
_TRITON_BACKEND = f"{_HERE}.triton.client:TritonBackend"
REMOTE = "triton"
NAMES = (*BACKENDS, REMOTE)
EXACT = ("onnx", "checkpoint", "openvino")  # answer as the checkpoint but for rounding


def fitting(bundle: Bundle) -> list[str]:
    """Return the backends that are installed and for which the bundle has a file."""
    return [name for name, spec in BACKENDS.items() if spec.fits(bundle)]


def is_exported(bundle: Bundle, name: str) -> bool:
    """Return whether the bundle has this form of its model, which its export compared with the checkpoint."""
    export = bundle.info.exports.get(name)
    return isinstance(export, dict) and "refused" not in export


def takes_minutes(bundle: Bundle, name: str) -> bool:
    """Return whether this backend must build an engine before its first answer."""
    if name != tensorrt.NAME:
        return False
    if not tensorrt.usable():
        return True
    from image_classifier.inference.tensorrt.cache import EngineCache

    settings = tensorrt.EngineSettings.of(bundle)
    return not EngineCache.of(bundle.path(settings.file), settings).exists


@dataclass(frozen=True)
class ServerAddress:
    """A model server's address, None for no server, and how long one of its answers may take."""

    url: str | None = None
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < float("inf"):
            raise ConfigError(f"server_timeout_s must be more than 0, not {self.timeout_s}")

    def check(self, backend: str | None) -> None:
        """Raise ConfigError where the backend needs an address and there is none, or the other way round."""
        if backend == REMOTE and not self.url:
            raise ConfigError(
                "the backend triton needs the server's address", "add --url http://HOST:8000 or --url grpc://HOST:8001"
            )
        if self.url and backend != REMOTE:
            raise ConfigError(f"url={self.url!r} is only for a server", f"add --backend {REMOTE}, or leave it out")


def open_backend(
    bundle: Bundle,
    name: str,
    trusted: Sequence[str] = (),
    server: ServerAddress = ServerAddress(),  # frozen
    concurrent_runs: int = 1,
) -> Backend:
    """Return a backend over the bundle's file for it, whose hash is checked first, or over a server that runs it.

    A server and a new engine must first answer golden images correctly.

    Raises:
        CheckpointError: The file is missing or damaged.
        ConfigError: The package, a GPU or a server's address is missing.
        ParityError: An engine that was built answers differently from the bundle.
        ServerError: The server does not answer, or differently from the bundle.
    """
    server.check(name)
    if name == REMOTE:
        backend: Backend = _imported(_TRITON_BACKEND).of(bundle, str(server.url), server.timeout_s)
        return backend
    if name == tensorrt.NAME and not _only_onnxruntime_has_tensorrt():
        return _engine(bundle)
    spec = BACKENDS[name]
    file = spec.file(bundle)
    if name == "checkpoint":
        bundle.verify([file])  # torch reads the file itself, which may be large

    def read(path: Path) -> bytes:
        return bundle.content(path.relative_to(bundle.directory).as_posix())

    return spec.open(bundle.path(file), OpenOptions(read, trusted, concurrent_runs))[0]


def _only_onnxruntime_has_tensorrt() -> bool:
    only = not tensorrt.is_installed() and _onnxruntime_has_tensorrt()
    if only:
        log.info("TensorRT through ONNX Runtime, as the package tensorrt is not installed")
    return only


def _engine(bundle: Bundle) -> Backend:
    settings = tensorrt.EngineSettings.of(bundle)
    bundle.verify([settings.file, "golden.npz"])
    backend: Backend = _imported(_OPEN_ENGINE)(bundle, bundle.path(settings.file), settings)[0]
    return backend
