"""Discovery of tables, of tables and folders together, and of what is tested on."""

from __future__ import annotations

from pathlib import Path

import pytest

from image_classifier.dataset.discovery import discover, discover_test
from image_classifier.errors import DataError
from tests.dataset.test_discovery import labels, touch

# Tables


def test_tables_and_folders_together(tmp_path):
    touch(tmp_path, "a/cat/1.png", "pictures/1.png", "pictures/2")
    (tmp_path / "t.csv").write_text("path,label,split,who\npictures/1.png,cat,test,ann\npictures/2,dog,,bob\n")
    found = discover([tmp_path / "a", tmp_path / "t.csv"], {"dog": "cat"}, group_column="who")
    assert found.root == tmp_path
    assert [(image.path, image.label, image.split, image.key) for image in found.images] == [
        ("a/cat/1.png", "cat", "", ""),
        ("pictures/1.png", "cat", "test", "ann"),
        ("pictures/2", "cat", "", "bob"),
    ]
    assert all(image.size == (tmp_path / image.path).stat().st_size for image in found.images)


def test_a_table_alone_starts_from_its_folder_or_from_what_its_files_have_in_common(tmp_path, monkeypatch):
    touch(tmp_path, "t/in/1.png", "out/2.png")
    (tmp_path / "t/a.csv").write_text("path,label\nin/1.png,cat\n")
    (tmp_path / "t/b.csv").write_text(f"path,label\nin/1.png,cat\n{tmp_path}/out/2.png,dog\n")
    (tmp_path / "t/c.csv").write_text("path,label\n../out/2.png,dog\n")
    assert (discover([tmp_path / "t/a.csv"]).root, labels(discover([tmp_path / "t/a.csv"]))) == (
        tmp_path / "t",
        {"in/1.png": "cat"},
    )
    assert (discover([tmp_path / "t/b.csv"]).root, labels(discover([tmp_path / "t/b.csv"]))) == (
        tmp_path,
        {"t/in/1.png": "cat", "out/2.png": "dog"},
    )
    assert labels(discover([tmp_path / "t/c.csv"])) == {"out/2.png": "dog"}
    monkeypatch.chdir(tmp_path / "t")
    assert discover([Path("a.csv")]).root == Path(".")
    assert discover([Path("b.csv")]).root == Path("..")


def test_an_image_given_by_two_sources_is_refused(tmp_path):
    touch(tmp_path, "a/cat/1.png")
    (tmp_path / "t.csv").write_text("path,label\na/cat/1.png,dog\n")
    with pytest.raises(DataError, match=r"1.png' is given twice"):
        discover([tmp_path / "a", tmp_path / "t.csv"])


def test_a_class_of_a_table_must_be_utf8_too(tmp_path):
    touch(tmp_path, "1.png")
    (tmp_path / "t.csv").write_bytes(b"path,label\n1.png,\xe9\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        discover([tmp_path / "t.csv"])


# What to test on


def test_the_test_part_of_a_tree_or_all_of_a_folder(tmp_path):
    touch(tmp_path, "train/cat/a.png", "train/dog/a.png", "test/cat/a.png")
    for root, path in ((tmp_path, "test/cat/a.png"), (tmp_path / "test", "cat/a.png")):
        found = discover_test([root])
        assert [(image.path, image.label, image.split) for image in found.images] == [(path, "cat", "test")]


def test_a_test_part_without_a_train_part_is_one_all_the_same(tmp_path):
    touch(tmp_path, "val/cat/a.png", "Testing/cat/a.png")
    assert labels(discover_test([tmp_path])) == {"Testing/cat/a.png": "cat"}


def test_one_test_part_among_several_roots_is_all_that_is_tested(tmp_path):
    touch(tmp_path, "a/train/cat/1.png", "a/test/cat/1.png", "b/cat/1.png", "1.png", "2.png")
    (tmp_path / "t.csv").write_text("path,label,split\n1.png,cat,test\n2.png,cat,train\n")
    assert set(labels(discover_test([tmp_path / "a", tmp_path / "b"]))) == {"a/test/cat/1.png"}
    assert set(labels(discover_test([tmp_path / "b", tmp_path / "t.csv"]))) == {"1.png"}
    assert {image.split for image in discover_test([tmp_path / "b"], {"other": "x"}).images} == {"test"}
