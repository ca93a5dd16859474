"""The GPU through NVIDIA's `cuda-bindings` and nothing else: which one it is, memory on it, copies to it and from it."""

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
    """The GPU of this process; ConfigError where there is none, or its driver or the package cuda-bindings is missing."""
    _asked("cudaGetDeviceCount")
    facts = _asked("cudaGetDeviceProperties", _asked("cudaGetDevice"))
    name = bytes(facts.name).split(b"\0")[0].decode("utf-8", "replace")
    return Gpu(name, f"{facts.major}.{facts.minor}", int(_asked("cudaDriverGetVersion")))


class DeviceMemory:
    """So many bytes on the GPU, given back with the object; ConfigError where it has no room."""

    def __init__(self, num_bytes: int) -> None:
        self.address, self.num_bytes = int(_asked("cudaMalloc", num_bytes)), num_bytes
        weakref.finalize(self, _runtime().cudaFree, self.address)


class Stream:
    """What the GPU does one after the other; ConfigError where a part of it fails."""

    def __init__(self) -> None:
        self.handle = int(_asked("cudaStreamCreate"))
        weakref.finalize(self, _runtime().cudaStreamDestroy, self.handle)

    def upload(self, source: np.ndarray, target: DeviceMemory) -> None:
        """Copy an array, contiguous and no larger than the memory, to the GPU."""
        self._copy(target.address, source.ctypes.data, source.nbytes, "cudaMemcpyHostToDevice")

    def download(self, source: DeviceMemory, target: np.ndarray) -> None:
        """Fill an array, contiguous and no larger than the memory, from the GPU; it is full after `wait`."""
        self._copy(target.ctypes.data, source.address, target.nbytes, "cudaMemcpyDeviceToHost")

    def wait(self) -> None:
        """Until all of it is done."""
        _asked("cudaStreamSynchronize", self.handle)

    def _copy(self, target: int, source: int, num_bytes: int, way: str) -> None:
        _asked("cudaMemcpyAsync", target, source, num_bytes, getattr(_runtime().cudaMemcpyKind, way), self.handle)


def _asked(function: str, *arguments: object) -> Any:
    """What a function of the CUDA runtime gives; ConfigError with its own word where it refuses."""
    code, *values = getattr(_runtime(), function)(*arguments)
    if int(code):
        raise ConfigError(
            f"TensorRT needs an NVIDIA GPU, and here is none that can be used ({code.name})",
            f"look at nvidia-smi, {INSTEAD}",
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
