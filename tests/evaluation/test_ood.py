"""The detector: what is far from the training images scores high, and it is read back as it was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from image_classifier.errors import CheckpointError
from image_classifier.evaluation.reliability.ood import Detector, Gaussian, auroc, looks

RANDOM = np.random.default_rng(0)


def training(count: int = 300, dimensions: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings around a direction for each of three classes, looks of smooth colour pictures, classes."""
    generator, targets = np.random.default_rng(1), np.arange(count) % 3
    embeddings = 5 * np.eye(dimensions)[targets] + generator.normal(scale=0.5, size=(count, dimensions))
    return embeddings.astype(np.float32), looks(pictures(count, 2)), targets


def pictures(count: int, seed: int) -> np.ndarray:
    """Smooth colour pictures uint8 [N, 3, 16, 16]."""
    corners = np.random.default_rng(seed).uniform(0, 255, (count, 3, 2, 2))
    weights = np.stack([np.linspace(1, 0, 16), np.linspace(0, 1, 16)])
    return np.einsum("ncij,ih,jw->nchw", corners, weights, weights).astype(np.uint8)


def test_noise_grey_pictures_and_strange_embeddings_score_high() -> None:
    embeddings, seen, targets = training()
    detector = Detector.fitted(embeddings, seen, targets)
    inside = detector.scores(*training(150)[:2])
    assert inside.dtype == np.float32 and np.median(detector.scores(embeddings, seen)) < 0.5
    noise = looks(RANDOM.integers(0, 256, (100, 3, 16, 16), dtype=np.uint8))
    grey = looks(np.repeat(pictures(100, 3)[:, :1], 3, axis=1))
    other = 5 * np.eye(12)[5 + np.arange(100) % 3]
    for outside in (
        detector.scores(embeddings[:100], noise),
        detector.scores(embeddings[:100], grey),
        detector.scores(other, seen[:100]),
    ):
        assert auroc(inside, outside) > 0.97


def test_the_distance_is_that_of_mahalanobis() -> None:
    values = RANDOM.normal(size=(500, 4)) @ RANDOM.normal(size=(4, 4))
    shape = Gaussian.fitted(values, np.zeros(500, np.int64))
    covariance = np.cov(values.T, bias=True)
    covariance = 0.9 * covariance + 0.1 * np.trace(covariance) / 4 * np.eye(4)
    away = values - values.mean(axis=0)
    np.testing.assert_allclose(
        shape.distances(values), np.einsum("ij,jk,ik->i", away, np.linalg.inv(covariance), away), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_handful_of_images_is_enough_to_fit(count: int) -> None:
    embeddings, seen, targets = training(count)
    assert np.isfinite(Detector.fitted(embeddings, seen, targets).scores(*training(10)[:2])).all()


def test_constant_embeddings_and_one_pixel_are_no_division_by_zero() -> None:
    flat = looks(np.zeros((4, 3, 1, 1), np.uint8))
    assert flat.shape == (4, 11) and np.isfinite(flat).all()
    assert np.isfinite(
        Detector.fitted(np.zeros((4, 3), np.float32), flat, np.arange(4)).scores(np.ones((2, 3)), flat[:2])
    ).all()


def test_scores_do_not_depend_on_the_batch() -> None:
    embeddings, seen, targets = training()
    detector = Detector.fitted(embeddings, seen, targets)
    single = [detector.scores(embeddings[row : row + 1], seen[row : row + 1])[0] for row in range(20)]
    np.testing.assert_allclose(detector.scores(embeddings, seen)[:20], single, rtol=1e-4, atol=1e-4)


def test_written_and_read_back(tmp_path: Path) -> None:
    embeddings, seen, targets = training()
    detector = Detector.fitted(embeddings, seen, targets)
    detector.write(tmp_path / "ood.npz")
    np.testing.assert_array_equal(
        Detector.read(tmp_path / "ood.npz").scores(embeddings, seen), detector.scores(embeddings, seen)
    )
    for damage in (b"", b"other", (tmp_path / "ood.npz").read_bytes()[:500]):
        (tmp_path / "bad.npz").write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"bad\.npz' is damaged"):
            Detector.read(tmp_path / "bad.npz")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_the_auroc_is_that_of_scikit_learn(inside: list[int], outside: list[int]) -> None:
    truth = np.repeat([0, 1], [len(inside), len(outside)])
    assert auroc(np.array(inside), np.array(outside)) == pytest.approx(roc_auc_score(truth, np.array(inside + outside)))
