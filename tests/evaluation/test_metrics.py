"""Metrics equal scikit-learn's on random and on degenerate inputs."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from image_classifier.errors import DataError
from image_classifier.evaluation.metrics import Metrics, compute_metrics
from image_classifier.evaluation.sums import SCALARS
from image_classifier.records import PredictionTable


def make_table(targets: list[int], logits: np.ndarray, num_classes: int) -> PredictionTable:
    names = tuple(f"class_{i:03d}" for i in range(num_classes))
    return PredictionTable(tuple(f"{i}.png" for i in range(len(targets))), np.array(targets, dtype=np.int64), logits, names)


def reference_ece(table: PredictionTable) -> float:
    """Guo et al. (2017), eq. 3, as a plain loop."""
    confidence, total = table.probabilities.max(axis=1), 0.0
    correct = table.probabilities.argmax(axis=1) == table.targets
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return float(total)


def assert_as_scikit_learn(table: PredictionTable, metrics: Metrics) -> None:
    truth, labels = table.targets, np.arange(len(table.classes))
    predicted = table.probabilities.argmax(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of classes that are absent; the cases here are meant to have some
        balanced = sk.balanced_accuracy_score(truth, predicted)
        macro = sk.precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)[:3]
        each = sk.precision_recall_fscore_support(truth, predicted, labels=labels, zero_division=0)
        confusion = sk.confusion_matrix(truth, predicted, labels=labels)
        log_loss = sk.log_loss(truth, table.probabilities, labels=labels)
    assert metrics.accuracy == pytest.approx(sk.accuracy_score(truth, predicted))
    assert metrics.balanced_accuracy == pytest.approx(balanced)
    assert (metrics.precision_macro, metrics.recall_macro, metrics.f1_macro) == pytest.approx(macro)
    assert [[s.precision, s.recall, s.f1, s.support] for s in metrics.per_class] == [pytest.approx(row) for row in np.array(each).T.tolist()]
    assert metrics.confusion.dtype == np.int64
    np.testing.assert_array_equal(metrics.confusion, confusion)
    assert metrics.log_loss == pytest.approx(log_loss, rel=1e-6, abs=1e-9)
    assert metrics.ece == pytest.approx(reference_ece(table), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    num_classes=st.integers(2, 12),
    num_images=st.integers(1, 80),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    ties=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_scikit_learn(num_classes: int, num_images: int, scale: float, ties: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    present = rng.integers(0, num_classes, size=rng.integers(1, num_classes + 1))  # classes are often absent
    logits = (rng.normal(size=(num_images, num_classes)) * scale).astype(np.float32)
    table = make_table(rng.choice(present, num_images).tolist(), np.round(logits) if ties else logits, num_classes)
    assert_as_scikit_learn(table, compute_metrics(table))


@pytest.mark.parametrize(
    ("targets", "predicted"),
    [([1], [1]), ([1], [0]), ([0, 1, 2], [1, 2, 0]), ([0, 0, 0], [0, 0, 0]), ([0, 1, 2], [3, 3, 3]), ([2, 2], [0, 1])],
    ids=["one right", "one wrong", "all wrong", "one class", "absent class predicted", "truth never predicted"],
)
def test_degenerate_parts(targets: list[int], predicted: list[int]) -> None:
    table = make_table(targets, (np.eye(4, dtype=np.float32) * 3)[predicted], 4)
    metrics = compute_metrics(table)
    assert_as_scikit_learn(table, metrics)
    assert metrics.absent == tuple(name for i, name in enumerate(table.classes) if i not in targets)
    assert metrics.num_images == len(targets)


def test_all_logits_equal_predicts_the_first_class() -> None:
    table = make_table([0, 1, 2, 0], np.zeros((4, 3), dtype=np.float32), 3)
    metrics = compute_metrics(table)
    assert_as_scikit_learn(table, metrics)
    assert metrics.accuracy == 0.5
    assert metrics.log_loss == pytest.approx(np.log(3))


def test_log_loss_of_a_probability_that_underflows_is_not_clipped() -> None:
    table = make_table([1], np.array([[2000.0, 0.0]], dtype=np.float32), 2)
    assert compute_metrics(table).log_loss == pytest.approx(2000.0)


def test_no_prediction_is_refused() -> None:
    with pytest.raises(DataError, match="no prediction"):
        compute_metrics(make_table([], np.empty((0, 3), dtype=np.float32), 3))


def test_logits_that_are_not_numbers_are_refused_with_the_image() -> None:
    with pytest.raises(DataError, match=r"1 of 2 images.*'1\.png'"):
        compute_metrics(make_table([0, 1], np.array([[1.0, 0.0], [np.nan, 0.0]], dtype=np.float32), 2))


def test_as_dict_is_json_and_holds_the_scalars() -> None:
    metrics = compute_metrics(make_table([0, 1, 1], np.eye(3, dtype=np.float32)[[0, 1, 0]], 3))
    names = [name for name in SCALARS if name != "top5_accuracy"]
    assert list(metrics.scalars()) == names
    whole = json.loads(json.dumps(metrics.as_dict(), allow_nan=False))
    assert {name: whole[name] for name in names} == metrics.scalars()
    assert whole["absent"] == ["class_002"]
    assert whole["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    first = {name: whole["per_class"][0][name] for name in ("label", "precision", "recall", "f1", "support")}
    assert first == {"label": "class_000", "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1}
    assert whole["per_class"][2]["roc_auc"] is None and whole["per_class"][2]["intervals"]["recall"] is None
