"""Export to 8-bit integers, under a contract: limits for the accuracy that is lost and the speed that is gained."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization import qdq_loss_debug as loss
from onnxruntime.quantization.shape_inference import quant_pre_process

from image_classifier.errors import ConfigError, ParityError
from image_classifier.exporting.parity import Parity
from image_classifier.exporting.parity_data import BATCH, ParitySet, answers_of
from image_classifier.inference.golden import Golden, check_golden
from image_classifier.inference.latency import timed
from image_classifier.inference.onnx_runtime import OnnxBackend
from image_classifier.inference.robustness import stratified
from image_classifier.predictions import softmax

log = logging.getLogger(__name__)

NAME = "model.int8.onnx"
_LAYERS = ("Conv", "Gemm", "MatMul")
# Quantised too, or integers would be converted to floats and back around each.
_BETWEEN_LAYERS = ("Add", "Relu", "Clip", "MaxPool", "GlobalAveragePool", "Concat")
_FLOAT_SHARES = (0.0, 0.05, 0.1, 0.2, 0.4)  # share of layers that stay in float32, one trial after the other
_DEBUG_IMAGES = 8
_SPEED_BATCH = 16


@dataclass(frozen=True)
class Int8Settings:
    """The keys of `int8` in conf/export.yaml.

    Args:
        max_drop: Points of accuracy, 0..100, that may be lost, overall and by each class; a small class may always lose
            one image.
        min_speedup: Required speed relative to model.onnx, in batches of 16 on this machine.
        images: Training images, stratified by class, from which the ranges of the integers are calibrated.
    """

    max_drop: float = 0.5
    min_speedup: float = 1.2
    images: int = 256

    def __post_init__(self) -> None:
        for key in ("max_drop", "min_speedup"):
            if not 0 <= getattr(self, key) <= 100:
                raise ConfigError(f"int8.{key} must be from 0 to 100, not {getattr(self, key)}")
        if self.images < 1:
            raise ConfigError(f"int8.images must be at least 1, not {self.images}")


@dataclass(frozen=True)
class Drop:
    """The accuracy that was lost, in points 0..100.

    Args:
        accuracy: Accuracy after quantisation, 0..1.
        overall: Points lost over all images.
        worst_class: The class that exceeds its limit most.
        by_class: Points that this class lost.
        breach: Why that is too much, or "".
    """

    accuracy: float
    overall: float
    worst_class: str
    by_class: float
    breach: str

    @classmethod
    def of(
        cls, targets: np.ndarray, expected: np.ndarray, actual: np.ndarray, classes: Sequence[str], limit: float
    ) -> Drop:
        """Compare two backends' probabilities [N, C] on images of class indices [N]; `limit` points may be lost.

        >>> import numpy as np
        >>> right, wrong = np.array([[0.9, 0.1]]), np.array([[0.4, 0.6]])
        >>> Drop.of(np.array([0]), right, wrong, ["cat", "dog"], 0.5).breach
        '100.00 points of accuracy are lost, the limit is 0.5'
        """
        before = expected.argmax(axis=1) == targets
        after = actual.argmax(axis=1) == targets
        # Images lost of each class, [C]; those that became right count against those that became wrong.
        lost = np.bincount(targets, before.astype(float) - after, len(classes))
        counts = np.bincount(targets, minlength=len(classes))
        # A class can lose no less than one image.
        allowed = np.maximum(1, np.floor(limit / 100 * counts))
        worst = int((lost - allowed).argmax())
        by_class = 100 * lost[worst] / max(1, counts[worst])
        overall = 100 * float(before.mean() - after.mean())
        breach = ""
        if overall > limit + 1e-9:
            breach = f"{overall:.2f} points of accuracy are lost, the limit is {limit:g}"
        elif lost[worst] > allowed[worst]:
            breach = f"the class {classes[worst]!r} loses {by_class:.1f} points, the limit is {limit:g}"
        return cls(float(after.mean()), overall, classes[worst], float(by_class), breach)


@dataclass(frozen=True)
class _Trial:
    """One quantised model, and how it keeps the contract."""

    backend: OnnxBackend
    probabilities: np.ndarray
    drop: Drop
    speedup: float
    slow: str

    @property
    def breach(self) -> str:
        """The part of the contract that it breaks, or ""."""
        return self.drop.breach or self.slow


def export_int8(parity_set: ParitySet, directory: Path, settings: Int8Settings) -> dict[str, Any]:
    """Write model.int8.onnx and return the metadata.

    Activations are unsigned, weights signed and per channel; the most sensitive layers stay in float32 where the
    contract needs it.

    Raises:
        ParityError: No choice of layers keeps the contract.
    """
    float_model = parity_set.bundle.path("model.onnx")
    path = directory / NAME
    # Read the training images on which the ranges are calibrated, uint8 [M, 3, S, S].
    rows = stratified(parity_set.train.targets, settings.images)
    calibration = parity_set.read([parity_set.train.file(parity_set.train[row]) for row in rows.tolist()])
    # Let ONNX Runtime fold constants and infer shapes once, before the trials.
    prepared = directory / "prepared.onnx"
    quant_pre_process(str(float_model), str(prepared), skip_symbolic_shape=True)
    float_backend = OnnxBackend(float_model)
    breach = ""
    for float_layers in _float_layers(prepared, calibration, path):
        # Quantise all other layers, and measure what the contract is about.
        _quantise(prepared, path, calibration, float_layers)
        trial = _measured(parity_set, path, float_backend, settings)
        breach = trial.breach
        log.info(
            "int8, %d layers in float32: %.2f points lost, %.2f times as fast. %s",
            *(len(float_layers), trial.drop.overall, trial.speedup, breach),
        )
        if not breach:
            prepared.unlink()
            _copy_metadata(float_model, path)
            return {**_metadata(parity_set, trial), "float_layers": list(float_layers)}
        if trial.slow:
            break  # with more layers in float32 it only gets slower
    raise ParityError(
        f"int8 breaks its contract: {breach}",
        "model.onnx is still what is served; to allow more, change int8.max_drop or int8.min_speedup",
    )


def _measured(parity_set: ParitySet, path: Path, float_backend: OnnxBackend, settings: Int8Settings) -> _Trial:
    """Compare the quantised model at `path` with the checkpoint, and its speed with model.onnx."""
    info = parity_set.bundle.info
    backend = OnnxBackend(path)
    probabilities = softmax(answers_of(backend, parity_set.pixels)[0], info.temperature)
    drop = Drop.of(parity_set.targets, parity_set.probabilities, probabilities, info.classes, settings.max_drop)
    speedup = _speedup(float_backend, backend, parity_set.pixels[:_SPEED_BATCH])
    slow = ""
    if speedup < settings.min_speedup:
        slow = f"it is {speedup:.2f} times as fast as model.onnx, {settings.min_speedup:g} are required"
    return _Trial(backend, probabilities, drop, speedup, slow)


def _metadata(parity_set: ParitySet, trial: _Trial) -> dict[str, Any]:
    bundle = parity_set.bundle
    parity = Parity.of(parity_set.probabilities, trial.probabilities, parity_set.paths, NAME)
    golden = check_golden(NAME, trial.backend, Golden.of(bundle), bundle.info.temperature)
    return {
        **parity.as_dict(),
        "golden_agreement": golden.agreement,
        "drop": trial.drop.overall,
        "worst_class": trial.drop.worst_class,
        "worst_class_drop": trial.drop.by_class,
        "speedup": round(trial.speedup, 2),
        "tolerance": 1.0,
    }


class _CalibrationReader(CalibrationDataReader):
    """Feeds pixels uint8 [N, 3, S, S] to the calibration, in batches."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._batches = iter([pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"pixels": batch}


