from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_classifier.dataset.scan import load_test_manifest, scan
from image_classifier.errors import DataError, UnreadableImage
from tests.conftest import write_image


def splits(manifest) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for record in manifest:
        found.setdefault(record.split, set()).add(record.label)
    return found


def test_a_folder_per_class(tree):
    write_image(tree / "cat" / "kittens" / "deep" / "x.PNG", 99, size=7)
    manifest = scan(tree)
    assert manifest.classes == ("cat", "dog")
    assert len(manifest) == 21
    assert [record.path for record in manifest] == sorted(record.path for record in manifest)
    deep = next(record for record in manifest if record.path == "cat/kittens/deep/x.PNG")
    assert (deep.label, deep.split, deep.width, deep.height) == ("cat", "", 7, 7)
    assert deep.group == deep.sha256[:16]


def test_the_file_systems_order_does_not_matter(tree, monkeypatch):
    expected = scan(tree).records
    real = os.scandir

    class Reversed:
        def __init__(self, path):
            self.entries = real(path)

        def __enter__(self):
            return iter(sorted(self.entries, key=lambda entry: entry.name, reverse=True))

        def __exit__(self, *_):
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Reversed)
    assert scan(tree).records == expected


def test_litter_is_left_out(tree):
    expected = scan(tree).records
    write_image(tree / "__MACOSX" / "cat" / "a.png", 1)
    write_image(tree / ".hidden" / "a.png", 1)
    write_image(tree / "cat" / "._a.png", 1)
    write_image(tree / "stray.png", 1)
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "noextension"):
        (tree / "cat" / name).write_bytes(b"x")
    assert scan(tree).records == expected


@pytest.mark.parametrize("name", ["with space", "quote'\"", "-rf", "😀 名前", "percent%20", "a,b;c", "line\nbreak"])
def test_odd_names_work(make_tree, name):
    root = make_tree(cat=2)
    try:
        write_image(root / name / f"{name}.png", 5)
    except OSError:
        pytest.skip("this file system refuses the name")
    manifest = scan(root)
    assert name in manifest.classes
    assert all(manifest.file(record).exists() for record in manifest)


def test_names_that_are_not_utf8_work_for_files_but_not_for_classes(tree):
    odd = os.fsdecode(b"latin-\xe9")
    try:
        image = write_image(tree / "cat" / f"{odd}.png", 5)
    except OSError:
        pytest.skip("this file system refuses the name")
    assert any(record.path.endswith(f"{odd}.png") for record in scan(tree))
    (tree / odd).mkdir()
    image.rename(tree / odd / "a.png")
    with pytest.raises(DataError, match="is not UTF-8"):
        scan(tree)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "test"), {"train", "test"}),
        (("Training", "VALID", "Testing"), {"train", "val", "test"}),
        (("train", "validation"), {"train", "val"}),
        (("train",), {"train"}),
        (("train", "dev", "docs"), {"train", "val"}),  # docs is in no split
        (("val", "test"), {""}),  # no train part: two classes
    ],
)
def test_given_splits(tmp_path, folders, expected):
    for seed, folder in enumerate(folders):
        for label in ("cat", "dog"):
            write_image(tmp_path / folder / label / "a.png", seed * 2 + (label == "dog"))
    manifest = scan(tmp_path)
    assert {record.split for record in manifest} == expected
    assert manifest.classes == (("cat", "dog") if "train" in expected else ("test", "val"))


def test_train_may_be_a_class_of_trains(make_tree):
    manifest = scan(make_tree(train=2, bus=2))
    assert manifest.classes == ("bus", "train")
    assert splits(manifest) == {"": {"bus", "train"}}


def test_links_are_followed_but_not_in_circles(tree):
    (tree / "dog" / "circle").symlink_to(tree / "dog")
    (tree / "wolf").symlink_to(tree / "dog")
    assert scan(tree).classes == ("cat", "dog", "wolf")


@pytest.mark.parametrize(
    ("counts", "extra", "words"),
    [
        ({}, None, "holds no images"),
        ({"cat": 3}, None, "one class only"),
        ({"cat": 3, "dog": 3}, "bird", "'.*bird' holds no images"),
    ],
)
def test_a_folder_that_cannot_be_trained_on(tmp_path, make_tree, counts, extra, words):
    root = make_tree(**counts)
    root.mkdir(exist_ok=True)
    if extra:
        (root / extra).mkdir()
    with pytest.raises(DataError, match=words) as caught:
        scan(root)
    assert str(root) in str(caught.value)
    assert caught.value.hint


def test_images_without_class_folders(tmp_path):
    write_image(tmp_path / "a.png", 1)
    with pytest.raises(DataError, match="not in class folders"):
        scan(tmp_path)


def test_a_missing_folder(tmp_path):
    with pytest.raises(DataError, match="cannot read the folder"):
        scan(tmp_path / "none")


def test_a_class_that_only_the_test_part_has(tmp_path):
    for seed, path in enumerate(("train/cat/a.png", "train/dog/a.png", "test/cat/a.png", "test/wolf/a.png")):
        write_image(tmp_path / path, seed)
    with pytest.raises(DataError, match="'wolf', which the train part lacks"):
        scan(tmp_path)


def test_unreadable_images_are_reported_in_one_line(tree):
    for number in range(5):
        (tree / "cat" / f"bad{number}.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"5 images .*bad0.jpg.*bad1.jpg.*bad2.jpg.* and 2 more: delete") as caught:
        scan(tree)
    assert "\n" not in str(caught.value)
    for number in range(1, 5):
        (tree / "cat" / f"bad{number}.jpg").unlink()
    with pytest.raises(UnreadableImage, match="bad0.jpg"):
        scan(tree)


def test_the_test_part_of_a_tree_or_all_of_a_folder(tmp_path):
    for seed, path in enumerate(("train/cat/a.png", "train/dog/a.png", "test/cat/a.png")):
        write_image(tmp_path / path, seed)
    for root, path in ((tmp_path, "test/cat/a.png"), (tmp_path / "test", "cat/a.png")):
        manifest = load_test_manifest(root)
        assert [(record.path, record.label, record.split) for record in manifest] == [(path, "cat", "test")]


def test_size_is_upright(tree):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((4, 9, 3), np.uint8)).save(tree / "cat" / "turned.jpg", exif=exif)
    record = next(record for record in scan(tree) if record.path.endswith("turned.jpg"))
    assert (record.width, record.height) == (4, 9)


def test_equal_bytes_are_one_group(tree):
    shutil.copy(tree / "cat" / "000.png", tree / "dog" / "copy.png")
    groups = [record.group for record in scan(tree) if Path(record.path).name in ("000.png", "copy.png")]
    assert len(groups) == 3
    assert len(set(groups)) == 2
