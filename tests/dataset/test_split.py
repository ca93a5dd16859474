from __future__ import annotations

import hashlib
import io
import random
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from image_classifier.dataset.split import SplitSettings, assign_splits, join_groups
from image_classifier.errors import ConfigError, DataError
from image_classifier.manifest import SPLITS, Manifest, Record
from tests.dataset.manifests import (
    GIVEN,
    LABELS,
    MIXED,
    SETTINGS,
    SIZES,
    UNTIMED,
    assert_whole,
    clusters_of,
    deal,
    image,
    joined,
    manifest_of,
    mixed,
    trained_clusters,
)


@UNTIMED
@given(SIZES, SETTINGS)
def test_every_class_is_dealt_in_whole_clusters_to_within_one_cluster(sizes, settings):
    dealt = assign_splits(manifest_of(sizes), settings)
    assert_whole(dealt)
    counts = Counter((record.label, record.split) for record in dealt)
    trained = trained_clusters(dealt)
    for label, clusters in sizes.items():
        assert counts[label, "train"] >= 1
        for name, part in (("test", settings.test), ("val", settings.val)):
            held, asked = counts[label, name], part * sum(clusters)
            if part == 0:
                assert held == 0
            else:
                shown = len({record.group for record in dealt if (record.label, record.split) == (label, name)})
                assert held - asked <= max(clusters) / (1 if shown == 1 else 2) + 0.5  # one is shown whatever it holds
                assert (
                    asked - held <= max(clusters) / 2 + 0.5 or trained[label] == 1
                )  # the last cluster is kept back to train on
                assert held >= 1 or len(clusters) < 3
        if settings.val > 0:
            assert counts[label, "val"] >= 1


@UNTIMED
@given(SIZES, SETTINGS)
def test_single_images_fill_each_class_to_the_count(sizes, settings):
    dealt = assign_splits(
        manifest_of({label: clusters + [1] * 2 * sum(clusters) for label, clusters in sizes.items()}), settings
    )
    counts = Counter((record.label, record.split) for record in dealt)
    trained = trained_clusters(dealt)
    for label, clusters in sizes.items():
        for name, part in (("test", settings.test), ("val", settings.val)):
            if part and trained[label] > 1:
                assert counts[label, name] == max(1, int(part * 3 * sum(clusters) + 0.5))


@UNTIMED
@given(st.integers(5, 30), st.integers(0, 20))
def test_large_clusters_get_their_share_of_every_part(count, seed):
    dealt = assign_splits(
        manifest_of({"ant": [4] * count + [1] * 4 * count}), SplitSettings(val=0.2, test=0.2, seed=seed)
    )
    large = Counter(members[0].split for members in clusters_of(dealt).values() if len(members) > 1)
    assert abs(large["test"] - 0.2 * count) <= 0.5
    assert abs(large["val"] - 0.2 * count) <= 0.5


@UNTIMED
@given(st.lists(st.dictionaries(LABELS, st.integers(1, 9), min_size=1), min_size=1, max_size=30), SETTINGS)
def test_clusters_of_several_classes_are_dealt_to_within_one_cluster_overall(contents, settings):
    labels = sorted({label for content in contents for label in content})
    contents = [*contents, dict.fromkeys(labels, 1)]  # overall is a matter of classes that share clusters
    dealt = assign_splits(
        mixed(
            [(label, row) for row, content in enumerate(contents) for label in content for _ in range(content[label])]
        ),
        settings,
    )
    assert_whole(dealt)
    trained, half = trained_clusters(dealt), max(sum(content.values()) for content in contents) / 2 + 0.5
    enough = all(sum(label in content for content in contents) > 5 for label in labels)
    assert all(trained[label] >= 1 for label in labels)
    for name, part in (("test", settings.test), ("val", settings.val)):
        held = dealt.part(name)
        shown = Counter(label for label, _ in {(record.label, record.group) for record in held})
        if enough and part:
            assert set(shown) == set(labels)
        if len(held) - part * len(dealt) > half:  # only to show a class that nothing else shows
            assert 1 in shown.values()
        elif part * len(dealt) - len(held) > half:  # only to leave something to train on
            assert min(trained.values()) <= 2


