"""What a run tried: its candidates on val, and what more photographs would bring."""

from __future__ import annotations

from typing import Any

from image_classifier.evaluation.report.charts import Scale, line_chart
from image_classifier.evaluation.report.run_data import RunData
from image_classifier.evaluation.report.schemas import CandidateRow, CurveRow, checked_rows
from image_classifier.html.text import plain
from image_classifier.text import listed


def tried(run: RunData) -> dict[str, Any]:
    """Return the candidates, the learning curve as a drawing, and its sentences; {} where nothing was compared."""
    facts = run.info.provenance if run.info else {}
    candidates = checked_rows(facts.get("candidates"), CandidateRow)
    curves = checked_rows([facts.get("learning_curve")], CurveRow)
    if not candidates:
        return {}
    rows = [{**row, "name": plain(row["name"]), "about": plain(row["about"])} for row in candidates]
    return {"candidates": rows, **(_curve(curves[0]) if curves else {})}


def _curve(curve: dict[str, Any]) -> dict[str, Any]:
    points = [(count, accuracy) for count, accuracy in curve["points"]]
    needy = listed([f"“{plain(name)}”" for name in curve["needy"]])
    expected = f"Twice the images: {100 * curve['gain']:+.1f} ± {100 * curve['error']:.1f} points of accuracy expected"
    text = f"{expected} of the logistic regression."
    more = f"New photographs help most in {needy}." if needy else "No class stands out as in need of photographs."
    counts, values = zip(*points, strict=True)
    drawing = line_chart(
        {"val": points},
        Scale.over("training images", [0, *counts], integers=True),
        Scale.over("accuracy", values, percent=True),
        f"Accuracy of the logistic regression from {values[0]:.3f} with {counts[0]:g} training images "
        f"to {values[-1]:.3f} with {counts[-1]:g}",
    )
    return {"drawing": drawing, "sentences": [text, more]}
