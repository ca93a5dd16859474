"""What `infer --output` never takes the place of."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from image_classifier.atomic_io import atomic_file
from image_classifier.errors import StorageError
from tests.conftest import Command


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `w` with a photo."""
    monkeypatch.chdir(trained)
    (tmp_path / "w").mkdir()
    shutil.copy(next(Path("data/digits/test/3").iterdir()), tmp_path / "w" / "pic.png")
    return tmp_path / "w"


def refused(command: Command, output: Path | str, *images: Path | str) -> str:
    """The one line that a run ends with before anything is loaded."""
    answer = command(
        "infer",
        "--checkpoint_name",
        "digits",
        "--format",
        "csv",
        "--output",
        str(output),
        "--images",
        *map(str, images),
    )
    assert answer.code == 2 and answer.out == "" and len(answer.err.splitlines()) == 1, answer.err
    return answer.err


def test_a_photo_that_is_asked_about_is_not_replaced(place: Path, command: Command) -> None:
    photo, content = place / "pic.png", (place / "pic.png").read_bytes()
    (place / "other.png").hardlink_to(photo)
    for output, images in (
        (photo, photo),
        (photo, place / "other.png"),
        (photo, place),
        (photo, place / "*.png"),
        (place / "new.png", place),
    ):
        assert "is among the images" in refused(command, output, images)
    assert photo.read_bytes() == content and sorted(os.listdir(place)) == ["other.png", "pic.png"]


def test_a_photo_that_only_a_table_names_is_not_replaced(place: Path, command: Command) -> None:
    content = (place / "pic.png").read_bytes()
    (place / "t.csv").write_text("path\npic.png\n")
    answer = command(
        "infer", "--checkpoint_name", "digits", "--output", str(place / "pic.png"), "--images", str(place / "t.csv")
    )
    assert answer.code == 2 and "is among the images" in answer.err
    assert (place / "pic.png").read_bytes() == content and not list(place.glob(".*.lock"))


def test_folders_devices_and_pipes_are_not_replaced(place: Path, command: Command) -> None:
    os.mkfifo(place / "pipe")
    for output, says in (
        (place, "is a folder"),
        (place / "pipe", "leave --output out"),
        ("/dev/null", "leave --output out"),
        ("/dev/stdout", "leave --output out"),
    ):
        assert says in refused(command, output, place / "pic.png")
    assert sorted(os.listdir(place)) == ["pic.png", "pipe"] and sorted(os.listdir(place.parent)) == ["w"]


@pytest.mark.parametrize("content", ["my notes", '{"model": 1}\n'])
def test_a_part_of_somebody_else_is_not_replaced(place: Path, command: Command, content: str) -> None:
    (place / "o.csv.part").write_text(content)
    assert "was not written by a stopped run" in refused(command, place / "o.csv", place / "pic.png")
    assert (place / "o.csv.part").read_text() == content and sorted(os.listdir(place)) == ["o.csv.part", "pic.png"]


def test_no_verb_replaces_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/stderr")):
        with pytest.raises(StorageError, match="is not a regular file"), atomic_file(path) as file:
            file.write(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")  # as DVC leaves them
    with atomic_file(tmp_path / "link") as file:
        file.write(b"x")
    assert (tmp_path / "link").read_bytes() == b"x" and sorted(os.listdir(tmp_path)) == ["link", "pipe"]
