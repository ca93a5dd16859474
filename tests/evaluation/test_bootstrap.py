"""Intervals: each resample equals an evaluation of its images; reproducible; no false certainty."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from image_classifier.evaluation.metrics import bootstrap
from image_classifier.evaluation.metrics.bootstrap import percentile_interval, proportion_interval, resample, wilson
from image_classifier.evaluation.metrics.compute import ClassificationMetrics, compute_metrics
from image_classifier.evaluation.metrics.per_image import evaluate_images
from image_classifier.evaluation.metrics.ranking import rank_classes
from image_classifier.evaluation.metrics.sums import MetricSums
from image_classifier.evaluation.results import metrics_lines
from image_classifier.predictions import PredictionTable
from tests.evaluation.test_ranking import made_table


def part_of(table: PredictionTable) -> MetricSums:
    images = evaluate_images(table)
    return MetricSums(table.targets, images, rank_classes(table, images))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), num_classes=st.integers(2, 7), number=st.integers(0, 1000))
def test_a_resample_is_the_part_that_its_images_make(seed: int, num_classes: int, number: int) -> None:
    table = made_table(40, num_classes, seed)
    weights = bootstrap._draw(40, number)
    assert weights.sum() == 40
    part = part_of(table)
    rows = np.repeat(np.arange(40), weights.astype(int))
    again = compute_metrics(
        PredictionTable(("",) * 40, table.targets[rows], table.logits[rows], table.classes), resamples=0
    )
    sums = part.sums(weights)
    for name, value in part.figures(sums).items():
        if name not in ("roc_auc", "average_precision"):  # these two by their derivative
            assert float(value) == pytest.approx(getattr(again, name), nan_ok=True), name
    assert np.nan_to_num(part.counts(sums).f1).tolist() == pytest.approx([score.f1 for score in again.per_class])


def test_intervals_do_not_depend_on_the_number_of_threads() -> None:
    table = made_table(200, 6, 0)
    one, three, again = (compute_metrics(table, resamples=90, threads=threads).as_dict() for threads in (1, 3, 3))
    assert one == three == again


def test_more_resamples_go_on_where_fewer_ended() -> None:
    few, many = (resample(lambda weights: weights, 10, count) for count in (30, 50))
    np.testing.assert_array_equal(few, many[:30])


def test_intervals_hold_the_value_and_shrink_with_the_part() -> None:
    small, large = (compute_metrics(made_table(count, 6, 2)) for count in (200, 3200))
    for metrics in (small, large):
        assert list(metrics.intervals) == list(metrics.scalars())
        for name, bounds in metrics.intervals.items():
            assert bounds is not None and bounds[0] <= getattr(metrics, name) <= bounds[1], name
    for name, bounds in large.intervals.items():
        wide = small.intervals[name]
        assert bounds is not None and wide is not None and bounds[1] - bounds[0] < 0.5 * (wide[1] - wide[0]), name
    for score in large.per_class:
        assert set(score.intervals) == {"precision", "recall", "f1"}
        assert all(bounds and bounds[0] < getattr(score, name) < bounds[1] for name, bounds in score.intervals.items())


@pytest.mark.slow
def test_the_interval_of_f1_is_that_of_judging_resamples_by_scikit_learn() -> None:
    table = made_table(300, 4, 6)
    predicted, rng = table.logits.argmax(axis=1), np.random.default_rng(1)
    drawn = (rng.integers(0, 300, 300) for _ in range(400))
    expected = np.quantile(
        [f1_score(table.targets[rows], predicted[rows], average="macro") for rows in drawn], [0.025, 0.975]
    )
    assert compute_metrics(table).intervals["f1_macro"] == pytest.approx(expected.tolist(), abs=0.012)


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    truth, covered = 0.8, 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        right = rng.random(120) < truth
        logits = np.where(right[:, None], [[1.0, 0.0]], [[0.0, 1.0]]).astype(np.float32)
        bounds = compute_metrics(
            PredictionTable(("",) * 120, np.zeros(120, np.int64), logits, ("a", "b")), 100, 1
        ).intervals["accuracy"]
        covered += bounds is not None and bounds[0] <= truth <= bounds[1]
    assert 0.87 <= covered / 100 <= 0.99


@given(hits=st.integers(0, 60), wrong=st.integers(0, 60))
def test_few_right_or_wrong_answers_have_wilsons_interval(hits: int, wrong: int) -> None:
    found = proportion_interval(np.array(hits), np.array(hits + wrong), np.array([0.4, 0.6]))
    if hits + wrong == 0:
        assert np.isnan(found).all()
    elif min(hits, wrong) < 5:
        expected = binomtest(hits, hits + wrong).proportion_ci(method="wilson")
        assert found.tolist() == pytest.approx([expected.low, expected.high], abs=1e-6)
    else:
        assert found.tolist() == [0.4, 0.6]


@given(total=st.integers(1, 10**6), share=st.floats(0, 1))
def test_wilsons_interval_is_that_of_scipy_and_never_leaves_0_and_1(total: int, share: float) -> None:
    hits = round(share * total)
    low, high = wilson(np.array(hits), np.array(total))
    expected = binomtest(hits, total).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0 <= low <= hits / total <= high <= 1 and (low == 0) == (hits == 0) and (high == 1) == (hits == total)


def test_no_mistake_is_no_certainty() -> None:
    metrics = all_right(50)
    assert metrics.intervals["accuracy"] == pytest.approx((50 / (50 + 1.959964**2), 1.0))
    for name in ("balanced_accuracy", "f1_macro", "roc_auc", "kappa"):
        assert metrics.intervals[name] is None, name
    assert all(score.intervals["f1"] is not None and score.intervals["f1"][0] < 0.95 for score in metrics.per_class)
    lines = list(metrics_lines(metrics, "test"))
    assert "test accuracy 1.0000  [0.9287, 1.0000]" in lines and "test f1_macro 1.0000" in lines


def all_right(count: int) -> ClassificationMetrics:
    targets = np.arange(count) % 2
    return compute_metrics(
        PredictionTable(("",) * count, targets, np.eye(2, dtype=np.float32)[targets], ("cat", "dog"))
    )


def test_what_resampling_adds_by_itself_is_taken_off() -> None:
    samples = np.random.default_rng(0).normal(0.3, 0.01, (500, 1))
    low, high = percentile_interval(np.array([0.2]), samples)[:, 0]
    assert (low, high) == pytest.approx((0.18, 0.22), abs=0.003)


def test_a_class_that_is_absent_or_never_predicted_is_said() -> None:
    logits = np.array([[2.0, 0, 0], [2, 0, 0], [2, 0, 0], [2, 0, 0]], dtype=np.float32)
    metrics = compute_metrics(PredictionTable(("",) * 4, np.array([0, 0, 0, 1]), logits, ("cat", "dog", "emu")))
    lines = list(metrics_lines(metrics, "val"))
    assert "no image in this split: emu" in lines and "never predicted: dog" in lines
    cat, dog, emu = metrics.per_class
    assert (
        cat.intervals["precision"] is not None
        and dog.intervals["precision"] is None
        and dog.intervals["recall"] is not None
    )
    assert set(emu.intervals.values()) == {None}


def test_the_everyday_part_takes_no_time() -> None:
    table = made_table(5000, 10, 0)
    start = time.thread_time()
    compute_metrics(table, threads=1)
    assert time.thread_time() - start < 2
