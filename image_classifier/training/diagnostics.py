"""Measurements of a finished model for its report: heat maps of mistakes, robustness to worse images, latency."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_classifier.dataset.settings import DataSettings
from image_classifier.errors import ClassifierError, ConfigError
from image_classifier.inference.explain_images import explainer_with, write_explanation
from image_classifier.inference.latency import Latency, hardware, in_this_process
from image_classifier.inference.predictor import Backend, Predictor
from image_classifier.inference.robustness import measure_robustness
from image_classifier.manifest import Manifest
from image_classifier.modeling.classifier import Classifier
from image_classifier.predictions import PredictionTable
from image_classifier.training.run_dir import RunDir

log = logging.getLogger(__name__)

_MIN_IMAGES, _MAX_IMAGES = 50, 500  # of `auto`
_PASSES = 19  # over each image: unchanged, and with six corruptions of three severities
_SHARE = 0.1  # of the images that training saw


@dataclass(frozen=True)
class DiagnosticsSettings:
    """The keys of `diagnostics`; `robustness_images` is a number or `auto`."""

    explanations: int = 12
    robustness_images: Any = "auto"
    latency: bool = True

    def __post_init__(self) -> None:
        if self.explanations < 0:
            raise ConfigError(f"diagnostics.explanations must be 0 or more, got {self.explanations}")
        images = self.robustness_images
        if images != "auto" and (isinstance(images, bool) or not isinstance(images, int) or images < 0):
            raise ConfigError(
                f"diagnostics.robustness_images must be a whole number, 0 for none, or auto, got {images!r}"
            )

    def max_images(self, images_seen: int) -> int:
        """Return on how many images robustness is measured at most.

        With `auto` there are a tenth as many predictions as images that training saw, within bounds.

        >>> DiagnosticsSettings().max_images(images_seen=38_000)
        200
        """
        if self.robustness_images != "auto":
            return int(self.robustness_images)
        return min(_MAX_IMAGES, max(_MIN_IMAGES, round(_SHARE * images_seen / _PASSES)))


def run_diagnostics(
    classifier: Classifier,
    backend: Callable[[], Backend],
    table: PredictionTable,
    images: Manifest,
    run: RunDir,
    data: DataSettings,
    settings: DiagnosticsSettings,
    images_seen: int,
) -> None:
    """Write explain/*.png and robustness.json with its figure to the run's plots.

    Args:
        classifier: The finished model.
        backend: Makes the same, as fast as this machine computes it.
        table: Its predictions of one split.
        images: That split, in the order of the table's rows.
        run: Where the files go.
        data: With the `preprocess` and `limits` that the model was trained with.
        settings: How much is measured.
        images_seen: How many images training saw, for `auto`.
    """
    _remove_old(run.plots)
    with _optional("explanations"):
        _explain(classifier, table, images, run.plots / "explain", data, settings.explanations)
    if limit := settings.max_images(images_seen):
        with _optional("robustness"):
            predictor = Predictor(backend(), table.classes, data.preprocess, limits=data.limits)
            files = [images.file(record) for record in images]
            measured = measure_robustness(predictor, files, table.targets, limit, images[0].split)
            measured.write(run.plots, f"Robustness of {run.name}")


def _remove_old(plots: Path) -> None:
    """Remove what was measured of an earlier model of this name."""
    for name in ("robustness.json", "robustness.png", "robustness.svg", "latency.json"):
        (plots / name).unlink(missing_ok=True)
    shutil.rmtree(plots / "explain", ignore_errors=True)


@contextmanager
def _optional(name: str) -> Iterator[None]:
    """Log what cannot be measured, for example of an image that is gone, and keep the trained model."""
    try:
        yield
    except ClassifierError as error:
        log.warning("no %s: %s", name, error)


def _explain(
    classifier: Classifier,
    table: PredictionTable,
    images: Manifest,
    directory: Path,
    data: DataSettings,
    limit: int,
) -> None:
    """Draw heat maps of the most confident mistakes; log a network that has none because no gradient flows."""
    explainer = explainer_with(classifier, table.classes, data.preprocess, data.limits)
    predicted, confidence = table.answers()
    for row in table.surest_mistakes(limit).tolist():
        label, file = table.classes[predicted[row]], images.file(images[row])
        try:
            explained = explainer(file, label)
        except RuntimeError as error:  # of autograd; the model itself is fine
            log.warning("no explanations: %s", str(error).partition("\n")[0])
            return
        write_explanation(explained, label, float(confidence[row]), file, directory)


def diagnose(run: RunDir) -> dict[str, float]:
    """Return what was measured as single numbers under stable names: `robustness/blur_3`, `latency/onnx_p50_ms`."""
    values: dict[str, float] = {}
    if (file := run.plots / "robustness.json").is_file():
        rows = {name: row for name, row in json.loads(file.read_text(encoding="utf-8")).items() if name != "about"}
        values |= {
            f"robustness/{name}_{severity}": value
            for name, row in rows.items()
            for severity, value in row.items()
            if severity != "0"
        }
    if (file := run.plots / "latency.json").is_file():
        rows = json.loads(file.read_text(encoding="utf-8"))["backends"]
        values |= {
            f"latency/{name}_{figure}": row[figure]
            for name, row in rows.items()
            for figure in ("p50_ms", "p95_ms", "images_per_s")
        }
    return values


def measure_exports(backends: Mapping[str, tuple[Backend, Path]], run: RunDir, size: int) -> None:
    """Write latency.json: the speed of each backend for images of `size` pixels a side, and the size of its file."""
    with _optional("latency"):
        measured = {name: in_this_process(backend, file, size) for name, (backend, file) in backends.items()}
        Latency(measured, hardware()).write(run.plots)
