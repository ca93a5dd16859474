"""From an ONNX file to an engine: TensorRT times kernels on this machine's GPU and keeps the fastest, which takes minutes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from image_classifier.bundle import Bundle
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.inference.onnx_external_data import is_self_contained
from image_classifier.inference.tensorrt.cuda import INSTEAD, this_gpu

log = logging.getLogger(__name__)

NAME = "tensorrt"
TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 2e-2}  # by which a probability may differ
FILES = ("model.fp16.onnx", "model.onnx")  # an engine of the first is of half precision
_MAJORS = ("10", "11")  # 11 knows none but strongly typed networks, 10 knows them too


@dataclass(frozen=True)
class EngineSettings:
    """The keys of `tensorrt` in conf/export.yaml.

    Args:
        precision: Of the arithmetic: fp32, tf32 (products rounded to 10 bits, on GPUs since Ampere) or fp16.
        max_batch_size: The most images in one execution; more are cut into such batches.
    """

    precision: str = "fp32"
    max_batch_size: int = 64

    def __post_init__(self) -> None:
        if self.precision not in TOLERANCE:
            raise ConfigError(f"tensorrt.precision={self.precision!r} is unknown", f"use one of {', '.join(TOLERANCE)}")
        if not isinstance(self.max_batch_size, int) or self.max_batch_size < 1:
            raise ConfigError(f"tensorrt.max_batch_size must be at least 1, not {self.max_batch_size}")

    @classmethod
    def of(cls, bundle: Bundle) -> EngineSettings:
        """Those with which the bundle was exported, or the usual ones; CheckpointError where bundle.json says what cannot be."""
        facts = bundle.info.exports.get(NAME, {})
        try:
            return cls(**{key: facts[key] for key in ("precision", "max_batch_size") if key in facts})
        except (ConfigError, TypeError) as error:
            raise CheckpointError(
                f"bundle.json describes no engine that can be ({error})", f"export it again: --to {NAME}"
            ) from error

    @property
    def file(self) -> str:
        """The file of a bundle from which such an engine is built: half precision lies in the graph itself."""
        return FILES[0] if self.precision == "fp16" else FILES[1]

    @property
    def tolerance(self) -> float:
        """By how much a probability may differ from the checkpoint's."""
        return TOLERANCE[self.precision]


def is_installed() -> bool:
    """Whether the package `tensorrt` is there, which a folder of that name is not."""
    return (found := find_spec(NAME)) is not None and found.origin is not None


def package() -> Any:
    """The module `tensorrt`; ConfigError where it is not installed, does not load, or is of another generation."""
    if not is_installed():
        hint = f"pip install tensorrt-cu13 cuda-bindings on a machine with an NVIDIA GPU, {INSTEAD}"
        raise ConfigError("TensorRT needs the package tensorrt, which is not installed", hint)
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the package tensorrt cannot be loaded ({reason})", f"pip install tensorrt-cu13 anew, {INSTEAD}"
        ) from error
    if tensorrt.__version__.partition(".")[0] not in _MAJORS:
        raise ConfigError(
            f"the package tensorrt is {tensorrt.__version__}",
            f"install 10 or 11: pip install 'tensorrt-cu13>=10.13,<12', {INSTEAD}",
        )
    return tensorrt


def require() -> None:
    """ConfigError where the package or a GPU is missing."""
    package()
    this_gpu()


def usable() -> bool:
    """Whether the package and a GPU are here."""
    try:
        require()
    except ConfigError:
        return False
    return True


def logger_of(trt: Any) -> Any:
    """A logger for TensorRT that keeps its errors, as `errors`, in place of printing them."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # known when it is loaded
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(" ".join(msg.split()))

    return Logger()


def build(model: Path, asked: EngineSettings) -> bytes:
    """The engine of an ONNX file for batches of 1 to `max_batch_size`, fastest at that.

    Raises:
        CheckpointError: TensorRT refuses the model.
        ConfigError: The package or a GPU is missing.
    """
    require()
    trt = package()
    logger = logger_of(trt)
    builder = _made(trt.Builder, logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    shape = _parsed(trt, network, logger, model)
    config = builder.create_builder_config()
    if asked.precision != "tf32":
        config.clear_flag(trt.BuilderFlag.TF32)  # which is on by itself
    profile = builder.create_optimization_profile()
    profile.set_shape("pixels", (1, *shape), (asked.max_batch_size, *shape), (asked.max_batch_size, *shape))
    config.add_optimization_profile(profile)
    log.info(
        "TensorRT %s builds an engine of %s (%s), which takes minutes", trt.__version__, model.name, asked.precision
    )
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refused(model, logger.errors)
    return bytes(plan)


def _made(kind: Any, logger: Any) -> Any:
    """A part of TensorRT; ConfigError where it cannot be, as with a driver that is too old."""
    try:
        return kind(logger)
    except (TypeError, RuntimeError) as error:  # its constructors give nothing, which pybind11 calls a TypeError
        reason = (logger.errors or [str(error)])[0][:200]
        raise ConfigError(f"TensorRT cannot be used here ({reason})", f"look at nvidia-smi, {INSTEAD}") from error


def _parsed(trt: Any, network: Any, logger: Any, model: Path) -> tuple[int, ...]:
    """Fill a network from an ONNX file; the shape of one image's pixels (3, S, S). CheckpointError where it cannot be one of ours."""
    content = model.read_bytes()
    try:
        whole = is_self_contained(content)
    except ValueError as error:
        raise _refused(model, [f"it is no ONNX model: {error}"]) from error
    if not whole:
        raise _refused(model, ["its weights lie in another file"])
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(content):
        raise _refused(model, [" ".join(parser.get_error(0).desc().split())] if parser.num_errors else logger.errors)
    outputs = [network.get_output(row).name for row in range(network.num_outputs)]
    inputs = [network.get_input(row) for row in range(network.num_inputs)]
    if (
        [value.name for value in inputs] != ["pixels"]
        or inputs[0].dtype != trt.DataType.UINT8
        or "logits" not in outputs
    ):
        raise CheckpointError(
            f"{str(model)!r} does not take pixels uint8 and answer with logits", "use a model exported by this package"
        )
    return tuple(inputs[0].shape)[1:]


def _refused(model: Path, reasons: list[str]) -> CheckpointError:
    reason = (reasons or ["no reason given"])[0][:200]
    return CheckpointError(
        f"TensorRT cannot build an engine of {str(model)!r} ({reason})", f"export it again: --to onnx, {INSTEAD}"
    )
