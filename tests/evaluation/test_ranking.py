"""ROC-AUC and average precision by cells equal those of scikit-learn, and their derivatives the weighted ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from image_classifier.evaluation.metrics import ranking
from image_classifier.evaluation.metrics.bootstrap import percentile_interval, resample
from image_classifier.evaluation.metrics.compute import compute_metrics
from image_classifier.evaluation.metrics.per_image import evaluate_images
from image_classifier.evaluation.metrics.ranking import rank_classes
from image_classifier.parallel import parallel_map, slices
from image_classifier.predictions import PredictionTable

LOG_PROBABILITIES = st.floats(-(2.0**127), 0.0, width=32)


def made_table(
    num_images: int, num_classes: int, seed: int, ties: bool = False, signal: float = 1.5
) -> PredictionTable:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, num_classes, num_images)
    logits = rng.normal(size=(num_images, num_classes)) + signal * np.eye(num_classes)[targets]
    logits = (np.round(logits) if ties else logits).astype(np.float32)
    return PredictionTable(("",) * num_images, targets, logits, tuple(map(str, range(num_classes))))


def weighted(table: PredictionTable, weights: np.ndarray) -> np.ndarray:
    """Macro ROC-AUC and average precision of the images with these weights, by scikit-learn."""
    images = evaluate_images(table)
    scores = (table.logits.astype(np.float64) - images.top[:, None] - images.log_total[:, None]).astype(np.float32)
    present = [position for position in range(len(table.classes)) if weights[table.targets == position].sum() > 0]
    figures = [
        [figure(table.targets == c, scores[:, c], sample_weight=weights) for c in present]
        for figure in (roc_auc_score, average_precision_score)
    ]
    return np.mean(figures, axis=1)


@pytest.mark.slow
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), ties=st.booleans(), num_classes=st.integers(2, 4))
def test_influence_is_the_derivative_by_an_images_weight(seed: int, ties: bool, num_classes: int) -> None:
    table = made_table(24, num_classes, seed, ties)
    if len(np.unique(table.targets)) < num_classes:
        return
    influence = rank_classes(table, evaluate_images(table)).influence
    np.testing.assert_allclose(influence.sum(axis=1), 0, atol=1e-12)
    for image in (0, 7, 23):
        step = 1e-5 * np.eye(24)[image]
        slope = (weighted(table, 1 + step) - weighted(table, 1 - step)) / 2e-5
        np.testing.assert_allclose(influence[:, image], slope, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("signal", [1.0, 3.0])
def test_intervals_of_the_derivative_are_those_of_ranking_every_resample_anew(signal: float) -> None:
    table, drawn = made_table(150, 3, 4, signal=signal), []
    ranked = rank_classes(table, evaluate_images(table))

    def changes(weights: np.ndarray) -> np.ndarray:
        drawn.append(weights)
        return ranked.influence @ weights

    value = np.array([ranked.roc_auc.mean(), ranked.average_precision.mean()])
    linear = percentile_interval(value, value + resample(changes, 150, 80, threads=1))
    exact = percentile_interval(value, np.array([weighted(table, weights) for weights in drawn]))
    width = exact[1] - exact[0]
    np.testing.assert_array_less(np.abs(linear - exact) / width, 0.15)


@given(
    steps=st.lists(LOG_PROBABILITIES, min_size=1, max_size=30, unique=True),
    others=st.lists(LOG_PROBABILITIES, max_size=30),
)
def test_the_grid_finds_the_cells_that_a_search_finds(steps: list[float], others: list[float]) -> None:
    edges = np.unique(np.array(steps, dtype=np.float32))
    near = [np.nextafter(edges, np.float32(sign)) for sign in (-np.inf, np.inf)]
    scores = np.concatenate([edges, np.array(others, dtype=np.float32), *(array[np.isfinite(array)] for array in near)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_FEW", 0)
        found = ranking._cells(scores, edges)
    expected = [2 * int((edges <= score).sum()) - int(score in edges) for score in scores]
    assert found.tolist() == expected


def test_blocks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = made_table(300, 7, 1)
    images = evaluate_images(table)
    whole = rank_classes(table, images, threads=1)
    monkeypatch.setattr(ranking, "_BLOCK", 900)
    pieces, threaded = (rank_classes(table, images, threads=threads) for threads in (1, 3))
    np.testing.assert_allclose(pieces.influence, whole.influence, atol=1e-15)
    np.testing.assert_array_equal(pieces.influence, threaded.influence)
    np.testing.assert_array_equal(pieces.roc_auc, whole.roc_auc)
    np.testing.assert_array_equal(evaluate_images(table, threads=3).log_loss, images.log_loss)


def test_a_table_in_a_file_or_of_one_repeated_row_is_judged_like_any_other(tmp_path: Path) -> None:
    table = made_table(60, 4, 2)
    np.save(tmp_path / "logits.npy", table.logits)
    mapped = replace(table, logits=np.load(tmp_path / "logits.npy", mmap_mode="r"))
    assert compute_metrics(mapped, 20).as_dict() == compute_metrics(table, 20).as_dict()
    constant = compute_metrics(replace(table, logits=np.broadcast_to(np.float32([0, 1, 0, 0]), (60, 4))), 20)
    assert {score.roc_auc for score in constant.per_class} == {0.5}
    assert [score.average_precision for score in constant.per_class] == pytest.approx(
        [score.support / 60 for score in constant.per_class]
    )


@given(total=st.integers(0, 40), step=st.integers(0, 9), threads=st.integers(1, 4))
def test_pieces_come_whole_and_in_order(total: int, step: int, threads: int) -> None:
    found = list(parallel_map(lambda rows: list(range(rows.start, rows.stop)), slices(total, step), threads))
    assert [number for piece in found for number in piece] == list(range(total))


def test_an_error_in_a_thread_is_told() -> None:
    with pytest.raises(ZeroDivisionError):
        list(parallel_map(lambda number: 1 / number, [1, 0, 1], threads=2))
