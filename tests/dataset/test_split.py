from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.dataset.split import SplitSettings, assign_splits
from image_classifier.errors import ConfigError, DataError
from image_classifier.records import SPLITS, Manifest, Record

RATIOS = st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.33, 0.45])
SETTINGS = st.builds(SplitSettings, val=RATIOS, test=RATIOS, seed=st.integers(0, 5))


def manifest_of(sizes: dict[str, list[int]], tag: str = "", split: str = "") -> Manifest:
    """Per class the sizes of its groups of exact duplicates."""
    records = [
        Record(f"{split}{label}/{tag}{group}-{copy}.png", label, split, f"{label}{tag}{group}", f"{label}{tag}{group}", 1, 1)
        for label, groups in sizes.items()
        for group, size in enumerate(groups)
        for copy in range(size)
    ]
    return Manifest(Path("root"), tuple(records))


def joined(*manifests: Manifest) -> Manifest:
    return Manifest(Path("root"), tuple(record for manifest in manifests for record in manifest))


SIZES = st.dictionaries(st.sampled_from(["ant", "bee", "cat"]), st.lists(st.integers(1, 4), min_size=2, max_size=30), min_size=1)


@given(SIZES, SETTINGS)
def test_stratified_whole_groups_and_something_to_train_on(sizes, settings):
    dealt = assign_splits(manifest_of(sizes), settings)
    counts = Counter((record.label, record.split) for record in dealt)
    assert {record.split for record in dealt} <= set(SPLITS)
    for label, groups in sizes.items():
        assert counts[label, "train"] >= 1
        for name, part in (("test", settings.test), ("val", settings.val)):
            if part == 0:
                assert counts[label, name] == 0
            elif len(groups) > 6:  # fewer cannot always be parted so
                assert abs(counts[label, name] - part * sum(groups)) <= max(groups)
        if settings.val > 0:
            assert counts[label, "val"] >= 1
    assert all(len({record.split for record in dealt if record.group == group}) == 1 for group in {record.group for record in dealt})


@given(SIZES, SETTINGS, st.randoms(use_true_random=False))
def test_neither_order_nor_names_matter(sizes, settings, shuffler: random.Random):
    manifest = manifest_of(sizes)
    records = [replace(record, path=f"{shuffler.random()}.png") for record in manifest]
    shuffler.shuffle(records)
    other = assign_splits(Manifest(Path("elsewhere"), tuple(records)), settings)
    assert {record.group: record.split for record in other} == {record.group: record.split for record in assign_splits(manifest, settings)}


@given(SIZES, SIZES, SETTINGS)
def test_added_files_move_nothing(sizes, added, settings):
    first = assign_splits(manifest_of(sizes), settings)
    second = assign_splits(joined(manifest_of(added, "new"), manifest_of(sizes)), settings, previous=first)
    before = {record.path: record.split for record in first}
    assert {record.path: record.split for record in second if record.path in before} == before
    assert all(Counter((record.label, record.split) for record in second)[label, "train"] for label in {**sizes, **added})


def test_one_image_a_group_is_exact():
    dealt = assign_splits(manifest_of({"ant": [1] * 50, "bee": [1] * 10}), SplitSettings(val=0.2, test=0.1))
    counts = Counter((record.label, record.split) for record in dealt)
    assert counts == {
        ("ant", "train"): 35,
        ("ant", "val"): 10,
        ("ant", "test"): 5,
        ("bee", "train"): 7,
        ("bee", "val"): 2,
        ("bee", "test"): 1,
    }


def test_the_test_part_does_not_depend_on_the_val_part():
    manifest = manifest_of({"ant": [1] * 50})
    tests = [{r.path for r in assign_splits(manifest, SplitSettings(val, 0.2)) if r.split == "test"} for val in (0.0, 0.1, 0.3)]
    assert tests[0] == tests[1] == tests[2]


def test_the_seed_matters():
    manifest = manifest_of({"ant": [1] * 50})
    assert assign_splits(manifest, SplitSettings(seed=0)).records != assign_splits(manifest, SplitSettings(seed=1)).records


def test_given_splits_stay():
    given_ = joined(manifest_of({"ant": [1] * 10}, "a", "train"), manifest_of({"ant": [1] * 5}, "b", "test"))
    dealt = assign_splits(given_, SplitSettings(val=0.2, test=0.5))
    assert Counter(record.split for record in dealt) == {"train": 8, "val": 2, "test": 5}
    complete = joined(given_, manifest_of({"ant": [1] * 3}, "c", "val"))
    assert assign_splits(complete, SplitSettings(val=0.2, test=0.5)).records == complete.records


def test_twins_under_two_classes_stay_together():
    records = [Record(f"{label}/{i}.png", label, "", f"g{i}", f"g{i}", 1, 1) for label in ("ant", "bee") for i in range(20)]
    dealt = assign_splits(Manifest(Path(), tuple(records)), SplitSettings(val=0.3))
    assert Counter((r.label, r.split) for r in dealt)["ant", "val"] == 6
    assert all(len({r.split for r in dealt if r.group == f"g{i}"}) == 1 for i in range(20))


def test_a_moved_file_is_still_the_same_picture():
    first = assign_splits(manifest_of({"ant": [1] * 20}), SplitSettings())
    moved = Manifest(Path(), tuple(replace(record, path=f"z/{record.path}", split="") for record in first))
    again = assign_splits(moved, SplitSettings(seed=7), previous=first)
    assert [record.split for record in again] == [record.split for record in first]


@pytest.mark.parametrize("groups", [[1], [3]])
def test_a_class_with_one_image_cannot_be_split(groups):
    manifest = manifest_of({"ant": [1] * 5, "bee": groups})
    with pytest.raises(DataError, match="'bee' has one distinct image"):
        assign_splits(manifest, SplitSettings())
    assert len(assign_splits(manifest, SplitSettings(val=0.0))) == 5 + sum(groups)


@pytest.mark.parametrize(
    ("values", "key"), [({"val": -0.1}, "data.split.val"), ({"test": 1.0}, "data.split.test"), ({"val": 0.6, "test": 0.4}, "below 1")]
)
def test_settings_that_cannot_be(values, key):
    with pytest.raises(ConfigError, match=key):
        SplitSettings(**values)
