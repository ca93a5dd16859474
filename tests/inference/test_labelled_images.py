"""`test --test_dir`: what is no labelled folder is refused in one line, with the command that fits, and that command
works.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.conftest import PROGRAM, Answer, Command


@pytest.fixture(autouse=True)
def in_a_folder_of_ones_own(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained / "models/digits", tmp_path / "models/digits")
    monkeypatch.chdir(tmp_path)


def digits(trained: Path, label: str, count: int = 3) -> list[Path]:
    return sorted((trained / "data/digits/test" / label).iterdir())[:count]


def fill(folder: Path, images: list[Path]) -> Path:
    folder.mkdir(parents=True)
    for image in images:
        shutil.copy(image, folder / image.name)
    return folder


def refused(answer: Answer, *says: str) -> str:
    """The one line of a refusal."""
    assert answer.code == 2 and answer.out == "" and answer.err.count("\n") == 1, answer.err
    for text in says:
        assert text in answer.err
    return answer.err.strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["holiday", "Ferien über Bäume, 2024's [1]", "-dash", "deep/er/one/"])
def test_unlabelled_images_are_for_infer_and_the_line_can_be_copied(command: Command, trained: Path, name: str) -> None:
    fill(Path(name), digits(trained, "3"))
    line = refused(
        command("test", "--checkpoint_name", "digits", f"--test_dir={name}"),
        "have no labels",
        f"{PROGRAM} infer",
    )
    words = shlex.split(line[line.index(PROGRAM) :])[2:]
    answer = command(*words, "--format", "jsonl")
    assert answer.code == 0, answer.err
    assert len(answer.out.splitlines()) == 3


def test_one_image_is_for_infer(command: Command, trained: Path) -> None:
    fill(Path("one"), digits(trained, "3", 1))
    image = next(Path("one").iterdir())
    refused(
        command("test", "--checkpoint_name", "digits", "--test_dir", str(image)), "is one image", f"--images {image}"
    )
    refused(command("test", "--checkpoint_name", "digits", "--test_dir", "one"), "have no labels", "--images one")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["mine", pytest.param("./mine/", marks=pytest.mark.slow), pytest.param("../{}/mine", marks=pytest.mark.slow)],
)
def test_a_folder_that_is_one_class_is_tested_by_the_folder_that_holds_it(
    command: Command, trained: Path, tmp_path: Path, name: str
) -> None:
    fill(Path("mine/7"), digits(trained, "7"))
    line = refused(
        command("test", "--checkpoint_name", "digits", "--test_dir", "mine/7/"),
        "is the single class '7'",
        "--test_dir mine",
    )
    assert f"(or classify them with: {PROGRAM} infer --checkpoint_name digits --images mine/7)" in line
    assert command(*shlex.split(line[line.index(PROGRAM) : line.index(" (or")])[2:]).code == 0
    answer = command(
        "test", "--checkpoint_name", "digits", "--test_dir", name.format(tmp_path.name), "--format", "json"
    )
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["num_images"] == 3
    (place,) = Path("plots/digits").glob("test-mine-*")
    assert re.fullmatch("test-mine-[0-9a-f]{8}", place.name) and (place / "metrics.json").is_file()


@pytest.mark.slow
def test_folders_of_one_name_do_not_overwrite_one_another(command: Command, trained: Path) -> None:
    for place, label, count in (("first", "3", 2), ("second", "4", 3)):
        fill(Path(place, "mine", label), digits(trained, label, count))
        for test_dir, more in (
            (f"{place}/mine", ()),
            (str(Path(place, "mine").resolve()), ("--robustness", "--robustness_images", "2")),
        ):
            assert command("test", "--checkpoint_name", "digits", "--test_dir", test_dir, *more).code == 0
    places = sorted(Path("plots/digits").glob("test-mine-*"))
    assert sorted(json.loads((place / "metrics.json").read_text())["num_images"] for place in places) == [2, 3]
    assert (
        all((place / "robustness.json").is_file() for place in places)
        and not Path("plots/digits/robustness.json").exists()
    )


def test_a_class_that_the_model_does_not_know_is_named(command: Command, trained: Path) -> None:
    fill(Path("mine/3"), digits(trained, "3"))
    fill(Path("mine/three"), digits(trained, "3"))
    fill(Path("mine/07"), digits(trained, "7"))
    refused(
        command("test", "--checkpoint_name", "digits", "--test_dir", "mine"),
        "does not know ('07', 'three')",
        "is '07' '7'?",
        "0, 1, 2",
    )


def test_folders_that_are_no_classes_are_taken_for_unlabelled_images(command: Command, trained: Path) -> None:
    fill(Path("camera/2024"), digits(trained, "3"))
    fill(Path("camera/2025"), digits(trained, "4"))
    refused(
        command("test", "--checkpoint_name", "digits", "--test_dir", "camera"),
        "no folder in 'camera' is a class",
        "--images camera",
    )


def test_what_is_missing_empty_or_no_folder_is_said(command: Command, trained: Path) -> None:
    ask = ("test", "--checkpoint_name", "digits", "--test_dir")
    refused(command(*ask, "nowhere"), "there is no folder 'nowhere'", str(Path.cwd()))
    Path("empty/3").mkdir(parents=True)
    refused(command(*ask, "empty"), "holds no images")
    refused(command(*ask, "empty/3"), "holds no images")
    Path("notes.txt").write_text("3")
    refused(command(*ask, "notes.txt"), "is not a folder", "sub-folder per class")


def test_an_unreadable_image_is_named(command: Command, trained: Path) -> None:
    fill(Path("mine/3"), digits(trained, "3"))
    Path("mine/3/bröken one.png").write_bytes(b"not an image")
    refused(command("test", "--checkpoint_name", "digits", "--test_dir", "mine"), "bröken one.png", "delete or replace")


@pytest.mark.slow
def test_images_beside_the_classes_are_left_out_and_said(command: Command, trained: Path) -> None:
    fill(Path("mine/3"), digits(trained, "3"))
    shutil.copy(digits(trained, "4")[0], "mine/stray.png")
    answer = command("test", "--checkpoint_name", "digits", "--test_dir", "mine")
    assert answer.code == 0 and "1 images next to the class folders" in answer.err and "test images 3" in answer.out


@pytest.mark.slow
def test_one_labelled_image_is_enough(command: Command, trained: Path) -> None:
    fill(Path("mine/3"), digits(trained, "3", 1))
    answer = command("test", "--checkpoint_name", "digits", "--test_dir", "mine")
    assert answer.code == 0, answer.err
    assert "test images 1" in answer.out
