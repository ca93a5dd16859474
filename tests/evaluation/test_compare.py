"""Two classifiers on the same images: the figures are those of each alone, the tests those of the textbook."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from image_classifier.errors import DataError
from image_classifier.evaluation.compare import compare, mcnemar, shared_images
from image_classifier.evaluation.metrics.compute import compute_metrics
from image_classifier.predictions import PredictionTable


def made(targets: np.ndarray, accuracy: float, seed: int, num_classes: int = 4) -> PredictionTable:
    """Predictions of about that accuracy, wrong ones spread over the classes."""
    generator = np.random.default_rng(seed)
    answers = np.where(
        generator.random(len(targets)) < accuracy, targets, generator.integers(0, num_classes, len(targets))
    )
    logits = generator.normal(size=(len(targets), num_classes)) + 4 * np.eye(num_classes)[answers]
    return PredictionTable(
        tuple(f"{row}.png" for row in range(len(targets))),
        targets,
        logits.astype(np.float32),
        tuple("abcdefgh"[:num_classes]),
    )


def taken(table: PredictionTable, rows: np.ndarray) -> PredictionTable:
    return PredictionTable(
        tuple(table.paths[row] for row in rows), table.targets[rows], table.logits[rows], table.classes
    )


TARGETS = np.random.default_rng(0).integers(0, 4, 400)


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    expected = binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_each_figure_is_that_of_the_classifier_alone() -> None:
    first, second = made(TARGETS, 0.7, 1), made(TARGETS, 0.8, 2)
    paired = compare(first, second, resamples=100).paired
    for place, table in enumerate((first, second)):
        scalars = compute_metrics(table).scalars()
        for name in ("accuracy", "f1_macro", "log_loss"):
            assert paired[name].values[place] == pytest.approx(scalars[name], rel=1e-6)
    assert all(found.interval[0] <= found.difference <= found.interval[1] for found in paired.values())


@pytest.mark.parametrize(("accuracies", "better"), [((0.6, 0.9), 1), ((0.9, 0.6), -1)])
def test_a_great_difference_is_seen_and_its_direction(accuracies: tuple[float, float], better: int) -> None:
    found = compare(made(TARGETS, accuracies[0], 1), made(TARGETS, accuracies[1], 2), resamples=200)
    assert found.better == better and found.p_value < 1e-6
    assert np.sign(found.paired["accuracy"].difference) == np.sign(found.paired["accuracy"].gain) == better
    assert np.sign(found.paired["log_loss"].difference) == -better == -np.sign(found.paired["log_loss"].gain)


def test_changing_places_changes_signs_only() -> None:
    first, second = made(TARGETS, 0.7, 1), made(TARGETS, 0.75, 2)
    there, back = compare(first, second, resamples=200), compare(second, first, resamples=200)
    assert back.only_right == there.only_right[::-1] and back.p_value == there.p_value
    for name, paired in there.paired.items():
        assert back.paired[name].interval == pytest.approx((-paired.interval[1], -paired.interval[0]))


def test_equal_answers_are_no_difference_and_no_luck() -> None:
    found = compare(made(TARGETS, 0.7, 1), made(TARGETS, 0.7, 1), resamples=100)
    assert found.better == 0 and found.p_value == 1 and found.only_right == (0, 0)
    assert all(paired.interval == (0, 0) for paired in found.paired.values())


def test_the_order_of_rows_and_of_classes_does_not_matter() -> None:
    first, second = made(TARGETS, 0.7, 1), made(TARGETS, 0.8, 2)
    order = np.random.default_rng(3).permutation(len(TARGETS))
    codes = np.array([2, 0, 3, 1])
    turned = PredictionTable(
        second.paths,
        np.argsort(codes)[second.targets],
        second.logits[:, codes],
        tuple(second.classes[code] for code in codes),
    )
    expected, actual = compare(first, second, resamples=100), compare(first, taken(turned, order), resamples=100)
    assert actual.paired == expected.paired and actual.only_right == expected.only_right


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_interval_is_as_wide_as_theory_says(seed: int) -> None:
    targets = np.random.default_rng(seed).integers(0, 4, 2000)
    found = compare(made(targets, 0.7, seed), made(targets, 0.72, seed + 10), resamples=1000, seed=seed)
    right = found.shared.right.astype(float)
    deviation = (right[1] - right[0]).std() / np.sqrt(len(targets))
    low, high = found.paired["accuracy"].interval
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.1)


@pytest.mark.slow
def test_luck_is_called_better_about_as_seldom_as_promised() -> None:
    generator = np.random.default_rng(0)
    verdicts = []
    for seed in range(60):
        targets = generator.integers(0, 4, 300)
        verdicts.append(
            compare(made(targets, 0.7, 2 * seed), made(targets, 0.7, 2 * seed + 1), resamples=100, seed=seed).better
        )
    assert np.count_nonzero(verdicts) <= 8  # 3 expected; P(more than 8) is below 0.5 %


def test_images_of_one_only_are_counted_and_left_out() -> None:
    first, second = made(TARGETS, 0.7, 1), made(TARGETS, 0.8, 2)
    shared = shared_images(taken(first, np.arange(0, 300)), taken(second, np.arange(100, 400)))
    assert shared.num_unmatched == (100, 100) and shared.paths == tuple(f"{row}.png" for row in range(100, 300))


def test_a_class_that_only_one_knows_costs_it_the_images_it_takes_for_it() -> None:
    first = made(TARGETS, 0.9, 1)
    logits = np.concatenate([first.logits, np.full((len(TARGETS), 1), -9, np.float32)], axis=1)
    logits[:40, 4] = 99
    found = compare(first, PredictionTable(first.paths, first.targets, logits, (*first.classes, "z")), resamples=100)
    assert found.only_right == (int(found.shared.right[0, :40].sum()), 0)
    assert found.shared.classes == ("a", "b", "c", "d", "z")


def test_what_cannot_be_compared_is_said() -> None:
    first = made(TARGETS, 0.7, 1)
    with pytest.raises(DataError, match="no image in common"):
        compare(
            first,
            PredictionTable(tuple(f"x{path}" for path in first.paths), first.targets, first.logits, first.classes),
        )
    with pytest.raises(DataError, match=r"'0\.png' more than once"):
        compare(first, PredictionTable(("0.png",) * len(TARGETS), first.targets, first.logits, first.classes))
    with pytest.raises(DataError, match="labels of 400 of 400 images differ"):
        compare(first, PredictionTable(first.paths, first.targets, first.logits, ("w", "x", "y", "z")))
