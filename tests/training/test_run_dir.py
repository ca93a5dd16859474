"""A run claims its name alone, and leaves nothing behind when it never began."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from image_classifier.errors import ConfigError, StorageError
from image_classifier.training.run_dir import RunSettings, acquire_run_dir, provenance


def claim(root: Path, name: str | None = None, overwrite: bool = False):  # type: ignore[no-untyped-def]
    folders = {f"{kind}_dir": str(root / kind) for kind in ("runs", "models", "plots")}
    return acquire_run_dir(RunSettings(name=name, overwrite=overwrite, **folders), "digits-convnet")


def test_unnamed_runs_are_numbered_even_when_they_run_at_once(tmp_path: Path) -> None:
    with ExitStack() as stack:
        names = [stack.enter_context(claim(tmp_path)).name for _ in range(3)]
    assert names == ["digits-convnet", "digits-convnet-2", "digits-convnet-3"]


def test_a_run_that_fails_before_a_checkpoint_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claim(tmp_path) as run:
        raise RuntimeError
    assert not run.directory.exists()
    with pytest.raises(RuntimeError), claim(tmp_path) as run:
        (run.directory / "checkpoints").mkdir()
        (run.directory / "checkpoints" / "last.ckpt").touch()
        raise RuntimeError
    assert (run.directory / "train.log").exists()


def test_a_name_that_exists_is_refused_unless_overwritten(tmp_path: Path) -> None:
    with claim(tmp_path, "mine") as run:
        run.bundle.mkdir()
    with pytest.raises(StorageError, match="overwrite=true"), claim(tmp_path, "mine"):
        pass
    with claim(tmp_path, "mine", overwrite=True) as run:
        assert run.bundle.exists()  # the old one stays until the new one takes its place


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "", "x" * 200])
def test_a_name_that_cannot_be_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="invalid name="), claim(tmp_path, name):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    with pytest.raises(StorageError), claim(tmp_path):
        pass


def test_provenance_says_where_a_result_came_from() -> None:
    facts = provenance(3, manifest_sha256="abc")
    assert facts["seed"] == 3 and facts["manifest_sha256"] == "abc" and facts["packages"]["torch"]


def test_a_run_that_fails_gives_the_old_one_back(tmp_path: Path) -> None:
    with claim(tmp_path, "mine") as run:
        (run.directory / "checkpoints").mkdir()
        (run.directory / "checkpoints" / "best.ckpt").write_text("good")
    with pytest.raises(RuntimeError), claim(tmp_path, "mine", overwrite=True):
        raise RuntimeError
    assert (run.directory / "checkpoints" / "best.ckpt").read_text() == "good"
    assert [path.name for path in run.directory.parent.iterdir() if path.is_dir()] == ["mine"]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_an_impossible_seed_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match="seed"):
        RunSettings(seed=seed)


def test_a_run_that_is_under_way_cannot_be_overwritten(tmp_path: Path) -> None:
    with claim(tmp_path, "mine") as run:
        with pytest.raises(StorageError, match="in progress"), claim(tmp_path, "mine", overwrite=True):
            pass
        assert (run.directory / "train.log").exists()
        run.bundle.mkdir()
    with claim(tmp_path, "mine", overwrite=True):
        pass
