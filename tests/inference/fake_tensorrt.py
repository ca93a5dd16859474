"""TensorRT and CUDA for machines without a GPU: the names, arguments and order of calls of `tensorrt` 10 and 11 and
of `cuda.bindings`.

What an engine answers is ONNX Runtime's. Every name was found in the bindings 10.16 and 11.4 themselves.
"""

from __future__ import annotations

import ctypes
import enum
import json
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}


def session_of(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Cuda:
    """`cuda.bindings.runtime`: memory that is bounded and must not be touched once freed, work that is done when it
    is waited for.
    """

    class cudaMemcpyKind(enum.IntEnum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2

    class cudaError_t(enum.IntEnum):
        cudaSuccess = 0
        cudaErrorMemoryAllocation = 2
        cudaErrorInsufficientDriver = 35
        cudaErrorNoDevice = 100

    def __init__(self) -> None:
        self.name, self.driver, self.error, self.room = b"NVIDIA Fake", 13000, self.cudaError_t.cudaSuccess, 2**30
        self.memory: dict[int, Any] = {}
        self.work: list[Callable[[], None]] = []
        self.batches: list[int] = []

    def cudaGetDeviceCount(self) -> tuple[Any, Any]:
        return self.error, None if self.error else 1

    def cudaGetDevice(self) -> tuple[Any, int]:
        return self.error, 0

    def cudaDriverGetVersion(self) -> tuple[Any, int]:
        return self.error, self.driver

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, Any]:
        assert device == 0
        return self.error, SimpleNamespace(name=self.name + b"\0\0", major=9, minor=0)

    def cudaMalloc(self, num_bytes: int) -> tuple[Any, Any]:
        if num_bytes > self.room:
            return self.cudaError_t.cudaErrorMemoryAllocation, None
        block = (ctypes.c_uint8 * num_bytes)()
        self.memory[ctypes.addressof(block)] = block
        return self.cudaError_t.cudaSuccess, ctypes.addressof(block)

    def cudaFree(self, address: int) -> tuple[Any]:
        del self.memory[address]
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamCreate(self) -> tuple[Any, Any]:
        return self.error, None if self.error else 7

    def cudaStreamDestroy(self, stream: int) -> tuple[Any]:
        return (self.cudaError_t.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, num_bytes: int, kind: Any, stream: int) -> tuple[Any]:
        assert stream == 7
        assert num_bytes <= len(self.memory[target if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice else source])
        self.work.append(lambda: (ctypes.memmove(target, source, num_bytes), None)[1])
        return (self.cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        assert stream == 7
        for step in self.work:
            step()
        self.work.clear()
        return (self.cudaError_t.cudaSuccess,)


class TensorRt(ModuleType):
    """`tensorrt`: an engine is the model behind a line of JSON; `built` lists what was asked of the builder."""

    class DataType(enum.Enum):
        FLOAT = 0
        UINT8 = 5

    class NetworkDefinitionCreationFlag(enum.IntEnum):
        STRONGLY_TYPED = 0

    class BuilderFlag(enum.Enum):
        TF32 = 7

    class ILogger:
        class Severity(enum.Enum):
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2

    def __init__(self, cuda: Cuda) -> None:
        super().__init__("tensorrt")
        self.__spec__ = ModuleSpec("tensorrt", None, origin="fake")
        self.__version__ = "11.4.0.106"
        self.cuda, self.built, self.takes_s = cuda, list[dict[str, Any]](), 0.0
        self.off, self.refuses_to_build, self.refuses_to_load, self.refuses_to_start = 0.0, False, False, False

    def nptype(self, kind: Any) -> Any:
        return {self.DataType.FLOAT: np.float32, self.DataType.UINT8: np.uint8}[kind]

    def Builder(self, logger: Any) -> Builder:
        if self.refuses_to_start:
            logger.log(self.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return Builder(self, logger)

    def OnnxParser(self, network: Network, logger: Any) -> OnnxParser:
        return OnnxParser(network)

    def Runtime(self, logger: Any) -> Runtime:
        return Runtime(self, logger)


class Builder:
    def __init__(self, trt: TensorRt, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def create_network(self, flags: int = 0) -> Network:
        assert flags == 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return Network(self.trt)

    def create_builder_config(self) -> Config:
        return Config({self.trt.BuilderFlag.TF32})

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        if self.trt.refuses_to_build:
            self.logger.log(self.trt.ILogger.Severity.WARNING, "a warning")
            self.logger.log(self.trt.ILogger.Severity.ERROR, "Error Code 10: no implementation for node\n cat")
            return None
        time.sleep(self.trt.takes_s)
        (profile,) = config.profiles
        facts = {"bounds": profile.bounds, "tf32": self.trt.BuilderFlag.TF32 in config.flags}
        self.trt.built.append(facts)
        return json.dumps({**facts, "version": self.trt.__version__}).encode() + b"\n" + network.model


class Config:
    def __init__(self, flags: set[Any]) -> None:
        self.flags, self.profiles = flags, list[Profile]()

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class Profile:
    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        assert input == "pixels"
        self.bounds = [list(min), list(opt), list(max)]


class Network:
    def __init__(self, trt: TensorRt) -> None:
        self.trt, self.model, self.inputs, self.outputs = trt, b"", list[Any](), list[Any]()

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_input(self, index: int) -> Any:
        return self.inputs[index]

    def get_output(self, index: int) -> Any:
        return self.outputs[index]


class OnnxParser:
    def __init__(self, network: Network) -> None:
        self.network, self.errors = network, list[str]()

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(desc=lambda: self.errors[index])

    def parse(self, model: bytes, path: str | None = None) -> bool:
        try:
            session = session_of(model)
        except Exception as error:
            self.errors.append(f"In node 0:\n{error}")
            return False
        if odd := {node.op_type for node in onnx.load_from_string(model).graph.node if "pixels" in node.input} - {
            "Cast",
            "Shape",
        }:
            self.errors.append(f"In node 0 ({odd}): UINT8 is for network inputs and casts")
            return False
        self.network.model = model
        self.network.inputs, self.network.outputs = (
            [_tensor(self.network.trt, value) for value in values] for values in _values(session)
        )
        return True


class Runtime:
    def __init__(self, trt: TensorRt, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        head, _, model = serialized_engine.partition(b"\n")
        facts = json.loads(head)
        if self.trt.refuses_to_load or facts["version"] != self.trt.__version__:
            self.logger.log(self.trt.ILogger.Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1")
            return None
        return Engine(self.trt, session_of(model), facts)


class Engine:
    def __init__(self, trt: TensorRt, session: onnxruntime.InferenceSession, facts: dict[str, Any]) -> None:
        self.trt, self.session, self.facts = trt, session, facts
        self.tensors = {value.name: _tensor(trt, value) for values in _values(session) for value in values}

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.addresses, self.shape = engine, dict[str, int](), ()

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        least, _, most = self.engine.facts["bounds"]
        self.shape = tuple(shape)
        return name == "pixels" and all(low <= side <= high for low, side, high in zip(least, shape, most, strict=True))

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == 7 and set(self.addresses) == set(self.engine.tensors)
        shape, trt = self.shape, self.engine.trt
        trt.cuda.batches.append(shape[0])

        def run() -> None:
            pixels = np.ctypeslib.as_array(trt.cuda.memory[self.addresses["pixels"]])[: int(np.prod(shape))].reshape(
                shape
            )
            names = [value.name for value in self.engine.session.get_outputs()]
            for name, answer in zip(names, self.engine.session.run(names, {"pixels": pixels}), strict=True):
                wrong = np.asarray(answer) + np.float32(trt.off) * (np.arange(answer.shape[1]) == 0)
                content = np.ascontiguousarray(wrong, np.float32).tobytes()
                assert len(content) <= len(trt.cuda.memory[self.addresses[name]])
                ctypes.memmove(self.addresses[name], content, len(content))

        trt.cuda.work.append(run)
        return True


def _values(session: onnxruntime.InferenceSession) -> tuple[Any, Any]:
    return session.get_inputs(), session.get_outputs()


def _tensor(trt: TensorRt, value: Any) -> Any:
    kinds = {np.uint8: trt.DataType.UINT8, np.float32: trt.DataType.FLOAT}
    shape = tuple(side if isinstance(side, int) else -1 for side in value.shape)
    return SimpleNamespace(name=value.name, shape=shape, dtype=kinds.get(_TYPES.get(value.type)))
