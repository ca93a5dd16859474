"""Building an engine from an ONNX file: TensorRT times kernels on this GPU for minutes and takes the fastest."""

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
TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 2e-2}  # allowed difference of a probability
FILES = ("model.fp16.onnx", "model.onnx")  # an engine of the first computes in half precision
_MAJORS = ("10", "11")  # 11 has only strongly typed networks, 10 has them too


@dataclass(frozen=True)
class EngineSettings:
    """The keys of `tensorrt` in conf/export.yaml.

    Args:
        precision: Of the arithmetic: fp32, tf32 (products rounded to 10 bits, on GPUs since Ampere) or fp16.
        max_batch_size: Largest number of images in one execution; more are split into such batches.
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
        """Return the settings of the bundle's export, or the defaults; CheckpointError for invalid ones."""
        export = bundle.info.exports.get(NAME, {})
        try:
            return cls(**{key: export[key] for key in ("precision", "max_batch_size") if key in export})
        except (ConfigError, TypeError) as error:
            raise CheckpointError(
                f"bundle.json describes an invalid engine ({error})", f"export it again: --to {NAME}"
            ) from error

    @property
    def file(self) -> str:
        """The file of a bundle from which the engine is built: half precision is in the graph itself."""
        return FILES[0] if self.precision == "fp16" else FILES[1]

    @property
    def tolerance(self) -> float:
        """Allowed difference of a probability from the checkpoint's."""
        return TOLERANCE[self.precision]


def is_installed() -> bool:
    """Return whether the package `tensorrt` is installed; a folder of that name is not the package."""
    spec = find_spec(NAME)
    return spec is not None and spec.origin is not None


def package() -> Any:
    """Return the module `tensorrt`; ConfigError where it is missing, does not load, or has an unsupported version."""
    if not is_installed():
        hint = f"pip install tensorrt-cu13 cuda-bindings on a machine with an NVIDIA GPU, {INSTEAD}"
        raise ConfigError("TensorRT needs the package tensorrt, which is not installed", hint)
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the package tensorrt cannot be loaded ({reason})",
            f"pip install --force-reinstall tensorrt-cu13, {INSTEAD}",
        ) from error
    if tensorrt.__version__.partition(".")[0] not in _MAJORS:
        raise ConfigError(
            f"the package tensorrt {tensorrt.__version__} is not supported",
            f"install 10 or 11: pip install 'tensorrt-cu13>=10.13,<12', {INSTEAD}",
        )
    return tensorrt


def require() -> None:
    """Raise ConfigError where the package or a GPU is missing."""
    package()
    this_gpu()


def usable() -> bool:
    """Return whether the package and a GPU are present."""
    try:
        require()
    except ConfigError:
        return False
    return True


def logger_of(trt: Any) -> Any:
    """Return a logger for TensorRT that collects its errors in `errors` instead of printing them."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is known only at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(" ".join(msg.split()))

    return Logger()


def build(model: Path, settings: EngineSettings) -> bytes:
    """Return the engine of an ONNX file for batches of 1 to `max_batch_size`, tuned for the largest.

    Raises:
        CheckpointError: TensorRT refuses the model.
        ConfigError: The package or a GPU is missing.
    """
    require()
    trt = package()
    logger = logger_of(trt)
    builder = _create(trt.Builder, logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    shape = _parsed(trt, network, logger, model)
    config = builder.create_builder_config()
    if settings.precision != "tf32":
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default
    profile = builder.create_optimization_profile()
    profile.set_shape("pixels", (1, *shape), (settings.max_batch_size, *shape), (settings.max_batch_size, *shape))
    config.add_optimization_profile(profile)
    log.info(
        "TensorRT %s builds an engine of %s (%s), which takes minutes", trt.__version__, model.name, settings.precision
    )
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refused(model, logger.errors)
    return bytes(plan)


def _create(kind: Any, logger: Any) -> Any:
    """Return an object of a TensorRT class; ConfigError where that fails, as with a driver that is too old."""
    try:
        return kind(logger)
    except (
        TypeError,
        RuntimeError,
    ) as error:  # a constructor that fails returns nothing, which pybind11 reports as a TypeError
        reason = (logger.errors or [str(error)])[0][:200]
        raise ConfigError(f"TensorRT cannot be used here ({reason})", f"check nvidia-smi, {INSTEAD}") from error


def _parsed(trt: Any, network: Any, logger: Any, model: Path) -> tuple[int, ...]:
    """Fill a network from an ONNX file, and return the shape of one image's pixels, (3, S, S).

    Raises:
        CheckpointError: The file is not a model exported by this package.
    """
    content = model.read_bytes()
    try:
        self_contained = is_self_contained(content)
    except ValueError as error:
        raise _refused(model, [f"it is not an ONNX model: {error}"]) from error
    if not self_contained:
        raise _refused(model, ["its weights are in another file"])
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
            f"{str(model)!r} does not take pixels uint8 and return logits", "use a model exported by this package"
        )
    return tuple(inputs[0].shape)[1:]


def _refused(model: Path, reasons: list[str]) -> CheckpointError:
    reason = (reasons or ["no reason given"])[0][:200]
    return CheckpointError(
        f"TensorRT cannot build an engine of {str(model)!r} ({reason})", f"export it again: --to onnx, {INSTEAD}"
    )
