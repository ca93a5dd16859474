"""What more images would bring is said rightly where it is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from image_classifier.training.transfer.learning_curve import LearningCurve, learning_curve

Images = tuple[np.ndarray, np.ndarray]


def images(count: int, width: int, distance: float, seed: int, classes: int = 2) -> Images:
    """Classes around centres at a distance, each in a direction of its own, with noise of deviation 1."""
    generator = np.random.default_rng(seed)
    targets = np.arange(count) % classes
    features = generator.normal(size=(count, width))
    features[np.arange(count), targets] += distance
    return features.astype(np.float32), targets


def curve_of(train: Images, val: Images, seed: int = 0) -> LearningCurve:
    return learning_curve(*train, *val, strength=0.1, seed=seed)


def test_more_images_help_where_there_are_few_for_many_features() -> None:
    curve = curve_of(images(160, 60, 2.0, 1), images(600, 60, 2.0, 2))
    assert curve.gain > 2 * curve.error > 0
    accuracies = [accuracy for _, accuracy in curve.points]
    assert accuracies == sorted(accuracies)
    assert curve.gain == pytest.approx(accuracies[2] - accuracies[1])


def test_more_images_do_not_help_where_few_are_enough() -> None:
    curve = curve_of(images(400, 4, 12.0, 1), images(200, 4, 12.0, 2))
    assert curve.gain == 0 and curve.error == 0 and curve.points[-1] == (400, 1.0)
    assert curve.needy("ab") == [] and "in need" not in curve.sentence("ab")


def test_a_class_like_another_needs_photographs_first() -> None:
    """Three classes, of which the last has the features of the first, and fewer images."""
    features, targets = images(300, 8, 8.0, 1, classes=3)
    features[targets == 2] = images(300, 8, 8.0, 3)[0][::2][: (targets == 2).sum()]
    rare = np.flatnonzero(targets != 2).tolist() + np.flatnonzero(targets == 2)[:20].tolist()
    val, val_targets = images(150, 8, 8.0, 2, classes=3)
    val[val_targets == 2] = images(150, 8, 8.0, 4)[0][::2][: (val_targets == 2).sum()]
    curve = curve_of((features[rare], targets[rare]), (val, val_targets))
    assert curve.needy(["one", "two", "lost"])[0] == "lost" and "two" not in curve.needy(["one", "two", "lost"])
    assert "most in need of photographs: lost" in curve.sentence(["one", "two", "lost"])


def test_a_class_without_val_images_is_not_named() -> None:
    train, (val, val_targets) = images(120, 6, 3.0, 1, classes=3), images(120, 6, 3.0, 2, classes=3)
    curve = curve_of(train, (val[val_targets != 2], val_targets[val_targets != 2]))
    assert np.isnan(curve.recalls[:, 2]).all() and "c" not in curve.needy("abc")


def test_it_is_plain_values_decided_by_the_seed() -> None:
    train, val = images(90, 10, 1.5, 1), images(60, 10, 1.5, 2)
    first, again = curve_of(train, val), curve_of(train, val)
    text = json.dumps(first.as_dict("ab"), allow_nan=False)
    assert text == json.dumps(again.as_dict("ab")) and set(json.loads(text)) == {"points", "gain", "error", "needy"}
    assert [count for count, _ in first.points] == [22, 45, 90]
    assert not np.array_equal(curve_of(train, val, seed=1).recalls[0], first.recalls[0])


def test_each_point_says_how_many_images_it_was_fitted_to() -> None:
    """Of many small classes a quarter still has an image of each class."""
    curve = curve_of(images(80, 40, 6.0, 1, classes=40), images(80, 40, 6.0, 2, classes=40))
    counts = [count for count, _ in curve.points]
    assert counts[0] >= 40 and counts[2] == 80 and counts == sorted(counts)
