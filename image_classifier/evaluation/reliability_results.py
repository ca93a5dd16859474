"""Results on the reliability of one split: calibration.json, figures, and lines for a terminal."""

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
    """The effect of the limits on one split, as shares of its images unless stated otherwise.

    Args:
        answered: Images that get a label.
        unknown: Images refused as unlike the training images.
        unsure: Images refused for their confidence.
        risk: Share of wrong labels among those given; None if there are none.
        set_coverage: Images whose prediction set holds the true class.
        set_spread: By chance, `set_coverage` is within this distance of the stated coverage in 95 % of cases.
        set_size: Mean number of classes in a prediction set.
        empty_sets: Images with an empty prediction set.
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
    """Measure the effect of the limits on one split."""
    predicted, confidence = table.answers()
    wrong = predicted != table.targets
    known = np.ones(len(wrong), bool)
    if decision.ood_limit is not None and table.ood_scores is not None:
        known = table.ood_scores <= decision.ood_limit
    given = known & (confidence >= decision.threshold)
    sizes = np.concatenate([(block >= decision.set_level).sum(axis=1) for _, block in table.blocks()])
    held = table.true_probabilities() >= decision.set_level
    coverage = decision.settings.coverage or 0
    # Binomial noise of both splits: val chose the limit, this one measures it.
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
    """The calibration of one split, its risk by coverage, and the effect of the limits (None without limits)."""

    calibration: CalibrationScore
    curve: RiskCurve
    decision: Decision | None
    score: DecisionScore | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        curve = {
            "coverage": self.curve.coverage.tolist(),
            "risk": self.curve.risk.tolist(),
            "aurc": self.curve.area,
            "best_aurc": self.curve.best_area,
        }
        content = {**self.calibration.as_dict(), "risk_coverage": curve}
        if self.decision and self.score:
            stated = {key: value for key, value in self.decision.as_dict().items() if key != "evidence"}
            measured = asdict(self.score)
            content["decision"] = {**stated, "threshold": self.decision.threshold, "measured": measured}
        return content

    def scalars(self) -> dict[str, float]:
        """Return the single numbers by name."""
        values = {"ece_uncalibrated": self.calibration.ece_before, "aurc": self.curve.area}
        if self.score:
            values |= {
                "answered": self.score.answered,
                "refused_as_unlike": self.score.unknown,
                "set_coverage": self.score.set_coverage,
                "set_size": self.score.set_size,
            }
            if self.score.risk is not None:
                values["risk"] = self.score.risk
        return values

    def lines(self, split: str) -> Iterator[str]:
        """Yield the results in words, for a terminal."""
        yield self.calibration.line(split)
        if not self.decision or not self.score:
            return
        settings = self.decision.settings
        score = self.score
        if self.decision.note:
            yield f"{split} decision: {self.decision.note}"
        elif settings.risk is not None:
            wrong = "none" if score.risk is None else f"{score.risk:.4f}"
            labelled = f"{score.answered:.1%} of images get a label"
            yield f"{split} decision: {labelled}, {score.unsure:.1%} are not sure enough"
            promise = f"at most {settings.risk:g} promised with {settings.risk_confidence or 0:.0%} confidence"
            yield f"{split} decision: share of wrong labels {wrong}, {promise}"
        if self.decision.ood_limit is not None:
            target = f"target {settings.ood_rate or 0:.1%}"
            yield f"{split} decision: {score.unknown:.1%} refused as unlike the training images ({target})"
        target = f"target {settings.coverage or 0:.0%}, ±{score.set_spread:.1%} by chance"
        sizes = f"{score.set_size:.2f} classes on average, {score.empty_sets:.1%} empty"
        yield f"{split} prediction sets: {score.set_coverage:.1%} hold the true class ({target}); {sizes}"


def write_trust(
    table: PredictionTable, decision: Decision | None, directory: Path, title: str, figures: bool = True
) -> Trust:
    """Measure calibration and limits on one split; write calibration.json and, with `figures`, two figures.

    The figures are reliability.png and risk_coverage.png.
    """
    score = decision_score(table, decision) if decision else None
    trust = Trust(calibration_score(table), risk_curve(table), decision, score)
    before = Reliability.of(replace(table, temperature=1.0))
    after = Reliability.of(table)
    content = {**trust.as_dict(), "bins_before": before.as_dict(), "bins_after": after.as_dict()}
    write_text(directory / "calibration.json", json.dumps(content, indent=2) + "\n")
    if not figures:
        return trust
    plot_reliability(before, after, table.temperature, directory / "reliability.png", f"Reliability: {title}")
    point = (score.answered, score.risk) if score and score.risk is not None else None
    promised = decision.settings.risk if decision and not decision.note else None
    plot_risk_coverage(trust.curve, promised, point, directory / "risk_coverage.png", f"Risk and coverage: {title}")
    return trust
