"""What a judged part says of how far its answers can be trusted: calibration.json and figures in its folder, lines for a person."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.atomic_io import write_text
from image_classifier.evaluation.plots.reliability import plot_reliability, plot_risk_coverage
from image_classifier.evaluation.reliability.abstention import Decision
from image_classifier.evaluation.reliability.calibration import CalibrationScore, Reliability, calibration_score
from image_classifier.evaluation.reliability.selective_prediction import RiskCurve, risk_curve
from image_classifier.predictions import PredictionTable


@dataclass(frozen=True)
class DecisionScore:
    """What the limits do on one part, all as shares of its images except where said.

    `unknown` are refused as unlike the training images, `unsure` for their confidence; `risk` is the share of wrong labels among those given
    (None where none is); `set_coverage` the share whose prediction set holds the true class, in 95 of 100 cases within `set_spread` of what is
    stated; `set_size` the mean number of classes in a set, `empty_sets` those with none.
    """

    answered: float
    unknown: float
    unsure: float
    risk: float | None
    set_coverage: float
    set_spread: float
    set_size: float
    empty_sets: float


def decision_score(table: PredictionTable, decision: Decision) -> DecisionScore:
    """Measure a decision on one part."""
    predicted, confidence = table.answers()
    wrong = predicted != table.targets
    known = np.ones(len(wrong), bool)
    if decision.ood_limit is not None and table.ood_scores is not None:
        known = table.ood_scores <= decision.ood_limit
    given = known & (confidence >= decision.threshold)
    sizes = np.concatenate([(block >= decision.set_level).sum(axis=1) for _, block in table.blocks()])
    held = table.true_probabilities() >= decision.set_level
    coverage = decision.settings.coverage or 0
    spread = 1.96 * math.sqrt(coverage * (1 - coverage) * (1 / (decision.evidence.num_images + 2) + 1 / len(wrong)))
    return DecisionScore(
        answered=float(given.mean()),
        unknown=float(1 - known.mean()),
        unsure=float((known & ~given).mean()),
        risk=float(wrong[given].mean()) if given.any() else None,
        set_coverage=float(held.mean()),
        set_spread=spread,
        set_size=float(sizes.mean()),
        empty_sets=float((sizes == 0).mean()),
    )


@dataclass(frozen=True)
class Trust:
    """How well calibrated one part is, how well confidence tells right from wrong, and what the limits do (None for a model without)."""

    calibration: CalibrationScore
    curve: RiskCurve
    decision: Decision | None
    score: DecisionScore | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        curve = {
            "coverage": self.curve.coverage.tolist(),
            "risk": self.curve.risk.tolist(),
            "aurc": self.curve.area,
            "best_aurc": self.curve.best_area,
        }
        stated = (
            {}
            if self.decision is None
            else {key: value for key, value in self.decision.as_dict().items() if key != "evidence"}
        )
        found = (
            {"decision": {**stated, "threshold": self.decision.threshold, "measured": asdict(self.score)}}
            if self.decision and self.score
            else {}
        )
        return {**self.calibration.as_dict(), "risk_coverage": curve, **found}

    def scalars(self) -> dict[str, float]:
        """The single numbers under their stable names."""
        found = {"ece_uncalibrated": self.calibration.ece_before, "aurc": self.curve.area}
        if self.score:
            names = {
                "answered": self.score.answered,
                "refused_as_unlike": self.score.unknown,
                "set_coverage": self.score.set_coverage,
            }
            found |= {**names, "set_size": self.score.set_size} | (
                {} if self.score.risk is None else {"risk": self.score.risk}
            )
        return found

    def lines(self, split: str) -> Iterator[str]:
        """The figures in words, for a terminal."""
        yield self.calibration.line(split)
        if not self.decision or not self.score:
            return
        asked, score = self.decision.settings, self.score
        if self.decision.note:
            yield f"{split} decision: {self.decision.note}"
        elif asked.risk is not None:
            wrong = "none" if score.risk is None else f"{score.risk:.4f}"
            yield f"{split} decision: {score.answered:.1%} of images get a label, {score.unsure:.1%} are too unsure"
            yield f"{split} decision: share of wrong labels {wrong}, at most {asked.risk:g} promised with {asked.risk_confidence or 0:.0%} confidence"
        if self.decision.ood_limit is not None:
            yield f"{split} decision: {score.unknown:.1%} of images refused as unlike the training images ({asked.ood_rate or 0:.1%} meant)"
        yield (
            f"{split} prediction sets: {score.set_coverage:.1%} hold the true class, {asked.coverage or 0:.0%} stated "
            f"(±{score.set_spread:.1%} by chance); {score.set_size:.2f} classes on average, {score.empty_sets:.1%} of the sets empty"
        )


def write_trust(
    table: PredictionTable, decision: Decision | None, directory: Path, title: str, figures: bool = True
) -> Trust:
    """Judge calibration and decision on one part; writes calibration.json and, with `figures`, reliability.png and risk_coverage.png."""
    score = decision_score(table, decision) if decision else None
    trust = Trust(calibration_score(table), risk_curve(table), decision, score)
    before, after = Reliability.of(replace(table, temperature=1.0)), Reliability.of(table)
    content = {**trust.as_dict(), "bins_before": before.as_dict(), "bins_after": after.as_dict()}
    write_text(directory / "calibration.json", json.dumps(content, indent=2) + "\n")
    if not figures:
        return trust
    plot_reliability(before, after, table.temperature, directory / "reliability.png", title)
    point = (score.answered, score.risk) if score and score.risk is not None else None
    asked = decision.settings.risk if decision and not decision.note else None
    plot_risk_coverage(trust.curve, asked, point, directory / "risk_coverage.png", title)
    return trust
