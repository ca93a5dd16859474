"""Reliability and risk-coverage pictures are legible, from one answer to many, and with every answer in one bin."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from image_classifier.evaluation.reliability.abstention import Decision, DecisionSettings, Evidence
from image_classifier.evaluation.reliability_results import write_trust
from image_classifier.predictions import PredictionTable, softmax
from tests.evaluation.test_plots import assert_legible, drawn  # noqa: F401  # a fixture


def table(num_images: int, spread: float) -> PredictionTable:
    generator = np.random.default_rng(0)
    logits = generator.normal(scale=spread, size=(num_images, 5)).astype(np.float32)
    truth = (softmax(logits).cumsum(axis=1) < generator.random((num_images, 1))).sum(axis=1).clip(max=4)
    return PredictionTable(
        ("",) * num_images, truth, logits, tuple("abcde"), 0.8, generator.normal(size=num_images).astype(np.float32)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("num_images", "spread"), [(1, 1.0), (3, 50.0), (200, 2.0), (3000, 0.0), (2000, 100.0)])
@pytest.mark.parametrize("risk", [None, 0.2])
def test_pictures_are_legible_and_the_numbers_are_beside_them(
    tmp_path: Path,
    drawn: list[Figure],  # noqa: F811
    num_images: int,
    spread: float,
    risk: float | None,
) -> None:
    part = table(num_images, spread)
    decision = Decision.chosen(Evidence.of(part), DecisionSettings(risk=risk))
    trust = write_trust(part, decision, tmp_path, "a model, test")
    for picture in drawn:
        assert_legible(picture)
    for name in ("reliability.png", "risk_coverage.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300
    content = json.loads((tmp_path / "calibration.json").read_text())
    assert content["ece_after"] == trust.calibration.ece_after and sum(content["bins_after"]["counts"]) == num_images
    assert content["risk_coverage"]["aurc"] == trust.curve.area and content["decision"]["measured"]["set_coverage"] >= 0
    assert all(line.startswith("test ") for line in trust.lines("test"))


def test_a_model_without_a_decision_is_judged_too(tmp_path: Path) -> None:
    trust = write_trust(table(50, 2.0), None, tmp_path, "old")
    assert trust.score is None and len(list(trust.lines("val"))) == 1
    assert "decision" not in json.loads((tmp_path / "calibration.json").read_text())
