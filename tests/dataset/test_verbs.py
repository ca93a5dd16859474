"""The verbs `audit`, `prepare` and `clean` as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Command


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


LINE = ("data=folder", "data.dir=tree", "data.name=pets", "audit.few_images=0")


def directory() -> Path:
    (found,) = Path("data/audit").iterdir()
    return found


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_clean_folder_ends_with_0_and_leaves_its_images_alone(tree: Path, command: Command) -> None:
    before = files(tree)
    answer = command("audit", *LINE)
    assert answer.code == 0, answer.err
    assert json.loads((directory() / "audit.json").read_text())["findings"] == []
    assert files(directory()) == {"audit.json", "audit.html", "exclude.csv"}
    assert (directory() / "exclude.csv").read_text() == "path,reason\n"
    assert files(tree) == before


@pytest.mark.parametrize(("level", "code"), [("error", 1), ("warning", 1), ("null", 0)])
def test_findings_end_with_1_from_the_chosen_level_on(tree: Path, command: Command, level: str, code: int) -> None:
    (tree / "cat" / "000.png").write_bytes(b"")
    for _ in range(2):  # a finding is a fact, though its image is left out from now on
        assert command("audit", *LINE, f"audit.fail_on={level}").code == code
    assert (directory() / "exclude.csv").read_text().splitlines()[1].startswith("cat/000.png,audit: empty_file")


def test_classes_are_renamed_from_the_command_line(tree: Path, command: Command) -> None:
    (tree / "kitty").mkdir()
    for file in sorted((tree / "cat").iterdir())[:4]:
        file.rename(tree / "kitty" / file.name)
    for form in (["data.rename={kitty: cat}"], ["--data.rename", "{kitty: cat}"], ["++data.rename={kitty: cat}"]):
        answer = command("prepare", *LINE, *form)
        assert answer.code == 0, answer.err
        assert "20 images, 2 classes" in answer.err
    assert "did you mean 'kitty'" in command("prepare", *LINE, "data.rename={kity: cat}").err


@pytest.mark.parametrize("form", [["data.split.group=(\\d)\\d[.]png"], ["--data.split.group", "(\\d)\\d[.]png"]])
def test_a_pattern_of_keys_is_taken_to_the_letter(tree: Path, command: Command, form: list[str]) -> None:
    answer = command("prepare", *LINE, *form)
    assert answer.code == 2  # one key for all
    assert "one group of them" in answer.err


def test_a_row_that_names_no_image_is_said(tree: Path, command: Command) -> None:
    Path("exclude.csv").write_text("path,reason\ncat/typo.png,blurred\n")
    assert "there is no image 'cat/typo.png'" in command("prepare", *LINE, "data.exclude_path=exclude.csv").err


def test_a_warning_is_no_error(tree: Path, command: Command) -> None:
    shutil.copy(tree / "cat" / "000.png", tree / "cat" / "copy.png")
    assert command("audit", *LINE).code == 0
    answer = command("audit", *LINE, "audit.fail_on=warning")
    assert answer.code == 1
    assert "exact_duplicates" in answer.out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("does not exist", ("data.dir=nowhere",)),
        ("audit.fail_on", (*LINE[1:], "audit.fail_on=never")),
        ("audit.exclude", (*LINE[1:], "audit.exclude=[ugly]")),
        ("data.limits", (*LINE[1:], "data.limits.formats=[SVG]")),
        ("data.duplicates.threshold", (*LINE[1:], "data.duplicates.threshold=2")),
        ("data.folds", (*LINE[1:], "data.fold=0")),
    ],
)
@pytest.mark.parametrize("verb", ["audit", "prepare"])
def test_what_cannot_be_is_one_line(tree: Path, command: Command, verb: str, words: str, line: tuple[str, ...]) -> None:
    answer = command(verb, "data=folder", *line)
    assert answer.code == 2
    assert words in answer.err
    assert answer.err.count("\n") == 1


def test_prepare_fails_on_findings_only_where_asked(tree: Path, command: Command) -> None:
    shutil.copy(tree / "cat" / "000.png", tree / "dog" / "copy.png")
    answer = command("prepare", *LINE)
    assert answer.code == 0
    assert "label_conflict" in answer.err
    answer = command("prepare", *LINE, "audit.fail_on=error")
    assert answer.code == 2
    assert "audit.json" in answer.err


def test_copies_are_found_though_the_one_they_were_compared_with_is_left_out(tree: Path, command: Command) -> None:
    for suffix in ("bmp", "tiff", "webp"):
        with Image.open(tree / "cat" / "000.png") as image:
            image.save(tree / "cat" / f"000.{suffix}", lossless=True)
    Path("exclude.csv").write_text("path,reason\ncat/000.bmp,no\n")
    assert command("audit", *LINE, "data.exclude_path=exclude.csv").code == 0
    (finding,) = json.loads((directory() / "audit.json").read_text())["findings"]
    assert finding["kind"] == "near_duplicates"
    assert [file["path"] for file in finding["files"]] == ["cat/000.png", "cat/000.tiff", "cat/000.webp"]


def test_clean_removes_the_cache_and_nothing_else(tree: Path, command: Command) -> None:
    assert command("prepare", *LINE).code == 0
    before = files(Path())
    answer = command("clean", "--dry_run")
    assert answer.out.startswith("would remove")
    assert files(Path()) == before
    answer = command("clean")
    assert answer.code == 0
    assert answer.out.startswith("removed")
    assert files(Path()) == {name for name in before if not name.startswith("data/cache")}
    assert command("clean").out.startswith("nothing to remove")


def test_clean_leaves_a_folder_alone_that_is_no_cache(tree: Path, command: Command) -> None:
    before = files(tree)
    answer = command("clean", "--cache_dir", "tree")
    assert answer.code == 2
    assert "not a cache" in answer.err
    assert files(tree) == before


def test_clean_leaves_what_others_keep_in_the_folder(tree: Path, command: Command) -> None:
    for name in ("mine/thesis.txt", "mine/photos/1.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("mine")
    assert command("prepare", *LINE, "data.cache.dir=mine").code == 0
    assert command("clean", "--cache_dir", "mine").code == 0
    assert files(Path("mine")) == {"CACHEDIR.TAG", "thesis.txt", "photos", "photos/1.jpg"}


def test_clean_waits_for_nobody(tree: Path, command: Command) -> None:
    from image_classifier.atomic_io import file_lock

    assert command("prepare", *LINE).code == 0
    (lock,) = Path("data/cache/facts").glob("*/lock")
    with file_lock(lock):
        answer = command("clean")
    assert answer.code == 2
    assert "a run is writing" in answer.err
    assert lock.is_file()
