"""The backend `tensorrt`: an engine, from the cache or built now; a new one must pass the golden images first."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from image_classifier.bundle import Bundle
from image_classifier.errors import CheckpointError, ParityError
from image_classifier.inference.golden import Golden, check_golden
from image_classifier.inference.tensorrt.cache import EngineCache
from image_classifier.inference.tensorrt.cuda import INSTEAD, DeviceMemory, Stream
from image_classifier.inference.tensorrt.engine import NAME, EngineSettings, build, logger_of, package


class TensorRtBackend:
    """Runs an engine on the GPU, in batches of at most `max_batch_size`.

    Pixels uint8 [N, 3, H, W] -> logits float32 [N, C], and embeddings [N, D].
    """

    def __init__(self, plan: bytes, max_batch_size: int) -> None:
        trt = package()
        self._stream = Stream()  # before the engine: without a driver TensorRT ends the process when it loads one
        self._logger = logger_of(trt)
        self._runtime = trt.Runtime(self._logger)  # outlives its engine
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        self._context = self._engine and self._engine.create_execution_context()
        if not self._context:
            raise self._failed("cannot load its engine")
        self.max_batch_size = max_batch_size
        names = [self._engine.get_tensor_name(row) for row in range(self._engine.num_io_tensors)]
        self._shapes = {name: tuple(self._engine.get_tensor_shape(name))[1:] for name in names}
        self._types = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self._memory = {
            name: DeviceMemory(max_batch_size * int(np.prod(self._shapes[name])) * self._types[name].itemsize)
            for name in names
        }
        for name, memory in self._memory.items():
            self._context.set_tensor_address(name, memory.address)

    def check(self, size: int, num_classes: int) -> None:
        """Raise CheckpointError where the engine was made for squares of another side, or another number of classes."""
        for name, expected in {"pixels": (3, size, size), "logits": (num_classes,)}.items():
            if self._shapes.get(name) != expected:
                shape = list(self._shapes.get(name, ()))
                raise CheckpointError(
                    f"{name} of the engine have the shape {shape} per image, not {list(expected)}",
                    "use the bundle it came from",
                )

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        return self._answers(pixels, "logits")[0]

    def logits_and_embeddings(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, embeddings = self._answers(pixels, "logits", "embedding")
        return logits, embeddings

    def _answers(self, pixels: np.ndarray, *outputs: str) -> list[np.ndarray]:
        answers = {name: np.empty((len(pixels), *self._shapes[name]), self._types[name]) for name in outputs}
        for start in range(0, len(pixels), self.max_batch_size):
            batch = np.ascontiguousarray(pixels[start : start + self.max_batch_size])
            self._run(batch, {name: answer[start:] for name, answer in answers.items()})
        return list(answers.values())

    def _run(self, pixels: np.ndarray, targets: dict[str, np.ndarray]) -> None:
        """Run one batch and write each output to the first rows of its target."""
        if pixels.dtype != self._types["pixels"] or pixels.shape[1:] != self._shapes["pixels"]:
            expected = list(self._shapes["pixels"])
            raise CheckpointError(
                f"the engine takes pixels uint8 {expected}, not {pixels.dtype} {list(pixels.shape[1:])}"
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
        return CheckpointError(f"TensorRT {what} ({reason})", f"build it again: export NAME --to {NAME}, {INSTEAD}")


def open_engine(
    bundle: Bundle, model: Path, settings: EngineSettings, rebuild: bool = False
) -> tuple[TensorRtBackend, EngineCache]:
    """Return the engine of a bundle's model, from the cache or (with `rebuild` always) built and cached now.

    An engine that was built is compared with the golden images before it is cached.

    Raises:
        CheckpointError: TensorRT refuses the model.
        ConfigError: TensorRT or a GPU is missing.
        ParityError: The engine answers differently from the bundle; it is not cached.
        StorageError: The cache cannot be written.
    """
    cache = EngineCache.of(model, settings)
    with cache.locked():
        plan = None if rebuild else cache.read()
        if plan is not None:
            return TensorRtBackend(plan, settings.max_batch_size), cache
        plan = build(model, settings)
        backend = TensorRtBackend(plan, settings.max_batch_size)
        check = check_golden(NAME, backend, Golden.of(bundle), bundle.info.temperature)
        if check.fails(settings.tolerance):
            raise ParityError(
                f"the TensorRT engine ({settings.precision}) gives {check.agreement:.0%} of {check.images} golden "
                f"images the right class, and probabilities differ by up to {check.largest_difference:.2g} "
                f"(allowed {settings.tolerance:g})",
                "use --backend onnx",
            )
        cache.write(plan)
        return backend, cache
