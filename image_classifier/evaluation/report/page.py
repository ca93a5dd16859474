"""The report of one run as one HTML file below 10 MB that needs no network and runs no other scripts."""

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
from image_classifier.evaluation.report.sentences import limits_in_words, measured_in_words, missing, per_cent, verdict
from image_classifier.evaluation.report.tried import tried
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
    "roc_auc": "ROC-AUC, one class against the rest",
    "average_precision": "Average precision",
    "log_loss": "Log loss (nats, lower is better)",
    "brier": "Brier score (lower is better)",
    "ece": "Expected calibration error (lower is better)",
    "kappa": "Cohen's kappa",
}


def run_page(run: RunData) -> str:
    """Return the page as HTML."""
    table = run.table
    predicted, confidence = table.answers()
    confusion = np.array(run.metrics["confusion"], dtype=np.int64)
    pairs = frequent(confusion)
    limits = limits_of(run.info)
    mistakes = worst(table, run.paths.root, limits, run.paths.explanations, run.roots)
    cells = cell_images(table, confidence, run.paths.root, limits)
    explained = any(mistake.explanation.address for mistake in mistakes)
    return document.render(
        _HERE / "run.html.j2",
        _HERE / "report.css",
        _HERE / "report.js",
        run=run,
        name=plain(run.name),
        verdict=verdict(run, float(confidence.mean()), pairs),
        tiles=list(_tiles(run)),
        scores=list(_scores(run)),
        baselines=_baselines(run),
        curves=list(_curves(run.curves)),
        tried=tried(run),
        classes=_classes(run, confusion),
        labels=[plain(label) for label in table.classes],
        matrix=matrix(confusion),
        pairs=pairs,
        num_pairs=int(np.count_nonzero(confusion - np.diag(np.diag(confusion)))),
        cells=cells,
        pictures=any(image["picture"] for image in cells["images"]),
        mistakes=mistakes,
        num_wrong=int((predicted != table.targets).sum()),
        decision=limits_in_words(run.info.decision if run.info else None),
        measured=measured_in_words(run),
        trust=_trust(table),
        robustness=_robustness(run.robustness),
        exports=exports(run.sizes, run.latency),
        data=data_rows(run),
        origin=origin(run),
        missing=missing(run, explained or not mistakes),
        per_cent=per_cent,
    )


def _tiles(run: RunData) -> Iterator[tuple[str, str, str]]:
    """Yield value, title and interval of each tile."""
    for metric, title in (
        ("accuracy", "accuracy"),
        ("f1_macro", "F1, macro"),
        ("log_loss", "log loss"),
        ("ece", "calibration error"),
    ):
        value, interval = run.metrics.get(metric), run.interval(metric)
        if value is not None:
            share = metric in ("accuracy", "ece")
            words = [per_cent(bound) if share else f"{bound:.3f}" for bound in interval or ()]
            yield per_cent(value) if share else f"{value:.3f}", title, " to ".join(words)


def _scores(run: RunData) -> Iterator[dict[str, Any]]:
    for name, title in _NAMES.items():
        if run.metrics.get(name) is not None:
            yield {"name": name, "title": title, "value": run.metrics[name], "interval": run.interval(name)}


def _baselines(run: RunData) -> list[dict[str, Any]]:
    """Return the scores of the baselines, and the model last."""
    rows = [
        {"name": name, **values, "is_model": False} for name, values in (run.metrics.get("baselines") or {}).items()
    ]
    model = {
        "name": "this model",
        "about": "",
        "accuracy": run.metrics["accuracy"],
        "f1_macro": run.metrics["f1_macro"],
        "is_model": True,
    }
    return [*rows, model] if rows else []


def _curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Iterator[tuple[str, str]]:
    """Yield title and drawing of each metric that was logged by epoch."""
    for metric, title in _TITLES.items():
        lines = {split: curves[f"{split}/{metric}"] for split in ("train", "val") if curves.get(f"{split}/{metric}")}
        if lines:
            epochs, values = zip(*(point for points in lines.values() for point in points), strict=True)
            up = Scale.over(title, values, percent=metric != "loss")
            about = "; ".join(
                f"{title} of {split} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for split, points in lines.items()
            )
            yield title, line_chart(lines, Scale.over("epoch", epochs, integers=True), up, about)


