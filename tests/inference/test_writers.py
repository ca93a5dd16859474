"""What answers are written as, when they are no answers, and where the images are sorted to."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.errors import ConfigError, StorageError
from image_classifier.images import DecodeLimits, Preprocess
from image_classifier.inference.predictor import Predictor
from image_classifier.inference.sort_into import Sorter, folder_name
from image_classifier.inference.writers import Answer, check_format, write_answers
from image_classifier.predictions import Prediction
from image_classifier.sources.image_source import ImageSource
from tests.conftest import write_image
from tests.inference.test_predictor import Brightness

ODD = ["a.png", 'quote".png', "comma, line\nbreak\r.png", "odd \udcff.png", "кот.png"]
ANSWERS = [
    Prediction(path, "b", 0.75, {"a": 0.25, "b": 0.75}, reason="why" * (number % 2)).answer()
    for number, path in enumerate(ODD)
]
ANSWERS.insert(2, Prediction("bad.png", error="not, an image").answer())


def written(form: str, answers: list[Answer], top_k: int | None = None) -> bytes:
    file = io.BytesIO()
    write_answers(iter(answers), form, top_k, file)
    return file.getvalue()


def test_parquet_says_what_csv_says() -> None:
    rows = pyarrow.parquet.read_table(io.BytesIO(written("parquet", ANSWERS))).to_pylist()
    lines = list(csv.DictReader(io.StringIO(written("csv", ANSWERS).decode("utf-8", "surrogateescape"), newline="")))
    assert [list(row) for row in rows] == [list(line) for line in lines]
    for row, line in zip(rows, lines, strict=True):
        assert row["path"] == line["path"].replace("\udcff", "\\udcff")
        assert (row["confidence"] is None) == (line["confidence"] == "") == bool(row["error"])
        assert row["confidence"] is None or row["confidence"] == float(line["confidence"])
        assert {name: row[name] for name in row if name not in ("path", "confidence")} == {
            name: line[name] for name in line if name not in ("path", "confidence")
        }


def test_parquet_comes_in_groups_of_rows() -> None:
    many = [Prediction(f"{number}.png", "a", 1.0, {"a": 1.0}).answer() for number in range(9000)]
    file = pyarrow.parquet.ParquetFile(io.BytesIO(written("parquet", many)))
    assert file.metadata.num_row_groups == 3 and file.metadata.num_rows == 9000
    assert pyarrow.parquet.read_table(io.BytesIO(written("parquet", []))).num_rows == 0


def test_every_format_is_written_as_it_comes() -> None:
    """None asks for all answers before it writes the first."""
    for form in ("table", "jsonl", "json", "csv", "parquet"):
        file = io.BytesIO()
        seen: list[int] = []

        def endless(file: io.BytesIO = file, seen: list[int] = seen) -> Iterator[Answer]:
            for number in range(20_000):
                seen.append(file.tell())
                yield {**ANSWERS[0], "path": f"{number}.png"}

        write_answers(endless(), form, None, file)
        assert seen[100 if form != "parquet" else 8192] > 0


def test_a_table_is_as_wide_as_its_first_paths() -> None:
    lines = written("table", [ANSWERS[0], {**ANSWERS[0], "path": "x" * 40}]).decode().splitlines()
    assert lines[0].startswith("image" + " " * 37 + "class") and written("table", []).decode().startswith(
        "image  class"
    )


def test_a_table_shows_no_control_characters() -> None:
    """A name with an escape could clear the terminal, one with a line break could look like a row."""
    odd = Prediction("\x1b[2Jа\nfake.png\x9b\u202e", "b\r", 0.75, {"a\x07": 0.25, "b\r": 0.75}, reason="\x7f").answer()
    shown = written("table", [odd, Prediction("\t.png", error="\x1b]0;x").answer()]).decode()
    assert len(shown.splitlines()) == 3 and all(letter.isprintable() for letter in shown.replace("\n", ""))
    assert "\\x1b[2Jа\\nfake.png\\x9b\\u202e  b\\r" in shown and "\\t.png" in shown and "! \\x1b]0;x" in shown


def test_a_format_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="use one of table"):
        check_format("xml", True)
    with pytest.raises(ConfigError, match="--output"):
        check_format("parquet", False)


def grey(folder: Path, name: str, level: int) -> Path:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    Image.new("L", (9, 9), level).save(folder / name)
    return folder / name


def test_a_confidence_below_the_threshold_is_an_abstention_with_its_reason(tmp_path: Path) -> None:
    paths = [grey(tmp_path, f"{level}.png", level) for level in (10, 250)]
    predictor = Predictor(Brightness(), ("dark", "bright"), Preprocess(8), threshold=0.9)
    unsure, sure = predictor.predict(paths)
    assert (
        unsure.decision == "abstain"
        and unsure.reason.startswith("not sure enough: confidence 0.5")
        and "limit is 0.900" in unsure.reason
    )
    assert sure.decision == "label" and unsure.label == "bright"


def test_items_of_every_kind_are_answered_in_order_and_keep_their_content(tmp_path: Path) -> None:
    path = grey(tmp_path, "a.png", 250)
    content = path.read_bytes()
    items = [
        ImageSource.file(path),
        ImageSource("b", content),
        ImageSource("c", lambda: content),
        ImageSource.missing("d", "gone"),
        ImageSource("e", b"no"),
    ] * 9
    predictor = Predictor(Brightness(), ("dark", "bright"), Preprocess(8), batch_size=4)
    kept = list(predictor.answers(iter(items), keep=True))
    assert [prediction.path for prediction, _ in kept] == [item.name for item in items]
    assert [content for _, content in kept[:3]] == [path, content, content]
    assert [content for _, content in list(predictor.answers(iter(items)))[:3]] == [path, b"", b""]
    assert [prediction.error for prediction, _ in kept[3:5]] == ["gone", kept[4][0].error] and kept[4][0].error


def test_no_more_is_read_ahead_than_two_batches() -> None:
    taken = 0

    def endless() -> Iterator[ImageSource]:
        nonlocal taken
        while True:
            taken += 1
            yield ImageSource.missing(str(taken), "none")

    answers = Predictor(Brightness(), ("dark", "bright"), Preprocess(8), batch_size=8).answers(endless())
    for number in range(1, 100):
        next(answers)
        assert taken <= number + 2 * 8
    answers.close()  # type: ignore[attr-defined]


def sort(directory: Path, *named: tuple[str, Path | bytes], label: str = "cat", reason: str = "") -> list[Prediction]:
    sorter = Sorter(directory, DecodeLimits())
    answers = [(Prediction(name, label, 0.9, {label: 0.9}, reason=reason), content) for name, content in named]
    return [prediction for prediction, _ in sorter.sorted(answers)]


def tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_images_are_copied_to_the_folder_of_their_class_and_none_is_overwritten(tmp_path: Path) -> None:
    one, other = write_image(tmp_path / "in/1/a.png", 1), write_image(tmp_path / "in/2/a.png", 2)
    for _ in range(2):  # again: nothing new
        sort(tmp_path / "out", (str(one), one), (str(other), other), ("x.zip/a.png", other.read_bytes()))
        sort(tmp_path / "out", ("https://host/dir/b.jpg?key=1", b"b"), ("-", b"c"), reason="not sure enough")
    found = tree(tmp_path / "out")
    assert list(found) == [
        "_abstain/b.jpg",
        "_abstain/stdin",
        *sorted(name for name in found if name.startswith("cat/")),
    ]
    assert len(found) == 4 and found["cat/a.png"] == one.read_bytes()
    (second,) = set(found) - {"_abstain/b.jpg", "_abstain/stdin", "cat/a.png"}
    assert (
        second.startswith("cat/a-") and len(second) == len("cat/a-12345678.png") and found[second] == other.read_bytes()
    )


def test_errors_are_sorted_nowhere_and_a_file_that_is_gone_is_one(tmp_path: Path) -> None:
    sorter = Sorter(tmp_path / "out", DecodeLimits())
    assert [prediction.error for prediction, _ in sorter.sorted([(Prediction("a", error="bad"), b"")])] == ["bad"]
    (gone,) = sort(tmp_path / "out", ("gone.png", tmp_path / "gone.png"))
    assert gone.error == "no such file" and not (tmp_path / "out").exists()


@given(st.lists(st.text(min_size=0, max_size=200), min_size=2, max_size=2, unique=True))
def test_no_class_leads_out_and_no_two_share_a_folder(labels: list[str]) -> None:
    labels = [*dict.fromkeys([*labels, "..", ".", "/etc", "a/b", "a\\b", "_abstain", "", "%", "C:", "x\0"])]
    names = [folder_name(label) for label in labels]
    assert len(set(names)) == len(labels)
    for name in names:
        assert (
            name
            and os.path.basename(name) == name
            and not name.startswith(".")
            and name != "_abstain"
            and len(os.fsencode(name)) <= 255
        )


def test_an_ordinary_class_keeps_its_name() -> None:
    assert [folder_name(label) for label in ("cat", "homer simpson", "кот", "a.b", "n01440764")] == [
        "cat",
        "homer simpson",
        "кот",
        "a.b",
        "n01440764",
    ]


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/cat").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="leads out"):
        sort(tmp_path / "out", ("a.png", b"x"))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_sorting_among_the_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is within the images"):
        Sorter(tmp_path / "in" / "sorted", DecodeLimits()).check([str(tmp_path)])
    Sorter(tmp_path / "out", DecodeLimits()).check(["-", str(tmp_path / "none")])


def test_a_copy_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="no space left"):
        sort(tmp_path / "out", ("a.png", b"x"))
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_numbers_are_written_to_the_last_bit() -> None:
    value = float(np.float32(0.1))
    (line,) = written("jsonl", [Prediction("a", "b", value, {"b": value}).answer()]).decode().splitlines()
    assert json.loads(line)["confidence"] == value
