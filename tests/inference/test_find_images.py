"""What --images can name."""

import io
from pathlib import Path

import pytest

from image_classifier.errors import DataError
from image_classifier.inference.infer import find_images


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "sub/c.webp", "sub/.hidden.png", "notes.txt", "-dash.png", "with space.png", "a[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(items: list[str], stdin: str = "") -> list[str]:
    return [path.name for path in find_images(items, io.StringIO(stdin))]


def test_folders_are_searched_in_sorted_order_without_hidden_and_other_files(tree: Path) -> None:
    assert names([str(tree)]) == ["-dash.png", "a.JPG", "a[1].png", "b.png", "c.webp", "with space.png"]


def test_files_globs_and_lists(tree: Path) -> None:
    assert names([str(tree / "notes.txt")]) == ["notes.txt"]  # a file that is named is tried, whatever its suffix
    assert names([str(tree / "*.png")]) == ["-dash.png", "a[1].png", "b.png", "with space.png"]
    assert names([str(tree / "**" / "*.webp")]) == ["c.webp"]
    assert names([str(tree / "a[1].png")]) == ["a[1].png"]  # an existing file is never a pattern
    assert names(["-"], "one.png\r\ntwo three.png\n\n") == ["one.png", "two three.png"]
    assert names([str(tree / "missing.png")]) == ["missing.png"]  # becomes a row with an error


@pytest.mark.parametrize("item", ["*.gif", ""])
def test_nothing_found_is_an_error(tree: Path, item: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "empty").mkdir()
    monkeypatch.chdir(tree / "empty")
    with pytest.raises(DataError, match="holds no image"):
        names([item or "."])
    with pytest.raises(DataError, match="no image to answer"):
        names(["-"])
