"""The JSON files next to a run's predictions, checked before a report shows them, and the run's learning curves."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from image_classifier.errors import DataError
from image_classifier.manifest import ENCODING
from image_classifier.predictions import PredictionTable
from image_classifier.text import printable

_MAX_FIGURE = 1e38  # the largest float32


def _severity(name: str) -> str:
    if not 0 <= float(name) <= 100:
        raise ValueError("expected a severity from 0 to 100")
    return name


Figure = Annotated[float, Field(ge=-_MAX_FIGURE, le=_MAX_FIGURE, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Severity = Annotated[str, AfterValidator(_severity)]
Bounds = Annotated[list[Figure], Field(min_length=2, max_length=2)]
Intervals: TypeAlias = dict[str, Bounds | None] | None

# Measurements of a backend: values, or objects of values, at most three levels deep.
_Value: TypeAlias = str | bool | Figure | None
_Values: TypeAlias = _Value | dict[str, _Value]
_DeepValues: TypeAlias = _Value | dict[str, _Values]
Measurement: TypeAlias = _Value | dict[str, _DeepValues]


class Sidecar(BaseModel):
    """An object in a JSON file: the fields that a report reads, whatever else it holds."""

    model_config = ConfigDict(strict=True)


class ClassRow(Sidecar):
    """One class in metrics.json."""

    label: Text
    support: Count
    precision: Share
    recall: Share
    f1: Share
    intervals: Intervals = None


class BaselineRow(Sidecar):
    """One baseline in metrics.json."""

    accuracy: Share
    f1_macro: Share
    about: Text | None = None


class Leak(Sidecar):
    """The overlap with the training images in metrics.json."""

    leaked: Count
    what: Text
    accuracy_clean: Share | None = None


class MetricsFile(Sidecar):
    """metrics.json."""

    accuracy: Share
    f1_macro: Share
    top5_accuracy: Figure | None = None
    balanced_accuracy: Figure | None = None
    precision_macro: Figure | None = None
    recall_macro: Figure | None = None
    f1_weighted: Figure | None = None
    roc_auc: Figure | None = None
    average_precision: Figure | None = None
    log_loss: Figure | None = None
    brier: Figure | None = None
    ece: Share | None = None
    kappa: Figure | None = None
    intervals: Intervals = None
    baselines: dict[str, BaselineRow] | None = None
    leak: Leak | None = None
    confusion: list[list[Count]]
    per_class: list[ClassRow]


class RobustnessAbout(Sidecar):
    """The images that robustness.json was measured on."""

    images: Count | None = None
    part: Text | None = None


class RobustnessFile(Sidecar):
    """robustness.json: corruption -> severity -> accuracy."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, Annotated[dict[Severity, Share], Field(min_length=1)]] = Field(init=False)

    about: RobustnessAbout = RobustnessAbout()


class LatencyFile(Sidecar):
    """latency.json: measurements of each backend, and the hardware."""

    backends: dict[str, dict[str, Measurement]]
    hardware: dict[str, Measurement] | None = None


class MeasuredDecision(Sidecar):
    """The effect of the limits on one split, in calibration.json."""

    answered: Share
    unknown: Share
    unsure: Share
    set_coverage: Share
    empty_sets: Share
    risk: Share | None = None
    set_size: Annotated[float, Field(ge=0, le=_MAX_FIGURE, allow_inf_nan=False)]


class OodLimit(Sidecar):
    """The limit for unfamiliar images in calibration.json."""

    threshold: Figure | None = None


class DecisionResult(Sidecar):
    """The limits and their effect in calibration.json."""

    measured: MeasuredDecision
    ood: OodLimit


class CalibrationFile(Sidecar):
    """calibration.json."""

    decision: DecisionResult | None = None


class AuditData(Sidecar):
    """The data set that audit.json is about."""

    root: Text


class AuditCount(Sidecar):
    """The number of files with one issue type in audit.json."""

    severity: Text
    files: Count


class AuditFile(Sidecar):
    """audit.json."""

    data: AuditData
    counts: dict[str, AuditCount] | None = None
    headlines: dict[str, Text] | None = None


class CandidateRow(Sidecar):
    """One model that a run could have delivered, in `provenance.candidates` of bundle.json."""

    name: Text
    about: Text
    seconds: Annotated[float, Field(ge=0, le=_MAX_FIGURE, allow_inf_nan=False)]
    val_accuracy: Share
    val_log_loss: Figure
    delivered: bool
    p_value: Share | None = None


class CurveRow(Sidecar):
    """What more images would bring, in `provenance.learning_curve` of bundle.json."""

    points: list[Annotated[list[Figure], Field(min_length=2, max_length=2)]]
    gain: Figure
    error: Figure
    needy: list[Text] = []


def checked_rows(content: Any, schema: type[Sidecar]) -> list[dict[str, Any]]:
    """Return the objects of a list that fit a schema; bundle.json may come from anywhere."""
    rows = []
    for item in content if isinstance(content, list) else []:
        try:
            rows.append(schema.model_validate(item).model_dump())
        except ValidationError:
            continue
    return rows


def read_sidecar(path: Path, schema: type[Sidecar], hint: str, table: PredictionTable | None = None) -> dict[str, Any]:
    """Return the content of a JSON file, {} where there is none.

    With `table`, the file is a metrics.json and must be about these predictions.

    Raises:
        DataError: The file is damaged or does not fit the schema; the hint is appended.
    """
    try:
        text = path.read_text(*ENCODING)
        content = json.loads(text)
        if "\\ud" in text.lower():
            # A lone surrogate, which no page can hold.
            json.dumps(content, ensure_ascii=False).encode(*ENCODING)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {str(path)!r} ({error})", hint) from error
    if content == {}:
        return {}
    try:
        schema.model_validate(content)
    except ValidationError as error:
        raise DataError(f"invalid {str(path)!r}: {_first_problem(error)}", hint) from error
    if table is not None and not _is_about(content, table):
        raise DataError(f"invalid {str(path)!r}: it is about other predictions than those next to it", hint)
    return dict(content)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, problem["loc"]))
    return printable(f"{where or 'the file'}: {problem['msg']}")


def _is_about(metrics: dict[str, Any], table: PredictionTable) -> bool:
    """Return whether classes, supports and confusion matrix of a metrics.json agree with the predictions."""
    support = np.bincount(table.targets, minlength=len(table.classes))
    rows = [(row["label"], row["support"]) for row in metrics["per_class"]]
    if rows != list(zip(table.classes, support.tolist(), strict=True)):
        return False
    size = len(support)
    if [len(row) for row in metrics["confusion"]] != [size] * size:
        return False
    return bool(np.array_equal([sum(row) for row in metrics["confusion"]], support))


def read_curves(path: Path, hint: str) -> dict[str, list[tuple[float, float]]]:
    """Return the (epoch, value) points of each metric in the metrics.csv of a run folder, {} where there is none.

    Raises:
        DataError: The file is damaged; the hint is appended.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(encoding=ENCODING[0], newline="") as file:
            for row in csv.DictReader(file):
                epoch = float(row.pop("epoch"))
                values = {name: float(value) for name, value in row.items() if value and name != "step"}
                if not 0 <= epoch <= 1e9:
                    raise ValueError(f"invalid epoch {epoch}")
                for name, value in values.items():
                    if abs(value) <= _MAX_FIGURE:  # neither infinite nor NaN
                        curves.setdefault(name, []).append((epoch, value))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"cannot read {str(path)!r} ({type(error).__name__}: {error})", hint) from error
    return curves