@UNTIMED
@given(MIXED, SETTINGS, st.randoms(use_true_random=False))
def test_neither_order_nor_names_of_files_matter(images, settings, shuffler: random.Random):
    manifest = mixed(images)
    records = [replace(record, path=f"{shuffler.random()}.png") for record in manifest]
    shuffler.shuffle(records)
    for more in ({}, {"fold": 1, "folds": 3}):
        other = deal(Manifest.of(Path("elsewhere"), records), settings, **more)
        expected = {record.sha256: record.split for record in assign_splits(manifest, settings, **more)}
        assert {record.sha256: record.split for record in other} == expected


@UNTIMED
@given(SIZES, SIZES, SETTINGS)
def test_added_files_move_nothing(sizes, added, settings):
    first = assign_splits(manifest_of(sizes), settings)
    second = assign_splits(joined(manifest_of(added, "new"), manifest_of(sizes)), settings, previous=first)
    before = {record.path: record.split for record in first}
    assert {record.path: record.split for record in second if record.path in before} == before
    assert_whole(second)
    assert all(trained_clusters(second)[label] for label in {**sizes, **added})


@UNTIMED
@given(MIXED, SETTINGS, st.data())
def test_removed_files_move_nothing_that_train_can_spare(images, settings, data):
    first = deal(mixed(images), settings)
    stays = data.draw(st.lists(st.booleans(), min_size=len(first), max_size=len(first)))
    rest = first.take(np.flatnonzero(stays))
    second = deal(replace(rest, splits=np.full(len(rest), -1, np.int8)), settings, previous=first)
    assert_whole(second)
    bare = set(rest.classes) - set(rest.part("train").classes)
    moved = [(old, new) for old, new in zip(rest, second, strict=True) if old.split != new.split]
    assert all(new.split == "train" for _, new in moved)
    assert bool(moved) == bool(bare and (settings.val or settings.test))
    assert set(second.part("train").classes) == set(rest.classes)


@UNTIMED
@given(SIZES, SETTINGS, st.data())
def test_clusters_that_a_new_image_links_go_whole_where_the_earliest_was(sizes, settings, data):
    first = assign_splits(manifest_of(sizes), settings)
    linked = data.draw(st.lists(st.sampled_from(range(len(first))), min_size=1, max_size=4, unique=True))
    new = image(data.draw(st.sampled_from(first.classes)), "new")
    records = [*(replace(record, split="") for record in first), new]
    manifest = join_groups(
        Manifest.of(Path(), records),
        np.array(linked),
        np.full(len(linked), len(first)),
        [r.group for r in first] + [""],
    )
    second = deal(manifest, settings, previous=first)
    assert_whole(second)
    assert second[len(first)].split == min((first[row].split for row in linked), key=SPLITS.index)
    groups = {first[row].group for row in linked}
    assert all(old.split == now.split for old, now in zip(first, second, strict=False) if old.group not in groups)


def test_a_class_without_training_images_takes_one_back_from_val(caplog):
    first = assign_splits(manifest_of({"ant": [1] * 10, "bee": [1] * 10}), SplitSettings(val=0.2, test=0.2))
    rest = first.take(np.flatnonzero((first.targets == 0) | (first.splits > 0)))
    again = assign_splits(
        replace(rest, splits=np.full(len(rest), -1, np.int8)), SplitSettings(val=0.2, test=0.2), previous=first
    )
    assert Counter(record.split for record in again if record.label == "bee") == {"train": 1, "val": 1, "test": 2}
    assert caplog.text.strip().endswith("which would have none of bee")


def test_joining_clusters_of_different_parts_is_told(caplog):
    first = assign_splits(manifest_of({"ant": [1] * 10}), SplitSettings(val=0.2, test=0.2))
    ends = np.array([first.indices("test")[0]]), np.array([first.indices("val")[0]])
    undealt = replace(first, splits=np.full(len(first), -1, np.int8))
    again = assign_splits(join_groups(undealt, *ends), SplitSettings(val=0.2, test=0.2), previous=first)
    assert "1 groups join images that were in different splits" in caplog.text
    assert Counter(record.split for record in again) == {"train": 6, "val": 3, "test": 1}


@UNTIMED
@given(GIVEN, SETTINGS)
def test_given_parts_stay_and_nothing_more_is_torn(images, settings):
    manifest = Manifest.of(
        Path(), (image(label, f"{row}", f"group{cluster}", part) for row, (label, cluster, part) in enumerate(images))
    )
    dealt = deal(manifest, settings)
    assert -1 not in dealt.splits
    parts = {record.split for record in manifest}
    assert all(now.split == was.split for was, now in zip(manifest, dealt, strict=True) if was.split in ("val", "test"))
    for was, members in zip(clusters_of(manifest).values(), clusters_of(dealt).values(), strict=True):
        fixed = {record.split for record in was if record.split}
        if fixed - {"train"}:
            assert {record.split for record in members} == fixed
        else:
            assert len({record.split for record in members}) == 1
            assert members[0].split == "train" or members[0].split not in parts