def _quantise(prepared: Path, path: Path, calibration: np.ndarray, float_layers: Sequence[str]) -> None:
    """Write the quantised model, the ranges of its activations calibrated on pixels uint8 [M, 3, S, S]."""
    quantize_static(
        str(prepared),
        str(path),
        _CalibrationReader(calibration),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=[*_LAYERS, *_BETWEEN_LAYERS],
        nodes_to_exclude=list(float_layers),
    )


def _float_layers(prepared: Path, calibration: np.ndarray, quantised: Path) -> Iterator[list[str]]:
    """Yield the layers that stay in float32 in each trial: none, then more and more of the most sensitive ones.

    The sensitivity is measured on the quantised model of the first trial, which the caller writes in between.
    """
    yield []
    sensitive = _most_sensitive(prepared, quantised, calibration[:_DEBUG_IMAGES])
    for share in _FLOAT_SHARES[1:]:
        yield sensitive[: max(1, math.ceil(share * len(sensitive)))]


def _most_sensitive(prepared: Path, quantised: Path, pixels: np.ndarray) -> list[str]:
    """Return the names of the layers, those first whose inputs or outputs have the lowest signal-to-noise ratio."""
    # Compare each activation before and after its rounding to integers.
    watched = quantised.with_name("watched.onnx")
    loss.modify_model_output_intermediate_tensors(str(quantised), str(watched))
    activations = loss.create_activation_matching(loss.collect_activations(str(watched), _CalibrationReader(pixels)))
    watched.unlink()
    ratio = {
        name: loss.compute_signal_to_quantization_noice_ratio(match["pre_qdq"], match["post_qdq"])
        for name, match in activations.items()
    }
    # A layer is as good as the worst of its inputs and outputs.
    layers = [node for node in onnx.load(str(prepared)).graph.node if node.op_type in _LAYERS]
    worst = {
        node.name: min((ratio[name] for name in (*node.input, *node.output) if name in ratio), default=math.inf)
        for node in layers
    }
    return sorted(worst, key=lambda name: worst[name])


def _speedup(float_backend: OnnxBackend, quantised: OnnxBackend, pixels: np.ndarray) -> float:
    """Return the speed of the second relative to the first, the median of three rounds that alternate between them."""
    rounds = [
        [timed(partial(backend.logits, pixels), 3, 10, 0.5) for backend in (float_backend, quantised)] for _ in range(3)
    ]
    return float(np.median([np.median(first) / np.median(second) for first, second in rounds]))


def _copy_metadata(source: Path, target: Path) -> None:
    """Write the metadata of a model into the one made from it."""
    model = onnx.load(str(target))
    metadata = onnx.load(str(source), load_external_data=False).metadata_props
    onnx.helper.set_model_props(model, {item.key: item.value for item in metadata})
    onnx.save(model, str(target))
