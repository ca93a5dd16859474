"""Finding a checkpoint by name, and a bundle that notices damage."""

import errno
import json
import os
from pathlib import Path

import pytest

from image_classifier.bundle import BundleInfo, find_checkpoint, read_bundle, seal
from image_classifier.errors import CheckpointError
from tests.conftest import Command


def make_bundle(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "model.onnx").write_bytes(b"weights")
    seal(directory, BundleInfo(directory.name, ("a", "b"), {"size": 8}, {}, {}, {}))
    return directory


@pytest.mark.parametrize(
    "name", ["digits", "team/digits", "model_val_loss=1.12.ckpt", "model_val_loss=1.12", "net.onnx", "net"]
)
def test_found_by_name_or_path(tmp_path: Path, name: str) -> None:
    make_bundle(tmp_path / "team" / "digits")
    for file in ("model_val_loss=1.12.ckpt", "net.onnx"):
        (tmp_path / file).touch()
    found = find_checkpoint(name, tmp_path)
    assert found.exists()
    assert find_checkpoint(str(found), Path("elsewhere")) == found


def test_files_inside_a_bundle_are_not_checkpoints_of_their_own(tmp_path: Path) -> None:
    make_bundle(tmp_path / "digits")
    make_bundle(tmp_path / "digits" / "mlflow" / "artifacts" / "bundle")
    (tmp_path / "digits" / "triton" / "digits" / "1").mkdir(parents=True)
    (tmp_path / "digits" / "triton" / "digits" / "1" / "model.onnx").touch()
    for name in ("model.onnx", "model", "bundle"):
        with pytest.raises(CheckpointError, match=f"there is no checkpoint '{name}' .*there are digits$"):
            find_checkpoint(name, tmp_path)
    assert find_checkpoint("digits", tmp_path) == tmp_path / "digits"


def test_a_name_that_exists_twice_lists_both(tmp_path: Path) -> None:
    first, second = make_bundle(tmp_path / "a" / "digits"), make_bundle(tmp_path / "b" / "digits")
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint("digits", tmp_path)
    assert str(first) in str(caught.value) and str(second) in str(caught.value)
    make_bundle(tmp_path / "digits")
    assert find_checkpoint("digits", tmp_path) == tmp_path / "digits"  # the exact path wins over deeper ones


def test_a_missing_name_suggests_the_nearest(tmp_path: Path) -> None:
    make_bundle(tmp_path / "digits-convnet")
    with pytest.raises(CheckpointError, match="did you mean digits-convnet"):
        find_checkpoint("digit-convnet", tmp_path)
    with pytest.raises(CheckpointError, match="train one first"):
        find_checkpoint("digits", tmp_path / "empty")


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    bundle = read_bundle(make_bundle(tmp_path / "digits"))
    bundle.verify()
    (tmp_path / "digits" / "model.onnx").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="model.onnx .* is damaged"):
        bundle.verify()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema_version": 1}'])
def test_a_broken_bundle_json_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "bundle.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not a bundle"):
        read_bundle(tmp_path)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    directory = make_bundle(tmp_path / "digits")
    content = json.loads((directory / "bundle.json").read_text())
    (directory / "bundle.json").write_text(json.dumps({**content, "schema_version": 99}))
    with pytest.raises(CheckpointError, match="update image_classifier"):
        read_bundle(directory)


def test_a_folder_that_is_closed_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    closed = make_bundle(tmp_path / "digits")
    stat = Path.stat

    def refused(self: Path, **words: bool) -> os.stat_result:
        if self.parent == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return stat(self, **words)

    monkeypatch.setattr(Path, "stat", refused)
    for name in (str(closed), "digits"):
        answer = command("verify", name, "--models_dir", str(tmp_path))
        assert answer.code == 2 and answer.out == ""
        assert (
            answer.err.startswith("error: ")
            and len(answer.err.strip().splitlines()) == 1
            and "Permission denied" in answer.err
        )


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(make_bundle(tmp_path / "digits"))

    def refused(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(CheckpointError, match=r"model\.onnx' cannot be read \(Input/output error\)"):
        bundle.verify()


@pytest.mark.parametrize("verb", [("verify",), ("infer", "--images", "a.png", "--checkpoint_name")])
def test_a_name_that_no_file_can_have(command: Command, verb: tuple[str, ...]) -> None:
    answer = command(*verb, "x" * 300)
    assert (
        answer.code == 2
        and "File name too long" in answer.err
        and len(answer.err.strip().splitlines()) == 1
        and len(answer.err) < 300
    )
