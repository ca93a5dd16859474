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
from image_classifier.evaluation.metrics.compute import ClassificationMetrics, compute_metrics
from image_classifier.evaluation.metrics.sums import SCALARS
from image_classifier.predictions import PredictionTable


def make_table(targets: list[int], logits: np.ndarray, num_classes: int) -> PredictionTable:
    names = tuple(f"class_{i:03d}" for i in range(num_classes))
    return PredictionTable(
        tuple(f"{i}.png" for i in range(len(targets))), np.array(targets, dtype=np.int64), logits, names
    )


def reference_ece(table: PredictionTable) -> float:
    """Guo et al. (2017), eq. 3, as a plain loop."""
    confidence, total = table.probabilities.max(axis=1), 0.0
    correct = table.probabilities.argmax(axis=1) == table.targets
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return float(total)


def log_probabilities(table: PredictionTable) -> np.ndarray:
    """The scores that classes are ranked by, float32 [N, C]."""
    shifted = table.logits.astype(np.float64) - table.logits.max(axis=1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))).astype(np.float32)


def assert_ranked_as_scikit_learn(table: PredictionTable, metrics: ClassificationMetrics) -> None:
    scores, expected = log_probabilities(table), []
    for position, score in enumerate(metrics.per_class):
        own = table.targets == position
        if own.all() or not own.any():
            assert np.isnan(score.roc_auc) and np.isnan(score.average_precision)
            continue
        expected.append(
            (sk.roc_auc_score(own, scores[:, position]), sk.average_precision_score(own, scores[:, position]))
        )
        assert (score.roc_auc, score.average_precision) == pytest.approx(expected[-1])
    means = np.mean(expected, axis=0).tolist() if expected else [np.nan, np.nan]
    assert [metrics.roc_auc, metrics.average_precision] == pytest.approx(means, nan_ok=True)


def assert_as_scikit_learn(table: PredictionTable, metrics: ClassificationMetrics) -> None:
    truth, labels = table.targets, np.arange(len(table.classes))
    predicted = table.probabilities.argmax(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # scikit-learn warns of classes that are absent; the cases here are meant to have some
        balanced = sk.balanced_accuracy_score(truth, predicted)
        macro = sk.precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)[:3]
        each = sk.precision_recall_fscore_support(truth, predicted, labels=labels, zero_division=0)
        confusion = sk.confusion_matrix(truth, predicted, labels=labels)
        log_loss = sk.log_loss(truth, table.probabilities, labels=labels)
        weighted = sk.precision_recall_fscore_support(truth, predicted, average="weighted", zero_division=0)[:3]
        kappa = sk.cohen_kappa_score(truth, predicted)
    assert metrics.accuracy == pytest.approx(sk.accuracy_score(truth, predicted))
    assert (metrics.precision_weighted, metrics.recall_weighted, metrics.f1_weighted) == pytest.approx(weighted)
    assert metrics.kappa == pytest.approx(kappa, nan_ok=True)
    assert metrics.brier == pytest.approx(
        ((table.probabilities - np.eye(len(labels))[truth]) ** 2).sum(axis=1).mean(), abs=1e-12
    )
    assert_ranked_as_scikit_learn(table, metrics)
    assert metrics.balanced_accuracy == pytest.approx(balanced)
    assert (metrics.precision_macro, metrics.recall_macro, metrics.f1_macro) == pytest.approx(macro)
    assert [[s.precision, s.recall, s.f1, s.support] for s in metrics.per_class] == [
        pytest.approx(row) for row in np.array(each).T.tolist()
    ]
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
    assert_as_scikit_learn(table, compute_metrics(table, resamples=0))


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


@pytest.mark.parametrize("ties", [False, True])
def test_top5_is_the_share_of_true_classes_among_the_five_most_probable(ties: bool) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(300, 8)).astype(np.float32)
    table = make_table(rng.integers(0, 8, 300).tolist(), np.round(logits) if ties else logits, 8)
    ranked = np.argsort(-table.logits, axis=1, kind="stable")[:, :5]  # of equals the first
    assert compute_metrics(table, resamples=0).top5_accuracy == pytest.approx(
        (ranked == table.targets[:, None]).any(axis=1).mean()
    )
    if not ties:
        assert sk.top_k_accuracy_score(table.targets, table.logits, k=5) == pytest.approx(
            compute_metrics(table, resamples=0).top5_accuracy
        )


