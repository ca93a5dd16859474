"""Label or abstain: the same in every backend, for another risk too, and a bundle of an older version still answers."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from image_classifier.bundle import read_bundle
from image_classifier.evaluation.reliability.abstention import Decision
from image_classifier.evaluation.reliability.ood import DETECTOR
from image_classifier.evaluation.reliability.selective_prediction import lowest_risk
from image_classifier.predictions import PredictionTable
from tests.conftest import Command


@pytest.fixture(autouse=True)
def in_the_trained_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


def answers(command: Command, *line: str) -> list[dict[str, Any]]:
    answer = command("infer", "--format", "json", *line)
    assert answer.code == 0, answer.err
    found: list[dict[str, Any]] = json.loads(answer.out)
    return found


def least_risk() -> float:
    """The lowest risk that the val part of the bundle can promise."""
    return lowest_risk(Decision.from_dict(read_bundle(Path("models/digits")).info.decision).evidence.levels, 0.95)


def decisions(rows: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    return [(row["predicted_class"], row["decision"], row["reason"].partition(":")[0]) for row in rows]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    for seed in range(20):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            folder / f"{seed}.png"
        )
    return folder


def test_the_bundle_says_its_limits_and_noise_is_refused_where_test_images_are_not(
    command: Command, noise: Path
) -> None:
    bundle = read_bundle(Path("models/digits"))
    decision = Decision.from_dict(bundle.info.decision)
    assert (
        DETECTOR in bundle.info.files
        and decision.ood_limit is not None
        and bundle.info.threshold == decision.threshold == 0
    )
    strange, own = (
        answers(command, "checkpoint_name=digits", f"images={noise}"),
        answers(command, "checkpoint_name=digits", "images=data/digits/test"),
    )
    refused = [
        np.mean([row["reason"].startswith("unlike the training images") for row in rows]) for rows in (strange, own)
    ]
    assert refused[0] == 1.0 and refused[1] < 0.1
    assert all(set(row["prediction_set"]) <= set("0123456789") for row in own)


@pytest.mark.slow
def test_backends_agree_and_files_alone_know_all_but_what_is_unlike(command: Command, noise: Path) -> None:
    line = ("decision.risk=0.3", "decision.coverage=0.8", f"images=[data/digits/test,{noise}]")
    onnx, torch = (
        answers(command, "checkpoint_name=digits", f"backend={backend}", *line) for backend in ("onnx", "checkpoint")
    )
    assert decisions(onnx) == decisions(torch)
    assert {"label", "abstain"} == {row["decision"] for row in onnx}
    for file in ("model.onnx", "model.ckpt"):
        alone = answers(command, f"checkpoint_name=models/digits/{file}", *line)
        assert [row["prediction_set"] for row in alone[:50]] == [row["prediction_set"] for row in onnx[:50]]
        assert not any(row["reason"].startswith("unlike") for row in alone)


def test_a_lower_risk_asked_for_when_answering_refuses_more(command: Command) -> None:
    counts, least = [], least_risk()
    for risk in (1, round((1 + least) / 2, 3), least):
        rows = answers(
            command, "checkpoint_name=digits", "images=data/digits/test", f"decision.risk={risk}", "decision.ood_rate=0"
        )
        counts.append(sum(row["decision"] == "abstain" for row in rows))
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] > 0


def test_every_format_says_the_decision(command: Command, noise: Path) -> None:
    line = ("infer", "checkpoint_name=digits", f"images={noise}")
    rows = list(csv.DictReader(io.StringIO(command(*line, "format=csv").out)))
    assert all(row["decision"] == "abstain" and row["reason"].startswith("unlike") for row in rows)
    assert all(isinstance(json.loads(row["prediction_set"]), list) for row in rows)
    assert command(*line, "format=table").out.count("; abstains: unlike the training images") == 20


def test_a_bundle_of_an_older_version_still_answers(command: Command, tmp_path: Path) -> None:
    import onnx

    shutil.copytree("models/digits", tmp_path / "old")
    (tmp_path / "old" / DETECTOR).unlink()
    model = onnx.load(tmp_path / "old/model.onnx")
    del model.graph.output[1]
    onnx.save(model, tmp_path / "old/model.onnx")
    content = json.loads((tmp_path / "old/bundle.json").read_text())
    content["files"] = {"model.onnx": hashlib.sha256((tmp_path / "old/model.onnx").read_bytes()).hexdigest()}
    del content["decision"]
    (tmp_path / "old/bundle.json").write_text(json.dumps(content))
    old, new = (
        answers(command, f"checkpoint_name={name}", "images=data/digits/test/1")
        for name in (tmp_path / "old", "digits")
    )
    assert [row["confidence"] for row in old] == [row["confidence"] for row in new]
    assert all((row["decision"], row["reason"], row["prediction_set"]) == ("label", "", None) for row in old)
    refused = command("infer", f"checkpoint_name={tmp_path / 'old'}", "images=data/digits/test/1", "decision.risk=0.1")
    assert refused.code == 2 and "has no validation results" in refused.err


@pytest.mark.slow
def test_test_measures_what_is_asked_for(command: Command, tmp_path: Path) -> None:
    answer = command(
        "test", "--checkpoint_name", "digits", "--output_dir", str(tmp_path), f"decision.risk={least_risk()}"
    )
    assert answer.code == 0, answer.err
    found = json.loads((tmp_path / "calibration.json").read_text())["decision"]
    assert found["risk"] == least_risk() and found["measured"]["answered"] < 1 and found["threshold"] > 0
    assert f"at most {least_risk():g} promised with 95% confidence" in answer.out and "prediction sets: " in answer.out
    again, before = PredictionTable.read(tmp_path), PredictionTable.read(Path("plots/digits/test"))
    assert again.ood_scores is not None and before.ood_scores is not None
    np.testing.assert_allclose(again.ood_scores, before.ood_scores, rtol=1e-2, atol=1e-2)


def test_a_damaged_detector_is_noticed(command: Command, tmp_path: Path) -> None:
    shutil.copytree("models/digits", tmp_path / "bundle")
    (tmp_path / "bundle" / DETECTOR).write_bytes(b"other")
    answer = command("infer", "--checkpoint_name", str(tmp_path / "bundle"), "--images", "data/digits/test/0")
    assert answer.code == 2 and "ood.npz" in answer.err and "damaged" in answer.err


def test_a_share_that_cannot_be_is_one_line(command: Command) -> None:
    answer = command("infer", "--checkpoint_name", "digits", "decision.risk=5", "--images", "data/digits/test/0")
    assert answer.code == 2 and "invalid decision.risk 5" in answer.err


def test_a_risk_that_val_cannot_promise_is_said_and_holds_no_label_back(command: Command) -> None:
    line = (
        "infer",
        "--checkpoint_name",
        "digits",
        "decision.risk=0.001",
        "decision.ood_rate=0",
        "--images",
        "data/digits/test/0",
    )
    answer = command(*line, "--format", "json")
    assert answer.code == 0 and "cannot promise a risk of 0.001" in answer.err
    assert all(row["decision"] == "label" for row in json.loads(answer.out))
