"""What is measured of a finished model for its report: why it was most surely wrong, how it bears worse pictures, how fast its exports are."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_classifier.cli import hydra_app
from image_classifier.errors import ClassifierError, ConfigError
from image_classifier.images import DecodeLimits, Preprocess
from image_classifier.inference.checkpoint import CheckpointBackend
from image_classifier.inference.explain_images import explainer_with, write_explanation
from image_classifier.inference.latency import Latency, hardware, in_this_process
from image_classifier.inference.predictor import Backend, Predictor
from image_classifier.inference.robustness import measure_robustness
from image_classifier.manifest import Manifest
from image_classifier.modeling.classifier import Classifier
from image_classifier.predictions import PredictionTable
from image_classifier.training.run_dir import RunDir

log = logging.getLogger(__name__)

_FEWEST, _MOST = 50, 500  # images that `auto` takes
_PASSES = 19  # over each of them: as it is, and in six ways and three steps
_SHARE = 0.1  # of what training saw


@dataclass(frozen=True)
class DiagnosticsSettings:
    """The keys of `diagnostics`; `robustness_images` is a number or `auto`."""

    explanations: int = 12
    robustness_images: Any = "auto"
    latency: bool = True

    def __post_init__(self) -> None:
        if self.explanations < 0:
            raise ConfigError(f"diagnostics.explanations must not be negative, got {self.explanations}")
        images = self.robustness_images
        if images != "auto" and (isinstance(images, bool) or not isinstance(images, int) or images < 0):
            raise ConfigError(
                f"diagnostics.robustness_images must be a whole number, 0 for none, or auto, got {images!r}"
            )

    def most_images(self, images_seen: int) -> int:
        """On how many images robustness is measured at most; `auto`: a tenth as many predictions as training saw images, within bounds."""
        if self.robustness_images != "auto":
            return int(self.robustness_images)
        return min(_MOST, max(_FEWEST, round(_SHARE * images_seen / _PASSES)))


def diagnostics_settings(config: Any) -> DiagnosticsSettings:
    """The keys of `diagnostics`, checked before any data is read."""
    return hydra_app.typed(DiagnosticsSettings, config.diagnostics, "diagnostics")


def run_diagnostics(
    classifier: Classifier,
    table: PredictionTable,
    part: Manifest,
    run: RunDir,
    data: Any,
    asked: DiagnosticsSettings,
    images_seen: int,
) -> None:
    """Write explain/*.png and robustness.json with its figure to the run's plots; the table's rows are the part's records.

    `data` has the `preprocess` and the `limits` that the model was trained with.
    """
    _forget(run.plots)
    with _optional("explanations"):
        _explain(classifier, table, part, run.plots / "explain", data.preprocess, data.limits, asked.explanations)
    if most := asked.most_images(images_seen):
        with _optional("robustness"):
            predictor = Predictor(CheckpointBackend(classifier), table.classes, data.preprocess, limits=data.limits)
            measured = measure_robustness(
                predictor, [part.file(record) for record in part], table.targets, most, part[0].split
            )
            measured.write(run.plots, f"Robustness of {run.name}")


def _forget(plots: Path) -> None:
    """Remove what was measured of an earlier model of this name."""
    for name in ("robustness.json", "robustness.png", "robustness.svg", "latency.json"):
        (plots / name).unlink(missing_ok=True)
    shutil.rmtree(plots / "explain", ignore_errors=True)


@contextmanager
def _optional(what: str) -> Iterator[None]:
    """Say what cannot be measured, an image that is gone for one; a trained model is worth more."""
    try:
        yield
    except ClassifierError as error:
        log.warning("no %s: %s", what, error)


def _explain(
    classifier: Classifier,
    table: PredictionTable,
    part: Manifest,
    directory: Path,
    preprocess: Preprocess,
    limits: DecodeLimits,
    most: int,
) -> None:
    """A figure of each of the surest mistakes; a network through which no gradient flows has none, which is said."""
    explainer = explainer_with(classifier, table.classes, preprocess, limits)
    predicted, confidence = table.answers()
    for row in table.surest_mistakes(most).tolist():
        label = table.classes[predicted[row]]
        try:
            found = explainer(part.file(part[row]), label)
        except RuntimeError as error:  # of autograd; the model itself is whole
            log.warning("no explanations: %s", str(error).partition("\n")[0])
            return
        write_explanation(found, label, float(confidence[row]), part.file(part[row]), directory)


def diagnose(run: RunDir) -> dict[str, float]:
    """What was measured, as single numbers under stable names: `robustness/blur_3`, `latency/onnx_p50_ms`."""
    found: dict[str, float] = {}
    if (file := run.plots / "robustness.json").is_file():
        rows = {name: row for name, row in json.loads(file.read_text(encoding="utf-8")).items() if name != "about"}
        found |= {
            f"robustness/{name}_{severity}": value
            for name, row in rows.items()
            for severity, value in row.items()
            if severity != "0"
        }
    if (file := run.plots / "latency.json").is_file():
        rows = json.loads(file.read_text(encoding="utf-8"))["backends"]
        found |= {
            f"latency/{name}_{figure}": row[figure]
            for name, row in rows.items()
            for figure in ("p50_ms", "p95_ms", "images_per_s")
        }
    return found


def measure_exports(backends: Mapping[str, tuple[Backend, Path]], run: RunDir, size: int) -> None:
    """Write latency.json: how fast each backend answers for images of `size` pixels a side, and how large its file is."""
    with _optional("latency"):
        Latency(
            {name: in_this_process(backend, file, size) for name, (backend, file) in backends.items()}, hardware()
        ).write(run.plots)
