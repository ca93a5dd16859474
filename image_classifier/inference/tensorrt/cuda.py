"""The GPU, through NVIDIA's `cuda-bindings` alone: its properties, memory on it, and copies to and from it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from image_classifier.errors import ConfigError

INSTEAD = "or use --backend onnx"


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name `gpu`, its compute capability, and the newest CUDA that its driver knows (13050 is 13.5)."""

    gpu: str
    compute_capability: str
    driver: int


def this_gpu() -> Gpu:
    """Return the GPU of this process; ConfigError where there is none, or its driver or cuda-bindings is missing."""
    _cuda("cudaGetDeviceCount")
    properties = _cuda("cudaGetDeviceProperties", _cuda("cudaGetDevice"))
    name = bytes(properties.name).split(b"\0")[0].decode("utf-8", "replace")
    return Gpu(name, f"{properties.major}.{properties.minor}", int(_cuda("cudaDriverGetVersion")))


class DeviceMemory:
    """Memory of `num_bytes` on the GPU, freed with the object; ConfigError where the GPU has too little."""

    def __init__(self, num_bytes: int) -> None:
        self.address = int(_cuda("cudaMalloc", num_bytes))
        self.num_bytes = num_bytes
        weakref.finalize(self, _runtime().cudaFree, self.address)


class Stream:
    """A CUDA stream: operations that the GPU does one after the other; ConfigError where one fails."""

    def __init__(self) -> None:
        self.handle = int(_cuda("cudaStreamCreate"))
        weakref.finalize(self, _runtime().cudaStreamDestroy, self.handle)

    def upload(self, source: np.ndarray, target: DeviceMemory) -> None:
        """Copy an array, contiguous and no larger than the memory, to the GPU."""
        self._copy(target.address, source.ctypes.data, source.nbytes, "cudaMemcpyHostToDevice")

    def download(self, source: DeviceMemory, target: np.ndarray) -> None:
        """Fill an array, contiguous and no larger than the memory, from the GPU; it is complete after `wait`."""
        self._copy(target.ctypes.data, source.address, target.nbytes, "cudaMemcpyDeviceToHost")

    def wait(self) -> None:
        """Wait until all operations are done."""
        _cuda("cudaStreamSynchronize", self.handle)

    def _copy(self, target: int, source: int, num_bytes: int, direction: str) -> None:
        _cuda("cudaMemcpyAsync", target, source, num_bytes, getattr(_runtime().cudaMemcpyKind, direction), self.handle)


def _cuda(function: str, *arguments: object) -> Any:
    """Return the first result of a CUDA runtime function; ConfigError with the name of its error where it fails."""
    code, *values = getattr(_runtime(), function)(*arguments)
    if int(code):
        raise ConfigError(
            f"TensorRT needs an NVIDIA GPU, and there is no usable one here ({code.name})",
            f"check nvidia-smi, {INSTEAD}",
        )
    return values[0] if values else None


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise ConfigError(
            "TensorRT needs the package cuda-bindings, which is not installed", f"pip install cuda-bindings, {INSTEAD}"
        ) from error
    return runtime
