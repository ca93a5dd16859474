"""A run on folders that leak says what its figures are worth: on the terminal, in the report, in the bundle; and
`test` says it again.
"""

import json
import shutil
from pathlib import Path

import pytest

from image_classifier.bundle import read_bundle
from tests.conftest import QUICK, Command, MakeTree

SMALL = (
    "data=folder",
    "data.dir=tree",
    "data.image_size=16",
    "data.batch_size=4",
    *QUICK,
    "model.backbone.channels=[4,8]",
    "name=run",
)


@pytest.fixture(autouse=True)
def in_a_folder_whose_test_part_leaks(tmp_path: Path, make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(**{"train/cat": 12, "train/dog": 12, "test/cat": 3, "test/dog": 3})
    for label in ("cat", "dog"):
        shutil.copy(tmp_path / "tree/train" / label / "000.png", tmp_path / "tree/test" / label / "copy.png")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_leaked_and_clean_images_are_scored_apart(command: Command) -> None:
    answer = command("train", *SMALL, "trainer.max_epochs=1")
    assert answer.code == 0, answer.err
    assert "2 of 8 test images have a copy, a near-duplicate or an image of their group in train: " in answer.err
    assert "on 2 images that have a duplicate" in answer.out
    assert "on the 6 others: the score to trust" in answer.out
    leak = json.loads(Path("plots/run/test/metrics.json").read_text())["leak"]
    assert (leak["leaked"], leak["clean"]) == (2, 6)
    scores = read_bundle(Path("models/run")).info.metrics["test"]
    assert scores["accuracy_clean"] == leak["accuracy_clean"]
    assert 8 * scores["accuracy"] == pytest.approx(2 * leak["accuracy_leaked"] + 6 * leak["accuracy_clean"])
    assert "accuracy_clean" in Path("models/run/MODEL_CARD.md").read_text()
    assert "audit: leak 2 groups, 4 images" in Path("runs/run/train.log").read_text()

    again = command("test", "--checkpoint_name", "run", "--format", "json")
    assert json.loads(again.out)["leak"] == leak
    other = command("test", "--checkpoint_name", "run", "--test_dir", "tree/test")
    assert "on 2 images that are training images or near copies of one" in other.out
    bytes_only = command("test", "--checkpoint_name", "run", "--test_dir", "tree/test", "near_copies=false")
    assert "on 2 images that are training images, byte for byte" in bytes_only.out