def _classes(run: RunData, confusion: np.ndarray) -> list[dict[str, Any]]:
    """Return the rows of the class table: scores with intervals, and the most frequent wrong prediction."""
    wrong = confusion - np.diag(np.diag(confusion))
    mostly = wrong.argmax(axis=1) if len(wrong) else np.zeros(0, dtype=int)
    rows = []
    for code, score in enumerate(run.metrics["per_class"]):
        count = int(wrong[code, mostly[code]])
        intervals = score.get("intervals") or {}
        rows.append(
            {
                **score,
                "label": plain(score["label"]),
                "intervals": intervals,
                "code": code,
                "confused": count,
                "confused_with": int(mostly[code]),
            }
        )
    return rows


def _trust(table: PredictionTable) -> dict[str, Any]:
    """Return reliability before and after the temperature, and risk by coverage."""
    calibrated = Reliability.of(table)
    reliability = {"confidence": calibrated}
    if table.temperature != 1:
        reliability = {"before": Reliability.of(replace(table, temperature=1.0)), "after": calibrated}
    across, up = Scale("confidence", 0, 1, percent=True), Scale("accuracy", 0, 1, percent=True)
    diagram = line_chart(
        {name: _line(item) for name, item in reliability.items()},
        across,
        up,
        _reliability_text(reliability),
        guide=[(0, 0), (1, 1)],
    )
    curve = risk_curve(table)
    # The first few images are a matter of luck.
    kept = (curve.coverage >= 0.02) | (curve.coverage == curve.coverage[-1])
    top = max(0.01, float(curve.risk[kept].max()) * 1.1)
    points = [point for point in zip(curve.coverage.tolist(), curve.risk.tolist(), strict=True) if point[1] <= top]
    risk = line_chart(
        {"risk": points},
        Scale("get a label", 0, 1, percent=True),
        Scale("wrong", 0, min(1, top), percent=True),
        _risk_text(curve),
    )
    return {
        "reliability": reliability,
        "temperature": table.temperature,
        "goal": GOAL,
        "diagram": diagram,
        "risk": risk,
        "risks": risks(curve),
    }


def risks(curve: RiskCurve) -> list[tuple[float, float]]:
    """Return the risk at a few round coverages, each at the first point that reaches it."""
    rows = np.searchsorted(curve.coverage, np.array(_COVERAGES) - 1e-12)
    return list(zip(_COVERAGES, curve.risk[rows].tolist(), strict=True))


def _line(bins: Reliability) -> list[tuple[float, float]]:
    filled = bins.counts > 0
    return list(zip(bins.confidence[filled].tolist(), bins.accuracy[filled].tolist(), strict=True))


def _reliability_text(reliability: Mapping[str, Reliability]) -> str:
    words = ", ".join(f"{name}: expected calibration error {per_cent(item.ece)}" for name, item in reliability.items())
    return f"Accuracy by confidence; on the grey line both are equal; {words}"


def _risk_text(curve: RiskCurve) -> str:
    return "Share of wrong predictions by share of images that get a label: " + ", ".join(
        f"{per_cent(risk)} at {per_cent(coverage)}" for coverage, risk in risks(curve)
    )


def _robustness(robustness: Mapping[str, Any]) -> dict[str, Any]:
    """Return accuracy by severity of each corruption as table and drawing, and the images; {} where not measured."""
    rows = {plain(name): _levels(levels) for name, levels in robustness.items() if name != "about"}
    if not rows:
        return {}
    levels = sorted({level for points in rows.values() for level, _ in points})
    values = [value for points in rows.values() for _, value in points]
    about = "; ".join(f"{name} {per_cent(points[0][1])} to {per_cent(points[-1][1])}" for name, points in rows.items())
    up = Scale.over("accuracy", values, percent=True)
    drawing = line_chart(rows, Scale.over("severity", levels, integers=True), up, f"Accuracy by severity: {about}")
    return {
        "levels": levels,
        "rows": {name: dict(points) for name, points in rows.items()},
        "drawing": drawing,
        "about": robustness.get("about") or {},
    }


def _levels(levels: Mapping[str, float]) -> list[tuple[float, float]]:
    """Return (severity, accuracy) points, mildest first."""
    return sorted((float(level), float(value)) for level, value in levels.items())
