"""The files that lie around predictions, read for a report: each in the shape in which it is written, or refused by its name."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.errors import DataError
from image_classifier.manifest import ENCODING
from image_classifier.predictions import PredictionTable

Check = Callable[[Any], bool]

_LARGEST = 1e38  # of a figure: what float32 holds
_DEEP = 3  # levels of a backend's figures


def read_sidecar(path: Path, check: Check, hint: str) -> dict[str, Any]:
    """What a JSON file holds, {} where there is none; DataError with the hint where it is damaged or of another shape."""
    try:
        text = path.read_text(*ENCODING)
        content = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode(*ENCODING)  # half a character, which no page can hold
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {str(path)!r} ({error})", hint) from error
    if content != {} and not check(content):
        raise DataError(f"{str(path)!r} does not hold what is written there: its values have another shape", hint)
    return dict(content)


def read_curves(path: Path, hint: str) -> dict[str, list[tuple[float, float]]]:
    """The (epoch, value) points of each metric in the metrics.csv of a run folder, {} where there is none; DataError where it is damaged."""
    curves: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(encoding=ENCODING[0], newline="") as file:
            for row in csv.DictReader(file):
                epoch, values = (
                    float(row.pop("epoch")),
                    {name: float(value) for name, value in row.items() if value and name != "step"},
                )
                if not 0 <= epoch <= 1e9:
                    raise ValueError(f"the epoch {epoch}")
                for name, value in values.items():
                    if abs(value) <= _LARGEST:  # neither infinite nor NaN
                        curves.setdefault(name, []).append((epoch, value))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"cannot read {str(path)!r} ({type(error).__name__}: {error})", hint) from error
    return curves


def number(low: float, high: float) -> Check:
    """A finite number within these bounds."""
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def or_none(check: Check) -> Check:
    """The same, null or left out."""
    return lambda value: value is None or check(value)


def each(check: Check, key: Callable[[str], bool] = lambda name: True) -> Check:
    """An object of any names for which all values are so."""
    return lambda value: isinstance(value, dict) and all(key(name) and check(item) for name, item in value.items())


def having(**checks: Check) -> Check:
    """An object with these names, among others."""
    return lambda value: isinstance(value, dict) and all(check(value.get(name)) for name, check in checks.items())


def _text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_FIGURE, value))


def _count(value: Any) -> bool:
    return isinstance(value, int) and number(0, 2**53)(value)


def _severity(name: str) -> bool:
    try:
        return 0 <= float(name) <= 100
    except ValueError:
        return False


def _nested(value: Any, deep: int = _DEEP) -> bool:
    """A figure, a word, or an object of such."""
    if isinstance(value, dict):
        return deep > 0 and all(_nested(item, deep - 1) for item in value.values())
    return value is None or isinstance(value, str | bool) or _FIGURE(value)


_FIGURE, _SHARE = number(-_LARGEST, _LARGEST), number(0, 1)
_INTERVALS = or_none(each(or_none(_pair)))
_FIGURES = (
    "top5_accuracy",
    "balanced_accuracy",
    "precision_macro",
    "recall_macro",
    "f1_weighted",
    "roc_auc",
    "average_precision",
    "log_loss",
)


def of_metrics(table: PredictionTable) -> Check:
    """metrics.json of these predictions."""
    support = np.bincount(table.targets, minlength=len(table.classes))
    score = having(precision=_SHARE, recall=_SHARE, f1=_SHARE, intervals=_INTERVALS)
    whole = having(
        accuracy=_SHARE,
        f1_macro=_SHARE,
        ece=or_none(_SHARE),
        **dict.fromkeys((*_FIGURES, "brier", "kappa"), or_none(_FIGURE)),
        intervals=_INTERVALS,
        baselines=or_none(each(having(accuracy=_SHARE, f1_macro=_SHARE, about=or_none(_text)))),
        leak=or_none(having(leaked=_count, what=_text, accuracy_clean=or_none(_SHARE))),
        confusion=lambda value: _is_confusion(value, support),
        per_class=lambda value: isinstance(value, list) and all(map(score, value)),
    )

    def check(value: Any) -> bool:
        rows = list(zip(table.classes, support.tolist(), strict=True))
        return whole(value) and [(row.get("label"), row.get("support")) for row in value["per_class"]] == rows

    return check


def _is_confusion(value: Any, support: np.ndarray) -> bool:
    """Counts [C, C] with as many images of each class as `support` int64 [C] says."""
    try:
        found = np.array(value)
    except (ValueError, OverflowError):
        return False
    right = (
        found.dtype == np.int64
        and found.shape == (len(support), len(support))
        and found.min() >= 0
        and found.max() <= support.sum()
    )
    return bool(right and (found.sum(axis=1) == support).all())


def is_robustness(value: Any) -> bool:
    """{corruption: {severity: accuracy}, about: {images, part}}."""
    about, levels = having(images=or_none(_count), part=or_none(_text)), each(_SHARE, _severity)
    return isinstance(value, dict) and all(
        about(item) if name == "about" else bool(item) and levels(item) for name, item in value.items()
    )


is_latency = having(backends=each(each(_nested)), hardware=or_none(each(_nested)))
is_audit = having(
    data=having(root=_text), counts=or_none(each(having(severity=_text, files=_count))), headlines=or_none(each(_text))
)
_MEASURED = having(
    **dict.fromkeys(("answered", "unknown", "unsure", "set_coverage", "empty_sets"), _SHARE),
    risk=or_none(_SHARE),
    set_size=number(0, _LARGEST),
)
is_calibration = having(decision=or_none(having(measured=_MEASURED, ood=having(threshold=or_none(_FIGURE)))))
