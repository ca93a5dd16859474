"""The drift check of a server, and the verb that reads what it kept."""

from __future__ import annotations

import json
import shutil
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from image_classifier.bundle import read_bundle
from image_classifier.errors import ConfigError
from image_classifier.serving.drift_log import columns
from image_classifier.serving.drift_window import DriftSettings, DriftWindow
from image_classifier.serving.model_sources import RegisteredModel
from image_classifier.serving.worker.spec import version_of
from tests.conftest import Command

ANSWER = {"path": "secret.png", "predicted_class": "7", "confidence": 0.75, "decision": "label"}


def metadata(digits_bundle: Path) -> dict[str, object]:
    return {
        "name": "digits",
        "version": version_of(digits_bundle),
        "reference": read_bundle(digits_bundle).info.decision,
    }


def test_what_is_kept_is_figures_only_and_the_verb_reads_it(
    digits_bundle: Path, tmp_path: Path, command: Command
) -> None:
    window, known = DriftWindow(DriftSettings(enabled=True, log_dir=str(tmp_path))), metadata(digits_bundle)
    for score in np.linspace(50, 60, 80):
        window.record(known, ANSWER, float(score))
    window.record(known, {"path": "secret.png", "error": "not an image"}, None)
    window.close()
    shown = {shift.figure: shift for shift in window.shifts("digits")}
    assert shown["ood_score"].distance == 1.0 and shown["ood_score"].images == 80
    log = tmp_path / "digits.jsonl"
    assert "secret" not in log.read_text() and len(log.read_text().splitlines()) == 80
    with log.open("a") as file:
        file.write('{"time": 1, "version": "another", "confidence": 1, "ood_score": 1}\n{"cut off')
    line = ("drift", str(digits_bundle), "--log", str(log))
    answer = command(*line)
    assert answer.code == 0 and "DRIFTED" in answer.out and "the last 80 answers" in answer.out, answer.err
    assert command(*line, "--fail").code == 1
    found = json.loads(command(*line, "--format", "json", "--last", "49").out)
    assert found["images"] == 49 and {row["figure"]: row["drifted"] for row in found["figures"]} == {
        "confidence": False,
        "ood_score": False,
    }


def test_a_log_is_found_by_the_name_under_which_the_model_was_served(
    digits_bundle: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    window = DriftWindow(DriftSettings(enabled=True))
    for _ in range(60):
        window.record({**metadata(digits_bundle), "name": "cats"}, ANSWER, 0.5)
    line = ("drift", str(digits_bundle))
    assert "the last 60 answers" in command(*line, "--name", "cats").out
    assert "the last 60 answers" in command(*line, "--name", "cats", "--log", "runs/serve").out
    lost = command(*line)
    assert (
        lost.code == 2
        and "digits.jsonl' holds no answer" in lost.err
        and "logs of cats\n" in lost.err
        and lost.err.count("\n") == 1
    ), lost.err
    for number in range(30):
        (tmp_path / f"runs/serve/{number:02d}.jsonl.1").write_text("")
    assert (
        "--name NAME" in (many := command(*line, "--name", "dogs").err)
        and "09 and 21 more" in many
        and many.count("\n") == 1
    )


def test_an_alias_is_compared_too(
    digits_bundle: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []
    registered = tmp_path / "registered"  # `promote` leaves out what only training needs
    registered.mkdir()
    shutil.copyfile(digits_bundle / "bundle.json", registered / "bundle.json")
    monkeypatch.setattr(RegisteredModel, "find", lambda place: asked.append(place) or registered)
    window = DriftWindow(DriftSettings(enabled=True))
    for _ in range(60):
        window.record({**metadata(digits_bundle), "name": "flowers"}, ANSWER, 0.5)
    answer = command("drift", "models:/flowers@champion", "--tracking_uri", "sqlite:///other.db")
    assert answer.code == 0 and "the last 60 answers" in answer.out, answer.err
    (place,) = asked
    assert (place.name, place.alias, place.tracking_uri) == ("flowers", "champion", "sqlite:///other.db")


def test_off_means_nothing_is_kept(digits_bundle: Path, tmp_path: Path) -> None:
    window = DriftWindow(DriftSettings(log_dir=str(tmp_path)))
    window.record(metadata(digits_bundle), ANSWER, 1.0)
    assert window.shifts("digits") == [] and list(tmp_path.iterdir()) == []


def test_another_version_begins_anew_and_the_window_is_bounded(digits_bundle: Path) -> None:
    window, known = DriftWindow(DriftSettings(enabled=True, window=60, log_dir=None)), metadata(digits_bundle)
    for _ in range(100):
        window.record(known, ANSWER, 0.0)
    assert {shift.images for shift in window.shifts("digits")} == {60}
    window.record({**known, "version": "next"}, ANSWER, 0.0)
    assert {shift.images for shift in window.shifts("digits")} == {1}


def test_a_long_log_is_put_aside_once(digits_bundle: Path, tmp_path: Path, command: Command) -> None:
    window, known = (
        DriftWindow(DriftSettings(enabled=True, log_dir=str(tmp_path), max_log_bytes=2000)),
        metadata(digits_bundle),
    )
    for _ in range(100):
        window.record(known, ANSWER, 0.5)
    window.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.jsonl", "digits.jsonl.1"]
    assert all(path.stat().st_size < 2500 for path in tmp_path.iterdir())
    images = sum(len(path.read_text().splitlines()) for path in tmp_path.iterdir())
    assert (
        f"the last {images} answers"
        in command("drift", str(digits_bundle), "--log", str(tmp_path / "digits.jsonl")).out
    )


def test_a_log_that_cannot_be_written_costs_no_request(
    digits_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    window = DriftWindow(DriftSettings(enabled=True, log_dir=str(tmp_path / "file")))
    for _ in range(3):
        window.record(metadata(digits_bundle), ANSWER, 0.5)
    window.close()
    assert caplog.text.count("cannot write a line") == 1


def test_scores_are_compared_only_where_all_have_one() -> None:
    assert columns(deque([(0.5, 1.0), (0.6, None)])) == {"confidence": [0.5, 0.6]}
    assert columns(deque([(0.5, 1.0)])) == {"confidence": [0.5], "ood_score": [1.0]}


def test_what_cannot_be_is_one_line(
    digits_bundle: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for line, words in (
        (("drift", str(digits_bundle)), "drift.enabled=true"),
        (("drift", str(digits_bundle), "--format", "xml"), "use table or json"),
        (("drift", str(digits_bundle), "--last", "0"), "expected at least 1"),
        (("drift", "nothing"), "nothing"),
        (("drift", str(digits_bundle / "model.onnx")), "is not a bundle"),
        (("drift", "models:/digits"), "write models:/NAME@ALIAS"),
        (("drift", str(digits_bundle), "--name", "x" * 300), "holds no answer"),
        (("drift", str(digits_bundle), "--log", "x" * 300), "cannot be read"),
    ):
        answer = command(*line)
        assert answer.code == 2 and words in answer.err and answer.err.count("\n") == 1, answer.err
    with pytest.raises(ConfigError):
        DriftSettings(window=0)
