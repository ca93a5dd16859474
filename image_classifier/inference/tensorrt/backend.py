"""The backend `tensorrt`: an engine, from the cache or built now, that must give the golden answers before it is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from image_classifier.bundle import Bundle
from image_classifier.errors import CheckpointError, ParityError
from image_classifier.inference.golden import Golden, checked
from image_classifier.inference.tensorrt.cache import EngineCache
from image_classifier.inference.tensorrt.cuda import INSTEAD, DeviceMemory, Stream
from image_classifier.inference.tensorrt.engine import NAME, EngineSettings, build, logger_of, package


class TensorRtBackend:
    """Runs an engine on the GPU: pixels uint8 [N, 3, H, W] -> logits float32 [N, C], and embeddings [N, D], in batches that it takes."""

    def __init__(self, plan: bytes, most: int) -> None:
        trt, self._stream = (
            package(),
            Stream(),
        )  # the stream first: without a driver TensorRT ends the process when it loads an engine
        self._logger = logger_of(trt)
        self._runtime = trt.Runtime(self._logger)  # outlives its engine
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        self._context = self._engine and self._engine.create_execution_context()
        if not self._context:
            raise self._failed("cannot load its engine")
        self.most = most
        names = [self._engine.get_tensor_name(row) for row in range(self._engine.num_io_tensors)]
        self._shapes = {name: tuple(self._engine.get_tensor_shape(name))[1:] for name in names}
        self._types = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self._memory = {
            name: DeviceMemory(most * int(np.prod(self._shapes[name])) * self._types[name].itemsize) for name in names
        }
        for name, memory in self._memory.items():
            self._context.set_tensor_address(name, memory.address)

    def check(self, size: int, num_classes: int) -> None:
        """CheckpointError where the engine was made for squares of another side, or another number of classes."""
        for name, expected in {"pixels": (3, size, size), "logits": (num_classes,)}.items():
            if self._shapes.get(name) != expected:
                fact = f"{name} of the engine have the shape {list(self._shapes.get(name, ()))} an image, not {list(expected)}"
                raise CheckpointError(fact, "use the bundle it came from")

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        return self._answers(pixels, "logits")[0]

    def logits_and_embeddings(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, embeddings = self._answers(pixels, "logits", "embedding")
        return logits, embeddings

    def _answers(self, pixels: np.ndarray, *outputs: str) -> list[np.ndarray]:
        found = [np.empty((len(pixels), *self._shapes[name]), self._types[name]) for name in outputs]
        for start in range(0, len(pixels), self.most):
            self._run(
                np.ascontiguousarray(pixels[start : start + self.most]),
                dict(zip(outputs, (part[start:] for part in found), strict=True)),
            )
        return found

    def _run(self, pixels: np.ndarray, targets: dict[str, np.ndarray]) -> None:
        if pixels.dtype != self._types["pixels"] or pixels.shape[1:] != self._shapes["pixels"]:
            raise CheckpointError(
                f"the engine takes pixels uint8 {list(self._shapes['pixels'])}, not {pixels.dtype} {list(pixels.shape[1:])}"
            )
        self._stream.upload(pixels, self._memory["pixels"])
        if not self._context.set_input_shape("pixels", pixels.shape) or not self._context.execute_async_v3(
            self._stream.handle
        ):
            raise self._failed("cannot run its engine on these images")
        for name, target in targets.items():
            self._stream.download(self._memory[name], target[: len(pixels)])
        self._stream.wait()

    def _failed(self, what: str) -> CheckpointError:
        reason = (self._logger.errors or ["no reason given"])[-1][:200]
        return CheckpointError(f"TensorRT {what} ({reason})", f"build it anew: export NAME --to {NAME}, {INSTEAD}")


def opened(
    bundle: Bundle, model: Path, asked: EngineSettings, anew: bool = False
) -> tuple[TensorRtBackend, EngineCache]:
    """The engine of a bundle's model, read from the cache, or (`anew`: always) built, held against the golden images and kept there.

    Raises:
        CheckpointError: TensorRT refuses the model.
        ConfigError: TensorRT or a GPU is missing.
        ParityError: The engine answers otherwise than the bundle; it is not kept.
        StorageError: The cache cannot be written.
    """
    kept = EngineCache.of(model, asked)
    with kept.locked():
        plan = None if anew else kept.read()
        if plan is not None:
            return TensorRtBackend(plan, asked.max_batch_size), kept
        plan = build(model, asked)
        backend = TensorRtBackend(plan, asked.max_batch_size)
        check = checked(NAME, backend, Golden.of(bundle), bundle.info.temperature)
        if check.fails(asked.tolerance):
            fact = f"the engine of TensorRT ({asked.precision}) agrees on {check.agreement:.0%} of {check.images} golden images"
            raise ParityError(
                f"{fact} and differs by up to {check.largest_difference:.2g} (allowed {asked.tolerance:g})",
                "use --backend onnx",
            )
        kept.write(plan)
        return backend, kept