def test_equals_torchmetrics() -> None:
    import torch
    from torchmetrics import classification as tm

    rng, num_classes = np.random.default_rng(5), 7
    targets = rng.integers(0, num_classes, 400)
    logits = (rng.normal(size=(400, num_classes)) + 2 * np.eye(num_classes)[targets]).astype(np.float32)
    metrics = compute_metrics(make_table(targets.tolist(), logits, num_classes), resamples=0)
    others = {
        "accuracy": tm.MulticlassAccuracy(num_classes, average="micro"),
        "top5_accuracy": tm.MulticlassAccuracy(num_classes, top_k=5, average="micro"),
        "balanced_accuracy": tm.MulticlassAccuracy(num_classes, average="macro"),
        "precision_macro": tm.MulticlassPrecision(num_classes, average="macro"),
        "recall_macro": tm.MulticlassRecall(num_classes, average="macro"),
        "f1_macro": tm.MulticlassF1Score(num_classes, average="macro"),
        "precision_weighted": tm.MulticlassPrecision(num_classes, average="weighted"),
        "recall_weighted": tm.MulticlassRecall(num_classes, average="weighted"),
        "f1_weighted": tm.MulticlassF1Score(num_classes, average="weighted"),
        "roc_auc": tm.MulticlassAUROC(num_classes),
        "average_precision": tm.MulticlassAveragePrecision(num_classes),
        "ece": tm.MulticlassCalibrationError(num_classes, n_bins=15),
        "kappa": tm.MulticlassCohenKappa(num_classes),
    }
    probabilities, truth = torch.from_numpy(logits).softmax(dim=1), torch.from_numpy(targets)
    for name, other in others.items():
        assert getattr(metrics, name) == pytest.approx(float(other(probabilities, truth)), abs=2e-5), name
    assert metrics.log_loss == pytest.approx(
        float(torch.nn.functional.cross_entropy(torch.from_numpy(logits), truth)), abs=1e-5
    )


def test_one_image_and_one_class_are_judged_without_what_they_cannot_say() -> None:
    one = compute_metrics(make_table([1], np.array([[0.0, 2.0]], dtype=np.float32), 2))
    assert (one.accuracy, one.f1_macro) == (1.0, 1.0) and np.isnan(
        [one.kappa, one.roc_auc, one.average_precision, one.top5_accuracy]
    ).all()
    assert {"kappa", "roc_auc", "average_precision", "top5_accuracy"}.isdisjoint(one.scalars())
    assert one.intervals["accuracy"] == pytest.approx((0.2065, 1.0), abs=1e-4)  # Wilson's of 1 of 1
    assert one.intervals["log_loss"] is None and one.intervals["kappa"] is None
    single = compute_metrics(make_table([0, 0, 0], np.zeros((3, 1), dtype=np.float32), 1))
    assert (single.accuracy, single.log_loss, single.brier) == (1.0, 0.0, 0.0)
    assert single.as_dict()["roc_auc"] is None and "top5_accuracy" not in single.as_dict()


def test_huge_logits_are_ranked_without_a_warning() -> None:
    logits = np.array([[3e38, -3e38], [-3e38, 3e38], [3e38, -3e38], [0, 1]], dtype=np.float32)
    assert compute_metrics(make_table([0, 1, 1, 0], logits, 2)).roc_auc == pytest.approx(0.75, abs=0.26)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_infinite_logits_are_refused(bad: float) -> None:
    with pytest.raises(DataError, match=r"1 of 2 images.*'0\.png'"):
        compute_metrics(make_table([0, 1], np.array([[1.0, bad], [0.0, 1.0]], dtype=np.float32), 2))


@pytest.mark.parametrize("target", [-1, 3])
def test_a_label_that_is_no_class_is_refused(target: int) -> None:
    with pytest.raises(DataError, match=rf"invalid label {target} of '1\.png'"):
        compute_metrics(make_table([0, target], np.zeros((2, 3), dtype=np.float32), 3))


def test_a_table_of_another_shape_is_refused() -> None:
    with pytest.raises(DataError, match="2 labels and 3 classes"):
        compute_metrics(make_table([0, 1], np.zeros((2, 4), dtype=np.float32), 3))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), num_classes=st.integers(2, 8))
def test_the_order_of_the_images_changes_no_value(seed: int, num_classes: int) -> None:
    rng = np.random.default_rng(seed)
    targets, logits = rng.integers(0, num_classes, 60), rng.normal(size=(60, num_classes)).astype(np.float32)
    order = rng.permutation(60)
    one, two = (
        compute_metrics(make_table(targets[rows].tolist(), logits[rows], num_classes), resamples=0)
        for rows in (slice(None), order)
    )
    assert one.scalars() == pytest.approx(two.scalars(), abs=1e-12)
    assert [score.f1 for score in one.per_class] == [score.f1 for score in two.per_class]


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
