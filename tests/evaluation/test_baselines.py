"""What a model must beat, and that it is said where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, f1_score, log_loss

from image_classifier.evaluation.baselines import (
    LOGISTIC,
    Baseline,
    as_metrics,
    baseline_scores,
    from_dict,
    known_baseline,
    lines,
    most_frequent,
    warn_if_not_better,
    write_baselines,
)


def scored(accuracy: float, name: str = LOGISTIC, split: str = "val") -> Baseline:
    return Baseline(name, "a guess", {split: {"accuracy": accuracy, "f1_macro": accuracy}})


@given(
    train=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    judged=st.lists(st.integers(0, 3), min_size=1, max_size=30),
)
def test_the_most_frequent_class_is_scikit_learns_prior(train: list[int], judged: list[int]) -> None:
    train = [*train, 0, 1, 2, 3]  # every class has training images
    found = most_frequent(np.array(train), "abcd", {"test": np.array(judged)}).scores["test"]
    prior = DummyClassifier(strategy="prior").fit(np.zeros((len(train), 1)), train)
    answers = prior.predict(np.zeros((len(judged), 1)))
    assert found["accuracy"] == pytest.approx(accuracy_score(judged, answers))
    assert found["f1_macro"] == pytest.approx(f1_score(judged, answers, average="macro", zero_division=0))
    expected = log_loss(judged, prior.predict_proba(np.zeros((len(judged), 1))), labels=[0, 1, 2, 3])
    assert found["log_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_part_without_images_has_no_score() -> None:
    baseline = most_frequent(
        np.array([0, 1, 1]), ("cat", "dog"), {"val": np.array([1]), "test": np.array([], dtype=np.int64)}
    )
    assert set(baseline.scores) == {"val"} and "'dog'" in baseline.about
    assert list(lines([baseline], "test")) == [] and baseline_scores([baseline], "test") == {}


def test_a_table_ends_with_the_model() -> None:
    table = list(lines([scored(0.5)], "val", {"accuracy": 0.75, "f1_macro": 0.7}))
    assert [row.split()[0] for row in table] == ["baseline", "logistic", "this"]
    assert table[1].split()[1:3] == ["0.5000", "0.5000"] and table[2].split()[2:] == ["0.7500", "0.7000"]
    assert as_metrics([scored(0.5)]) == {"baseline/logistic/val/accuracy": 0.5, "baseline/logistic/val/f1_macro": 0.5}


@pytest.mark.parametrize(
    ("own", "words"), [(0.6, []), (0.5, ["accuracy", "f1_macro"]), (0.4, ["accuracy", "f1_macro"])]
)
def test_a_model_that_does_not_beat_a_baseline_hears_of_it(
    own: float, words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_not_better([scored(0.5), scored(0.9, split="test")], "val", {"accuracy": own, "f1_macro": own})
    assert [record.getMessage().partition("logistic: ")[2].split()[0] for record in caplog.records] == words


def test_the_best_scores_of_this_manifest_are_found(tmp_path: Path) -> None:
    for name, sha256, accuracy in (("a", "this", 0.5), ("b", "this", 0.7), ("c", "other", 0.9)):
        write_baselines([scored(accuracy), scored(1.0, "most_frequent")], sha256, tmp_path / name)
    assert known_baseline(tmp_path, "this", LOGISTIC) == scored(0.7)
    assert known_baseline(tmp_path, "unknown", LOGISTIC) is None
    assert known_baseline(tmp_path / "nowhere", "this", LOGISTIC) is None


@pytest.mark.parametrize(
    "content", ["", "[]", '{"manifest_sha256": "this"}', '{"manifest_sha256": "this", "baselines": {"logistic": 3}}']
)
def test_a_damaged_file_costs_no_training(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "baselines.json").write_text(content)
    assert known_baseline(tmp_path, "this", LOGISTIC) is None
    assert "which cannot be read" in caplog.text


def test_baselines_survive_json() -> None:
    kept = json.loads(json.dumps({LOGISTIC: scored(0.5).as_dict()}))
    assert from_dict(kept) == (scored(0.5),)


@pytest.mark.parametrize(
    "content",
    [
        3,
        {"x": 3},
        {"x": {"about": "a"}},
        {"x": {"about": "a", "scores": {"test": 3}}},
        {"x": {"about": "a", "scores": {"test": {"accuracy": 0.5}}}},
    ],
    ids=str,
)
def test_what_describes_no_baseline_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="invalid baselines"):
        from_dict(content)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="could not convert"):
        from_dict({"x": {"about": "a", "scores": {"test": {"accuracy": "much", "f1_macro": 0.5}}}})