def test_val_is_carved_out_of_what_test_has_no_part_in():
    train = [image("ant", f"a{row}", f"group{row}", "train") for row in range(20)]
    dealt = assign_splits(
        Manifest.of(Path(), train + [image("ant", f"b{row}", f"group{row}", "test") for row in range(12)]),
        SplitSettings(val=0.4),
    )
    assert dealt.indices("val").tolist() == list(range(12, 20))


def test_given_parts_are_completed():
    given_ = joined(manifest_of({"ant": [1] * 10}, "a", "train"), manifest_of({"ant": [1] * 5}, "b", "test"))
    dealt = assign_splits(given_, SplitSettings(val=0.2, test=0.5))
    assert Counter(record.split for record in dealt) == {"train": 8, "val": 2, "test": 5}
    complete = joined(given_, manifest_of({"ant": [1] * 3}, "c", "val"))
    assert assign_splits(complete, SplitSettings(val=0.2, test=0.5)) == complete


def test_one_image_a_cluster_is_exact():
    dealt = assign_splits(manifest_of({"ant": [1] * 50, "bee": [1] * 10}), SplitSettings(val=0.2, test=0.1))
    counts = Counter((record.label, record.split) for record in dealt)
    expected = {
        ("ant", "train"): 35,
        ("ant", "val"): 10,
        ("ant", "test"): 5,
        ("bee", "train"): 7,
        ("bee", "val"): 2,
        ("bee", "test"): 1,
    }
    assert counts == expected


@pytest.mark.parametrize(
    ("settings", "fingerprint"),
    [
        (SplitSettings(), "004decba56165ac6"),
        (SplitSettings(val=0.1, test=0.2, seed=7), "92fc7425297d7011"),
        (SplitSettings(val=0.16, test=0.2, seed=83), "a9bcf6eb08c959bc"),
        (SplitSettings(val=0.05, test=0.05, seed=2024), "2968bebd284ef67c"),
    ],
)
def test_images_without_copies_are_dealt_as_ever(settings, fingerprint):
    """The fingerprints are those of version 0.1.0, which dealt image by image: old splits can be made again."""
    counts = {"ant": 120, "bee": 57, "cat": 9, "dog": 3}
    manifest = Manifest.of(
        Path(), (image(label, f"{label}{number}") for label, count in counts.items() for number in range(count))
    )
    splits = ",".join(record.split for record in assign_splits(manifest, settings))
    assert hashlib.sha256(splits.encode()).hexdigest()[:16] == fingerprint


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        (
            SplitSettings(val=0.16, test=0.2, seed=83),
            {"train": 640, "val": 160, "test": 200},
        ),  # 80/20, and of the 80 again 80/20
        (SplitSettings(val=0.05, test=0.05, seed=2024), {"train": 900, "val": 50, "test": 50}),
    ],
)
def test_recipes_are_exact_in_every_class(settings, sizes):
    dealt = assign_splits(manifest_of({"ant": [1] * 1000, "bee": [1] * 1000}), settings)
    for label in dealt.classes:
        assert Counter(record.split for record in dealt if record.label == label) == sizes


def test_the_test_part_does_not_depend_on_the_val_part():
    manifest = manifest_of({"ant": [1] * 30 + [3] * 6})
    ways = [assign_splits(manifest, SplitSettings(val, 0.2)) for val in (0.0, 0.1, 0.3)]
    ways += [assign_splits(manifest, SplitSettings(0.2, 0.2), fold=fold, folds=3) for fold in range(3)]
    tests = [{record.path for record in dealt if record.split == "test"} for dealt in ways]
    assert all(test == tests[0] for test in tests)


def test_the_seed_matters():
    manifest = manifest_of({"ant": [1] * 50})
    assert assign_splits(manifest, SplitSettings(seed=0)) != assign_splits(manifest, SplitSettings(seed=1))


