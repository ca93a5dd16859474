from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.dataset.split import SplitSettings, assign_splits, check_folds
from image_classifier.errors import ConfigError
from tests.dataset.manifests import MIXED, SETTINGS, SIZES, UNTIMED, assert_whole, deal, joined, manifest_of, mixed


@UNTIMED
@given(MIXED | SIZES, SETTINGS, st.integers(2, 5))
def test_folds_partition_what_is_not_test(images, settings, folds):
    manifest = manifest_of(images) if isinstance(images, dict) else mixed(images)
    dealt = [deal(manifest, settings, fold=fold, folds=folds) for fold in range(folds)]
    for way in dealt:
        assert_whole(way)
        assert (way.indices("test") == dealt[0].indices("test")).all()
        assert set(way.part("train").classes) == set(manifest.classes)
    held = sorted(row for way in dealt for row in way.indices("val").tolist())
    assert held == sorted(set(range(len(manifest))) - set(dealt[0].indices("test").tolist()))


@UNTIMED
@given(SIZES, st.integers(2, 5))
def test_folds_hold_as_much_of_each_class_to_within_one_cluster(sizes, folds):
    dealt = [assign_splits(manifest_of(sizes), SplitSettings(), fold=fold, folds=folds) for fold in range(folds)]
    for label, clusters in sizes.items():
        counts = [sum(record.label == label and record.split == "val" for record in way) for way in dealt]
        assert max(counts) - min(counts) <= max(clusters)


def test_folds_take_the_given_val_part_in_and_forget_what_was(caplog):
    caplog.set_level(logging.INFO)
    parts = {"train": 12, "val": 3, "test": 5}
    manifest = joined(
        *(manifest_of({"ant": [1] * count, "bee": [1] * count}, part, part) for part, count in parts.items())
    )
    first = assign_splits(manifest, SplitSettings(), fold=0, folds=5)
    assert Counter(record.split for record in first) == {"train": 24, "val": 6, "test": 10}
    assert "the given val split is divided into the folds" in caplog.text
    undealt = manifest_of({"ant": [1] * 20})
    first = assign_splits(undealt, SplitSettings(test=0.2), fold=0, folds=5)
    assert (
        assign_splits(
            undealt, SplitSettings(test=0.2), previous=replace(first, splits=np.zeros(20, np.int8)), fold=0, folds=5
        )
        == first
    )


def test_single_images_make_folds_equal():
    dealt = [
        assign_splits(manifest_of({"ant": [7, 5, 1, 1, 3] + [1] * 20}), SplitSettings(), fold=fold, folds=4)
        for fold in range(4)
    ]
    assert sorted(len(way.part("val")) for way in dealt) == [9, 9, 9, 10]


def test_a_test_part_leaves_two_clusters_for_the_folds():
    for fold in range(2):
        dealt = assign_splits(
            manifest_of({"ant": [1] * 9, "bee": [1] * 2}), SplitSettings(test=0.2), fold=fold, folds=2
        )
        assert Counter(record.split for record in dealt if record.label == "bee") == {"train": 1, "val": 1}


def test_a_class_with_fewer_groups_than_folds_is_named(caplog):
    assign_splits(manifest_of({"ant": [1] * 9, "bee": [4, 4]}), SplitSettings(), fold=0, folds=3)
    assert caplog.text.strip().endswith("too few distinct images to be in every fold: bee")


@pytest.mark.parametrize(
    ("fold", "folds", "word"),
    [(0, None, "data.folds"), (None, 5, "data.fold"), (5, 5, "0 to 4"), (-1, 5, "data.fold"), (0, 1, "2")],
)
def test_folds_that_cannot_be(fold, folds, word):
    with pytest.raises(ConfigError, match=word):
        check_folds(fold, folds)
    with pytest.raises(ConfigError, match=word):
        assign_splits(manifest_of({"ant": [1] * 9}), SplitSettings(), fold=fold, folds=folds)
