"""What DVC tracks and is missing comes back by itself where a verb needs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Command

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # DVC's own


@pytest.fixture
def forgotten(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose model and labelled images are on its remote only."""
    from dvc.repo import Repo

    root = tmp_path / "repository"
    for digit in ("0", "1"):
        (root / "images" / digit).mkdir(parents=True)
        for file in sorted((trained / "data" / "digits" / "test" / digit).iterdir())[:2]:
            shutil.copy(file, root / "images" / digit)
    shutil.copytree(trained / "models" / "digits", root / "models" / "digits")
    monkeypatch.chdir(root)
    with Repo.init(str(root), no_scm=True) as repository, repository.config.edit() as config:
        config["core"] = {"no_scm": True, "remote": "store", "analytics": False}
        config["remote"] = {"store": {"url": str(tmp_path / "store")}}
    with Repo(str(root)) as repository:
        repository.add(["images", "models/digits"])
        repository.push()
    for path in (root / "images", root / "models" / "digits", root / ".dvc" / "cache"):
        shutil.rmtree(path)
    return root


def test_infer_pulls_the_model_and_the_images(forgotten: Path, command: Command) -> None:
    answer = command("infer", "--checkpoint_name", "digits", "--images", "images", "--format", "jsonl")
    assert answer.code == 0, answer.err
    assert len([json.loads(line) for line in answer.out.splitlines()]) == 4
    assert (forgotten / "models" / "digits" / "bundle.json").is_file()


def test_test_pulls_the_model_and_the_folder(forgotten: Path, command: Command) -> None:
    answer = command("test", "--checkpoint_name", "digits", "--test_dir", "images")
    assert answer.code == 0, answer.err
    assert "test images 4" in answer.out


def test_nothing_is_pulled_where_that_is_not_wanted(forgotten: Path, command: Command) -> None:
    answer = command("infer", "--checkpoint_name", "digits", "dvc=false", "--images", "images")
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert not (forgotten / "images").exists()


def test_train_pulls_its_images(forgotten: Path, command: Command) -> None:
    answer = command("prepare", "data=folder", "data.dir=images", "data.split.val=0.5")
    assert answer.code == 0, answer.err
    assert "4 images, 2 classes" in answer.err