@pytest.mark.parametrize("seed", range(10))
def test_the_sum_of_classes_that_share_clusters_is_held_to_the_ratio(seed):
    """Ants come only with two bees each: where bees are full and ants lack, a cluster more helps the sum, though no
    class.
    """
    shared = [(label, cluster) for cluster in range(20) for label in ("ant", "bee", "bee")]
    dealt = assign_splits(
        mixed(shared + [("bee", cluster) for cluster in range(20, 60) for _ in range(2)]), SplitSettings(0.0, 0.3, seed)
    )
    assert abs(len(dealt.part("test")) - 0.3 * len(dealt)) <= 1.5 + 0.5


def test_twins_under_two_classes_stay_together():
    dealt = assign_splits(
        mixed([(label, cluster) for label in ("ant", "bee") for cluster in range(20)]), SplitSettings(val=0.3)
    )
    assert Counter((record.label, record.split) for record in dealt)["ant", "val"] == 6
    assert_whole(dealt)


def test_a_moved_file_is_still_the_same_picture_and_an_edited_one_still_in_its_place():
    first = assign_splits(manifest_of({"ant": [1] * 20}), SplitSettings())
    moved = Manifest.of(Path(), (replace(record, path=f"z/{record.path}", split="") for record in first))
    assert assign_splits(moved, SplitSettings(seed=7), previous=first).splits.tolist() == first.splits.tolist()
    edited = Manifest.of(
        Path(), (replace(image("ant", f"edited{row}"), path=record.path) for row, record in enumerate(first))
    )
    assert assign_splits(edited, SplitSettings(seed=7), previous=first).splits.tolist() == first.splits.tolist()


@pytest.mark.parametrize("clusters", [[1], [3]])
def test_a_class_with_one_image_cannot_be_split(clusters):
    manifest = manifest_of({"ant": [1] * 5, "bee": clusters})
    for more in ({}, {"fold": 0, "folds": 3}):
        with pytest.raises(DataError, match="'bee' has one distinct image"):
            assign_splits(manifest, SplitSettings(), **more)
    assert len(assign_splits(manifest, SplitSettings(val=0.0))) == 5 + sum(clusters)


def test_a_class_that_cannot_be_tested_is_named(caplog):
    assign_splits(manifest_of({"ant": [1] * 9, "bee": [1] * 2}), SplitSettings(val=0.2, test=0.2))
    assert "hold any out for test: bee" in caplog.text


@pytest.mark.parametrize(
    ("values", "key"),
    [({"val": -0.1}, "data.split.val"), ({"test": 1.0}, "data.split.test"), ({"val": 0.6, "test": 0.4}, "below 1")],
)
def test_settings_that_cannot_be(values, key):
    with pytest.raises(ConfigError, match=key):
        SplitSettings(**values)


def unpacked(archive: Path) -> tuple[Manifest, np.ndarray]:
    """The images of an archive, as if their folders gave no part, and their 16 x 16 thumbnails."""
    records, thumbnails = [], []
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg", ".png")):
                content = tar.extractfile(member).read()
                digest = hashlib.sha256(content).hexdigest()
                records.append(Record(member.name, Path(member.name).parent.name, "", digest[:16], digest, 1, 1))
                thumbnails.append(
                    np.asarray(
                        Image.open(io.BytesIO(content)).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
                    )
                )
    return Manifest.of(Path(), records), np.stack(thumbnails)


@pytest.fixture(scope="module")
def simpsons(shared_data: Path) -> Manifest:
    from image_classifier.dataset.duplicates import DuplicateSettings, find_near_duplicates

    manifest, thumbnails = unpacked(shared_data / "simpsons-mnist.tar.gz")
    twins = find_near_duplicates(thumbnails, DuplicateSettings())
    return join_groups(manifest, twins.first, twins.second)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [SplitSettings(val=0.16, test=0.2, seed=83), SplitSettings(val=0.05, test=0.05, seed=2024)]
)
def test_real_frames_of_one_shot_stay_in_one_part_and_recipes_hold(simpsons: Manifest, settings):
    dealt = assign_splits(simpsons, settings)
    assert len({record.group for record in simpsons}) < len(simpsons) - 500
    assert not dealt.leaked("val").any() and not dealt.leaked("test").any()
    sizes = Counter((record.label, record.split) for record in dealt)
    classes = Counter(record.label for record in dealt)
    largest = max(Counter(record.group for record in dealt).values())
    for label, count in classes.items():
        assert abs(sizes[label, "test"] - settings.test * count) <= largest
        assert abs(sizes[label, "val"] - settings.val * count) <= largest
    assert abs(len(dealt.part("test")) - settings.test * len(dealt)) <= largest
