"""`data.resize=auto` sees what a crop loses, and stays with crop where nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from image_classifier.cli.train_config import compose_train_config
from image_classifier.errors import ConfigError
from image_classifier.manifest import Manifest
from image_classifier.modeling.convnet import ConvNet
from image_classifier.training.config import TrainConfig
from image_classifier.training.transfer import resize as tested
from image_classifier.training.transfer.resize import (
    CROP,
    PictureShapes,
    ResizeScores,
    best_resize,
    compare,
    cross_validated,
    grouped_folds,
    lines,
)
from tests.conftest import listed

COLOURS = {"blue": (40, 60, 220), "red": (220, 60, 40)}


def pictures(root: Path, where: str, size: tuple[int, int] = (72, 24), count: int = 30) -> Manifest:
    """Noise with bars of the class's colour at the edges or in the centre, all of them for training."""
    width, height = size
    for label, colour in COLOURS.items():
        (root / "train" / label).mkdir(parents=True)
        for number in range(count):
            noise = np.random.default_rng((len(label), number)).integers(0, 256, (height, width, 3), dtype=np.uint8)
            bars = (
                np.r_[0 : width // 6, width - width // 6 : width] if where == "edges" else slice(width // 3, width // 2)
            )
            noise[:, bars] = noise[:, bars] // 4 + 3 * np.array(colour, np.uint8) // 4
            Image.fromarray(noise).save(root / "train" / label / f"{number}.png")
    return listed(root)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A small network with weights from a file."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(ConvNet(24, (4, 8)).state_dict(), "w.pth")
    size = ("data.image_size=24", "data.resize=auto", "model.backbone.channels=[4,8]")
    return compose_train_config(["data=folder", "data.dir=x", "model=convnet", "model.weights=w.pth", *size])


def test_a_class_that_only_the_edges_show_is_not_cropped(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = pictures(tmp_path / "edges", "edges")
    with caplog.at_level("INFO"):
        assert best_resize(config, manifest) in ("squash", "pad")
    said = [line.message for line in caplog.records if line.message.startswith("resize ")]
    assert len(said) == 4 and said[0].startswith("resize   crop cuts 100% of the images by a quarter or more: ")
    assert "points better than crop" in said[1] and said[2].startswith("resize   pad leaves 67% of the square black: ")
    assert said[3].endswith("by 5-fold cross-validation on 60 training images")


def test_a_class_that_the_centre_shows_is_cropped(config: TrainConfig, tmp_path: Path) -> None:
    assert best_resize(config, pictures(tmp_path / "centre", "centre")) == CROP


@pytest.mark.parametrize("why", ["square", "no weights", "few"])
def test_where_nothing_can_be_compared_it_is_crop_and_the_log_says_why(
    why: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tested, "build_network", lambda inputs: pytest.fail("a network was built"))
    size, count = ((24, 24) if why == "square" else (72, 24)), (1 if why == "few" else 3)
    if why == "no weights":
        config = config.with_values({"model.weights": None})
    with caplog.at_level("INFO"):
        assert best_resize(config, pictures(tmp_path / "p", "edges", size, count)) == CROP
    says = {"square": "all pictures are square", "no weights": "with pretrained weights only", "few": "too few"}
    assert says[why] in caplog.text


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=60), st.integers(0, 99))
def test_no_group_is_in_two_folds_and_folds_are_of_one_size(images: list[tuple[int, int]], seed: int) -> None:
    groups, targets = (np.array(column) for column in zip(*images, strict=True))
    folds = grouped_folds(groups.astype(np.uint64), targets, seed)
    of_group = {int(group): set(folds[groups == group].tolist()) for group in groups}
    assert all(len(found) == 1 for found in of_group.values())
    sizes = np.bincount([min(found) for found in of_group.values()], minlength=5)
    assert max(sizes) - min(sizes) <= 1
    assert np.array_equal(folds, grouped_folds(groups.astype(np.uint64), targets, seed))


def test_each_fold_has_images_of_each_class() -> None:
    targets = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], 10))
    folds = grouped_folds(np.arange(30, dtype=np.uint64), targets, 0)
    assert all(set(targets[folds == fold]) == {0, 1, 2} for fold in range(5))


def test_a_gain_counts_a_group_once() -> None:
    """The error of ten images that are alike is that of one, as their differences come together."""
    generator = np.random.default_rng(0)
    base, squash = generator.random(50) < 0.5, generator.random(50) < 0.7
    right = {CROP: base, "squash": squash, "pad": base}
    single = compare(right, np.arange(50, dtype=np.uint64))
    tenfold = compare({way: np.repeat(hits, 10) for way, hits in right.items()}, np.repeat(np.arange(50), 10))
    assert single.gains["squash"] == pytest.approx(tenfold.gains["squash"])
    differences = squash.astype(float) - base
    assert single.gains["squash"] == pytest.approx((differences.mean(), differences.std() / 50**0.5))
    assert single.gains["pad"] == (0, 0)


@pytest.mark.parametrize(
    ("squash", "pad", "best"),
    [
        ((0.0, 0.0), (0.0, 0.0), CROP),
        ((0.02, 0.03), (-0.5, 0.01), CROP),
        ((0.02, 0.01), (0.0, 0.01), "squash"),
        ((0.02, 0.01), (0.03, 0.02), "pad"),
        ((0.02, 0.01), (0.03, 0.04), "squash"),
        ((0.02, 0.01), (0.02, 0.01), "squash"),
    ],
)
def test_crop_stays_unless_another_is_better_by_more_than_its_error(
    squash: tuple[float, float], pad: tuple[float, float], best: str
) -> None:
    found = ResizeScores({CROP: 0.5}, {"squash": squash, "pad": pad})
    assert found.best == best and len(lines(found, PictureShapes(np.array([3]), np.array([2]), 1.0))) == 3


def test_what_each_way_costs_is_said_in_words() -> None:
    shapes = PictureShapes(np.array([400, 100, 300, 200]), np.array([100, 100, 400, 250]), 1.0)
    assert not shapes.all_square and list(shapes.costs.values()) == [
        "crop cuts 50% of the images by a quarter or more",
        "squash shortens 50% of the images by a quarter or more",
        "pad leaves 30% of the square black",
    ]
    assert replace(shapes, crop_fraction=0.8).costs[CROP].startswith("crop cuts 100%")


def test_a_regression_is_judged_on_images_that_it_was_not_fitted_to() -> None:
    """Noise is learned by heart and predicted by chance; a signal is predicted."""
    generator = np.random.default_rng(0)
    targets, features = np.arange(100) % 2, generator.normal(size=(100, 200)).astype(np.float32)
    folds = grouped_folds(np.arange(100, dtype=np.uint64), targets, 0)
    assert 0.25 < cross_validated(features, targets, folds).mean() < 0.75
    features[:, 0] += 100 * targets
    features[:, 1:] = 0
    assert cross_validated(features, targets, folds).all()


def test_auto_is_crop_for_everything_else_and_other_words_are_refused() -> None:
    config = compose_train_config(["data.resize=auto"])
    assert config.data.resize == "auto" and config.data.preprocess.mode == CROP
    with pytest.raises(ConfigError, match=r"data\.resize must be one of"):
        compose_train_config(["data.resize=automatic"])
