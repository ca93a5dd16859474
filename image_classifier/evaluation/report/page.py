"""The report of one run as one HTML file below 10 MB that needs no network and runs no foreign script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.evaluation.reliability.calibration import GOAL, Reliability
from image_classifier.evaluation.reliability.selective_prediction import RiskCurve, risk_curve
from image_classifier.evaluation.report.charts import Scale, line_chart
from image_classifier.evaluation.report.confusions import frequent, matrix
from image_classifier.evaluation.report.gallery import cell_images, worst
from image_classifier.evaluation.report.locate import limits_of
from image_classifier.evaluation.report.provenance import data_rows, exports, origin
from image_classifier.evaluation.report.run_data import RunData
from image_classifier.evaluation.report.sentences import absent, limits_in_words, measured_in_words, per_cent, verdict
from image_classifier.html import document
from image_classifier.html.text import plain
from image_classifier.predictions import PredictionTable

_HERE = Path(__file__).parent
_COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)
_TITLES = {"loss": "Loss", "accuracy": "Accuracy", "f1_macro": "F1 (macro)"}
_NAMES = {
    "accuracy": "Accuracy",
    "top5_accuracy": "Top-5 accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "f1_macro": "F1, macro",
    "precision_macro": "Precision, macro",
    "recall_macro": "Recall, macro",
    "f1_weighted": "F1, weighted",
    "roc_auc": "ROC-AUC, one against the rest",
    "average_precision": "Average precision",
    "log_loss": "Log loss (nats, lower is better)",
    "brier": "Brier score (lower is better)",
    "ece": "Expected calibration error (lower is better)",
    "kappa": "Cohen's kappa",
}


def run_page(facts: RunData) -> str:
    """The page as one text."""
    table = facts.table
    predicted, confidence = table.answers()
    confusion = np.array(facts.metrics["confusion"], dtype=np.int64)
    pairs = frequent(confusion)
    limits = limits_of(facts.info)
    mistakes = worst(table, facts.places.root, limits, facts.places.explanations, facts.roots)
    cells = cell_images(table, confidence, facts.places.root, limits)
    explained = any(mistake.explanation.address for mistake in mistakes)
    return document.render(
        _HERE / "run.html.j2",
        _HERE / "report.css",
        _HERE / "report.js",
        facts=facts,
        name=plain(facts.name),
        verdict=verdict(facts, float(confidence.mean()), pairs),
        tiles=list(_tiles(facts)),
        scores=list(_scores(facts)),
        baselines=_baselines(facts),
        curves=list(_curves(facts.curves)),
        classes=_classes(facts, confusion),
        labels=[plain(label) for label in table.classes],
        matrix=matrix(confusion),
        pairs=pairs,
        num_pairs=int(np.count_nonzero(confusion - np.diag(np.diag(confusion)))),
        cells=cells,
        pictures=any(image["picture"] for image in cells["images"]),
        mistakes=mistakes,
        num_wrong=int((predicted != table.targets).sum()),
        decision=limits_in_words(facts.info.decision if facts.info else None),
        measured=measured_in_words(facts),
        trust=_trust(table),
        robustness=_robustness(facts.robustness),
        exports=exports(facts.sizes, facts.latency),
        data=data_rows(facts),
        origin=origin(facts),
        absent=absent(facts, explained or not mistakes),
        per_cent=per_cent,
    )


def _tiles(facts: RunData) -> Iterator[tuple[str, str, str]]:
    """Value, what it is, and its interval."""
    for metric, title in (
        ("accuracy", "accuracy"),
        ("f1_macro", "F1, macro"),
        ("log_loss", "log loss"),
        ("ece", "calibration error"),
    ):
        value, interval = facts.metrics.get(metric), facts.interval(metric)
        if value is not None:
            share = metric in ("accuracy", "ece")
            words = [per_cent(bound) if share else f"{bound:.3f}" for bound in interval or ()]
            yield per_cent(value) if share else f"{value:.3f}", title, " to ".join(words)


def _scores(facts: RunData) -> Iterator[dict[str, Any]]:
    for name, title in _NAMES.items():
        if facts.metrics.get(name) is not None:
            yield {"name": name, "title": title, "value": facts.metrics[name], "interval": facts.interval(name)}


def _baselines(facts: RunData) -> list[dict[str, Any]]:
    """What simple classifiers reach, and the model last."""
    rows = [{"name": name, **values, "own": False} for name, values in (facts.metrics.get("baselines") or {}).items()]
    own = {
        "name": "this model",
        "about": "",
        "accuracy": facts.metrics["accuracy"],
        "f1_macro": facts.metrics["f1_macro"],
        "own": True,
    }
    return [*rows, own] if rows else []


def _curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Iterator[tuple[str, str]]:
    """Title and drawing of each metric that was followed over epochs."""
    for metric, title in _TITLES.items():
        lines = {split: curves[f"{split}/{metric}"] for split in ("train", "val") if curves.get(f"{split}/{metric}")}
        if lines:
            epochs, values = zip(*(point for points in lines.values() for point in points), strict=True)
            up = Scale.over(title, values, percent=metric != "loss")
            about = "; ".join(
                f"{title} of {split} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for split, points in lines.items()
            )
            yield title, line_chart(lines, Scale.over("epoch", epochs, whole=True), up, about)


def _classes(facts: RunData, confusion: np.ndarray) -> list[dict[str, Any]]:
    """The rows of the class table: scores with their intervals, and for what the class is taken most."""
    wrong = confusion - np.diag(np.diag(confusion))
    takers = wrong.argmax(axis=1) if len(wrong) else np.zeros(0, dtype=int)
    rows = []
    for code, score in enumerate(facts.metrics["per_class"]):
        taken = int(wrong[code, takers[code]])
        intervals = score.get("intervals") or {}
        rows.append(
            {
                **score,
                "label": plain(score["label"]),
                "intervals": intervals,
                "code": code,
                "taken": taken,
                "taker": int(takers[code]),
            }
        )
    return rows


def _trust(table: PredictionTable) -> dict[str, Any]:
    """Reliability before and after the temperature, and risk against coverage."""
    found = {"confidence": Reliability.of(table)}
    if table.temperature != 1:
        found = {"before": Reliability.of(replace(table, temperature=1.0)), "after": found["confidence"]}
    across, up = Scale("confidence", 0, 1, percent=True), Scale("accuracy", 0, 1, percent=True)
    diagram = line_chart(
        {name: _line(item) for name, item in found.items()}, across, up, _said(found), guide=[(0, 0), (1, 1)]
    )
    curve = risk_curve(table)
    kept = (curve.coverage >= 0.02) | (
        curve.coverage == curve.coverage[-1]
    )  # the first few answers are a matter of luck
    top = max(0.01, float(curve.risk[kept].max()) * 1.1)
    points = [point for point in zip(curve.coverage.tolist(), curve.risk.tolist(), strict=True) if point[1] <= top]
    risk = line_chart(
        {"risk": points},
        Scale("answered", 0, 1, percent=True),
        Scale("wrong", 0, min(1, top), percent=True),
        _risk_said(curve),
    )
    return {
        "reliability": found,
        "temperature": table.temperature,
        "goal": GOAL,
        "diagram": diagram,
        "risk": risk,
        "risks": risks(curve),
    }


def risks(curve: RiskCurve) -> list[tuple[float, float]]:
    """The risk at a few round coverages: the smallest that reaches each."""
    places = np.searchsorted(curve.coverage, np.array(_COVERAGES) - 1e-12)
    return list(zip(_COVERAGES, curve.risk[places].tolist(), strict=True))


def _line(found: Reliability) -> list[tuple[float, float]]:
    met = found.counts > 0
    return list(zip(found.confidence[met].tolist(), found.accuracy[met].tolist(), strict=True))


def _said(found: Mapping[str, Reliability]) -> str:
    words = ", ".join(f"{name}: expected calibration error {per_cent(item.ece)}" for name, item in found.items())
    return f"Accuracy against confidence; the grey line is where both are equal; {words}"


def _risk_said(curve: RiskCurve) -> str:
    return "Share of wrong answers by share answered: " + ", ".join(
        f"{per_cent(risk)} at {per_cent(coverage)}" for coverage, risk in risks(curve)
    )


def _robustness(found: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy by severity of each corruption, as a table and a drawing, and what it rests on; {} where none was measured."""
    rows = {plain(name): _levels(levels) for name, levels in found.items() if name != "about"}
    if not rows:
        return {}
    levels = sorted({level for points in rows.values() for level, _ in points})
    values = [value for points in rows.values() for _, value in points]
    about = "; ".join(f"{name} {per_cent(points[0][1])} to {per_cent(points[-1][1])}" for name, points in rows.items())
    up = Scale.over("accuracy", values, percent=True)
    drawing = line_chart(rows, Scale.over("severity", levels, whole=True), up, f"Accuracy by severity: {about}")
    return {
        "levels": levels,
        "rows": {name: dict(points) for name, points in rows.items()},
        "drawing": drawing,
        "about": found.get("about") or {},
    }


def _levels(levels: Mapping[str, float]) -> list[tuple[float, float]]:
    """(severity, accuracy), the mildest first."""
    return sorted((float(level), float(value)) for level, value in levels.items())
