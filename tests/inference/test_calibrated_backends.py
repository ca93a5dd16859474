"""One temperature, fitted on val, in the bundle and in each of its files: whoever answers gives the same confidence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from image_classifier.bundle import read_bundle
from image_classifier.evaluation.reliability.calibration import fit_temperature
from image_classifier.predictions import PredictionTable
from tests.conftest import Command


@pytest.fixture(autouse=True)
def in_the_trained_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


def test_the_bundle_holds_the_temperature_fitted_on_val() -> None:
    val = PredictionTable.read(Path("plots/digits/val"))
    assert val.temperature != 1.0
    assert fit_temperature(replace(val, temperature=1.0)).temperature == pytest.approx(val.temperature)
    assert read_bundle(Path("models/digits")).info.temperature == val.temperature
    assert f"{val.temperature:.6g}" in Path("models/digits/MODEL_CARD.md").read_text()


def test_every_file_gives_the_confidence_of_the_predictions(command: Command) -> None:
    table = PredictionTable.read(Path("plots/digits/test"))
    told = dict(zip(table.paths, table.probabilities.max(axis=1).tolist(), strict=True))
    for line in (
        ("digits",),
        ("digits", "--backend", "checkpoint"),
        ("models/digits/model.ckpt",),
        ("models/digits/model.onnx",),
    ):
        answer = command("infer", "--checkpoint_name", *line, "--images", "data/digits/test/4", "--format", "json")
        assert answer.code == 0, answer.err
        for row in json.loads(answer.out):
            assert row["confidence"] == pytest.approx(told[str(Path(row["path"]).relative_to("data/digits"))], abs=1e-4)


@pytest.mark.slow
def test_test_judges_with_the_temperature_of_the_bundle(command: Command, tmp_path: Path) -> None:
    answer = command("test", "--checkpoint_name", "digits", "--output_dir", str(tmp_path))
    assert answer.code == 0, answer.err
    assert "test calibration: ece " in answer.out and "test calibration: ece " in Path("stdout.txt").read_text()
    again, before = (
        json.loads((folder / "calibration.json").read_text()) for folder in (tmp_path, Path("plots/digits/test"))
    )
    assert again["temperature"] == before["temperature"]
    assert again["ece_after"] == pytest.approx(before["ece_after"], abs=1e-4)
    assert again["ece_before"] > again["ece_after"]
    assert json.loads((tmp_path / "metrics.json").read_text())["ece"] == pytest.approx(again["ece_after"])
    assert sum(again["bins_after"]["counts"]) == again["num_images"] == 355
