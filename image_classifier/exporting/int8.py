"""The model in 8-bit integers, under a contract: so many points of accuracy may be lost, and it must be faster, or there is none."""

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
from image_classifier.inference.golden import Golden, checked
from image_classifier.inference.latency import timed
from image_classifier.inference.onnx_runtime import OnnxBackend
from image_classifier.inference.robustness import stratified
from image_classifier.predictions import softmax

log = logging.getLogger(__name__)

NAME = "model.int8.onnx"
_LAYERS = ("Conv", "Gemm", "MatMul")
_BETWEEN = (
    "Add",
    "Relu",
    "Clip",
    "MaxPool",
    "GlobalAveragePool",
    "Concat",
)  # or integers would become floats and back around each
_SHARES = (0.0, 0.05, 0.1, 0.2, 0.4)  # of the layers that stay in float32, one trial after the other
_DEBUG_IMAGES, _SPEED_BATCH = 8, 16


@dataclass(frozen=True)
class Int8Settings:
    """The keys of `int8` in conf/export.yaml.

    Args:
        max_drop: Points of accuracy, 0..100, that may be lost, overall and by each class; of a small class always one image.
        min_speedup: How many times as fast as model.onnx it must be, in batches of 16 on this machine.
        images: Training images, every class in its share, from which the ranges are learnt.
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
    """How many points of accuracy were lost overall, and by the class that lost most beyond what it may; `breach` says why that is too much."""

    accuracy: float
    overall: float
    worst_class: str
    by_class: float
    breach: str

    @classmethod
    def of(
        cls, targets: np.ndarray, expected: np.ndarray, actual: np.ndarray, classes: Sequence[str], most: float
    ) -> Drop:
        """Compare two backends' probabilities [N, C] on images of these class indices [N]; `most` points may be lost."""
        before, after = (probabilities.argmax(axis=1) == targets for probabilities in (expected, actual))
        lost = np.bincount(targets, before.astype(float) - after, len(classes))
        counts = np.bincount(targets, minlength=len(classes))
        allowed = np.maximum(1, np.floor(most / 100 * counts))  # an image is the least that a class can lose
        worst = int((lost - allowed).argmax())
        by_class, overall = 100 * lost[worst] / max(1, counts[worst]), 100 * float(before.mean() - after.mean())
        breach = ""
        if overall > most + 1e-9:
            breach = f"{overall:.2f} points of accuracy are lost, {most:g} may be"
        elif lost[worst] > allowed[worst]:
            breach = f"the class {classes[worst]!r} loses {by_class:.1f} points, {most:g} may be"
        return cls(float(after.mean()), overall, classes[worst], float(by_class), breach)


def export_int8(reference: ParitySet, directory: Path, asked: Int8Settings) -> dict[str, Any]:
    """Write model.int8.onnx: unsigned activations, weights signed and per channel, the most sensitive layers in float32 where the contract needs it.

    Raises:
        ParityError: No choice of layers keeps the contract.
    """
    info, float_model = reference.bundle.info, reference.bundle.path("model.onnx")
    rows = stratified(reference.train.targets, asked.images)
    learnt = reference.read([reference.train.file(reference.train[row]) for row in rows.tolist()])
    prepared = directory / "prepared.onnx"
    quant_pre_process(str(float_model), str(prepared), skip_symbolic_shape=True)
    whole, breach = OnnxBackend(float_model), ""
    for kept in _kept_in_float(prepared, learnt, directory / NAME):
        _quantise(prepared, directory / NAME, learnt, kept)
        backend = OnnxBackend(directory / NAME)
        probabilities = softmax(answers_of(backend, reference.pixels)[0], info.temperature)
        drop = Drop.of(reference.targets, reference.probabilities, probabilities, info.classes, asked.max_drop)
        speedup = _speedup(whole, backend, reference.pixels[:_SPEED_BATCH])
        slow = (
            ""
            if speedup >= asked.min_speedup
            else f"it is {speedup:.2f} times as fast as model.onnx, {asked.min_speedup:g} are asked for"
        )
        breach = drop.breach or slow
        log.info(
            "int8, %d layers in float32: %.2f points lost, %.2f times as fast. %s",
            len(kept),
            drop.overall,
            speedup,
            breach,
        )
        if not breach:
            prepared.unlink()
            _keep_metadata(float_model, directory / NAME)
            parity = Parity.of(reference.probabilities, probabilities, reference.paths, NAME)
            golden = checked(NAME, backend, Golden.of(reference.bundle), info.temperature).agreement
            facts = {
                "golden_agreement": golden,
                "drop": drop.overall,
                "worst_class": drop.worst_class,
                "worst_class_drop": drop.by_class,
                "speedup": round(speedup, 2),
            }
            return {**parity.as_dict(), **facts, "tolerance": 1.0, "float_layers": list(kept)}
        if slow:
            break  # with more layers in float32 it is slower still
    raise ParityError(
        f"int8 breaks its contract: {breach}",
        "model.onnx stays what is served; loosen int8.max_drop or int8.min_speedup",
    )


class _CalibrationReader(CalibrationDataReader):
    """Pixels uint8 [N, 3, S, S] a batch at a time."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._batches = iter([pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"pixels": batch}


def _quantise(prepared: Path, path: Path, learnt: np.ndarray, kept: Sequence[str]) -> None:
    quantize_static(
        str(prepared),
        str(path),
        _CalibrationReader(learnt),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=[*_LAYERS, *_BETWEEN],
        nodes_to_exclude=list(kept),
    )


def _kept_in_float(prepared: Path, learnt: np.ndarray, quantised: Path) -> Iterator[list[str]]:
    """No layer, then more and more of those whose values suffer most, as the quantised model of the trial before tells."""
    yield []
    suffering = _most_sensitive(prepared, quantised, learnt[:_DEBUG_IMAGES])
    for share in _SHARES[1:]:
        yield suffering[: max(1, math.ceil(share * len(suffering)))]


def _most_sensitive(prepared: Path, quantised: Path, pixels: np.ndarray) -> list[str]:
    """Names of the layers, the one first whose inputs and outputs lose most signal to rounding (the least ratio of signal to noise)."""
    watched = quantised.with_name("watched.onnx")
    loss.modify_model_output_intermediate_tensors(str(quantised), str(watched))
    found = loss.create_activation_matching(loss.collect_activations(str(watched), _CalibrationReader(pixels)))
    watched.unlink()
    ratio = {
        name: loss.compute_signal_to_quantization_noice_ratio(match["pre_qdq"], match["post_qdq"])
        for name, match in found.items()
    }
    layers = [node for node in onnx.load(str(prepared)).graph.node if node.op_type in _LAYERS]
    worst = {
        node.name: min((ratio[name] for name in (*node.input, *node.output) if name in ratio), default=math.inf)
        for node in layers
    }
    return sorted(worst, key=lambda name: worst[name])


def _speedup(whole: OnnxBackend, quantised: OnnxBackend, pixels: np.ndarray) -> float:
    """How many times as fast the second is, the median of three turns."""
    turns = [[timed(partial(backend.logits, pixels), 3, 10, 0.5) for backend in (whole, quantised)] for _ in range(3)]
    return float(np.median([np.median(first) / np.median(second) for first, second in turns]))


def _keep_metadata(source: Path, target: Path) -> None:
    """What a model says of itself, written into the one made from it."""
    model = onnx.load(str(target))
    onnx.helper.set_model_props(
        model, {item.key: item.value for item in onnx.load(str(source), load_external_data=False).metadata_props}
    )
    onnx.save(model, str(target))
