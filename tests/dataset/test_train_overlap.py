"""Which images of a folder to test on the model has seen: equal files, and those that show the same."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_classifier.dataset.train_overlap import exact_duplicates_of_train, near_duplicates_of_train
from image_classifier.images import DEFAULT_LIMITS
from tests.conftest import MakeTree, listed


@pytest.fixture
def folders(make_tree: MakeTree, tmp_path: Path) -> tuple[Path, Path]:
    """A training tree, and a folder with an equal file, two re-encoded copies (one mirrored) and one picture of its
    own.
    """
    train, mine = make_tree("train", cat=4, dog=4), make_tree("other", cat=1)
    (mine / "cat/000.png").rename(mine / "cat/own.png")
    Image.fromarray(np.random.default_rng(99).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(mine / "cat/own.png")
    shutil.copy(train / "cat/001.png", mine / "cat/equal.png")
    shrunk = Image.open(train / "dog/002.png").resize((48, 48), Image.Resampling.BICUBIC)
    shrunk.save(mine / "cat/larger.jpg", quality=95)
    shrunk.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mine / "cat/mirrored.jpg", quality=95)
    return train, mine


def test_copies_are_found_by_bytes_and_by_what_they_show(folders: tuple[Path, Path], tmp_path: Path) -> None:
    known, tested = (listed(folder) for folder in folders)
    known = replace(known, splits=np.zeros(len(known), np.int8))
    names = [Path(record.path).stem for record in tested]
    equal = exact_duplicates_of_train(tested, known)
    assert [name for name, seen in zip(names, equal, strict=True) if seen] == ["equal"]
    alike = near_duplicates_of_train(tested, known, DEFAULT_LIMITS, tmp_path / "store")
    assert [name for name, seen in zip(names, alike, strict=True) if seen] == ["equal", "larger", "mirrored"]
    assert np.array_equal(near_duplicates_of_train(tested, known, DEFAULT_LIMITS, tmp_path / "store"), alike)


def test_only_the_train_part_counts(folders: tuple[Path, Path], tmp_path: Path) -> None:
    known, tested = (listed(folder) for folder in folders)
    known = replace(known, splits=np.full(len(known), 2, np.int8))
    assert not exact_duplicates_of_train(tested, known).any()
    assert not near_duplicates_of_train(tested, known, DEFAULT_LIMITS, tmp_path / "store").any()


def test_training_images_that_are_gone_are_said(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known, tested = (listed(folder) for folder in folders)
    known = replace(known, splits=np.zeros(len(known), np.int8))
    shutil.rmtree(folders[0])
    with caplog.at_level(logging.INFO):
        assert not near_duplicates_of_train(tested, known, DEFAULT_LIMITS, tmp_path / "store").any()
    assert "no longer" in caplog.text
    assert exact_duplicates_of_train(tested, known).sum() == 1
