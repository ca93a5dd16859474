from __future__ import annotations

import csv
import io
import os
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classifier.errors import DataError
from image_classifier.sources.table import is_table, read_table


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def table(folder: Path, content: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(path: Path, group_column: str | None = None) -> list[tuple[str, str, str, str]]:
    return [
        (os.path.relpath(row.path, path.parent), row.label, row.split, row.key)
        for row in read_table(path, group_column)
    ]


PLAIN = [("a.jpg", "cat", "", ""), ("b.jpg", "dog", "", "")]


@pytest.mark.parametrize(
    "content",
    [
        "path,label\na.jpg,cat\nb.jpg,dog\n",
        "path,label\r\na.jpg,cat\r\nb.jpg,dog",
        "path,label\n\na.jpg,cat\n\nb.jpg,dog\n\n",
        "Label , PATH\ncat,a.jpg\ndog ,b.jpg\n",
        "path, label\na.jpg, cat\nb.jpg, dog\n",
        "path;label\na.jpg;cat\nb.jpg;dog\n",
        '"path","label"\n"a.jpg","cat"\n"b.jpg","dog"\n',
        "id,path,label,more\n1,a.jpg,cat,\n2,b.jpg,dog,x\n",
        "path,label\n./a.jpg,cat\nx/../b.jpg,dog\n",
        "\ufeffpath,label\na.jpg,cat\nb.jpg,dog\n",
        "path,label\na.jpg,cat\nb.jpg,dog\n".encode("utf-16"),
        "path,label,split\na.jpg,cat,\nb.jpg,dog,\n",
    ],
)
def test_ways_to_write_the_same_table(folder, content):
    assert rows(table(folder, content)) == PLAIN


def test_tabs_and_absolute_paths(folder):
    assert rows(table(folder, f"path\tlabel\na.jpg\tcat\n{folder}/b.jpg\tdog\n", "t.tsv")) == PLAIN


def test_splits_and_groups(folder):
    path = table(folder, "path,label,split,Patient\na.jpg,cat,Training,p1\nb.jpg,dog,valid,p1\nc.jpg,dog,test,\n")
    assert rows(path) == [("a.jpg", "cat", "train", ""), ("b.jpg", "dog", "val", ""), ("c.jpg", "dog", "test", "")]
    assert [key for *_, key in rows(path, "patient")] == ["p1", "p1", ""]
    assert [key for *_, key in rows(path, r"^(\w+)/")] == ["", "", ""]  # a pattern for paths, no column


def test_a_row_knows_its_file(folder):
    row = read_table(table(folder, "path,label\na.jpg,cat\n"))[0]
    assert row.status is not None
    assert row.status.st_size == 5


LABELS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda text: text.strip() == text
)


@given(labels=st.lists(LABELS, min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_what_a_csv_writer_writes_is_read_back(tmp_path_factory, labels):
    folder = tmp_path_factory.mktemp("table")
    names = [f'{number} ",;\n.jpg' for number in range(len(labels))]
    text = io.StringIO()
    csv.writer(text).writerows([("path", "label"), *zip(names, labels, strict=True)])
    for name in names:
        (folder / name).touch()
    assert [row[:2] for row in rows(table(folder, text.getvalue()))] == list(zip(names, labels, strict=True))


def test_names_that_are_not_utf8(folder):
    name = b"latin-\xe9.jpg"
    try:
        (folder / os.fsdecode(name)).touch()
    except OSError:
        pytest.skip("this file system refuses the name")
    assert rows(table(folder, b"path,label\n" + name + b",cat\n"))[0][0] == os.fsdecode(name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty: give it a first line path,label"),
        ("path,label\n", "holds no rows"),
        ("path,class\na.jpg,cat\n", "has no column label: its columns are path, class; it needs path and label"),
        ("file,class\na.jpg,cat\n", "has no column path and no column label"),
        ("path,label\na.jpg,cat\nb.jpg\n", "line 3 of '.*t.csv' has 1 values and the table 2 columns: quote"),
        ("path,label\na.jpg,cat\nb.jpg,d,og\n", "line 3 of '.*t.csv' has 3 values"),
        ("path,label\na.jpg,cat\n,dog\n", "line 3 of '.*t.csv' has no path"),
        ("path,label\na.jpg, \n", "line 2 of '.*t.csv' has no label for 'a.jpg'"),
        (
            "path,label\n\n\na.jpg,cat\nx.jpg,cat\n",
            "line 5 of '.*t.csv' names '.*x.jpg', which does not exist: paths start from the table's folder",
        ),
        ("path,label\nx.jpg,cat\na.jpg/y.jpg,cat\n\0,cat\n", "line 2 .*x.jpg', which does not exist and 2 more rows"),
        (
            "path,label\na.jpg,cat\nb.jpg,dog\n./a.jpg,dog\n",
            "line 4 of '.*t.csv' names './a.jpg' again, after line 2: keep one row per image",
        ),
        ("path,label,split\na.jpg,cat,trains\n", "line 2 of '.*t.csv' has the split 'trains': use train, val or test"),
        ('path,label\na.jpg,cat\n"b.jpg"x,cat\n', "line 3 of '.*t.csv' is not CSV"),
        ('path,label\na.jpg,cat\n"b.jpg,cat\n', "line 3 of '.*t.csv' is not CSV"),
        (b"\x00\xff\xfe\x80", "has no column path"),
    ],
)
def test_what_is_wrong_is_one_line(folder, content, words):
    with pytest.raises(DataError, match=words) as caught:
        read_table(table(folder, content))
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@given(content=st.binary(max_size=60) | st.text('path,label\n\r";\t.jpg\0a', max_size=60).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_no_content_breaks_it(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    for name in ("t.csv", "t.tsv", "t.parquet"):
        with suppress(DataError):
            read_table(table(folder, content, name))


def test_a_table_that_cannot_be_read(folder):
    with pytest.raises(DataError, match="cannot read the table '.*none.csv' \\(No such file"):
        read_table(folder / "none.csv")
    with pytest.raises(DataError, match="cannot read the table '.*none.parquet'"):
        read_table(folder / "none.parquet")


def test_a_file_that_may_not_be_looked_at_stays_a_row(folder, monkeypatch):
    path = table(folder, "path,label\na.jpg,cat\n")
    real = os.stat

    def refuse(name, *_, **__):
        if str(name).endswith("a.jpg"):
            raise PermissionError(13, "Permission denied")
        return real(name)

    monkeypatch.setattr(os, "stat", refuse)
    assert [row.status for row in read_table(path)] == [None]


def test_a_folder_may_be_called_like_a_table(tmp_path):
    (tmp_path / "x.csv").mkdir()
    assert not is_table(tmp_path / "x.csv")
    assert not is_table(tmp_path / "x.tar")
    assert all(is_table(tmp_path / name) for name in ("a.CSV", "a.tsv", "a.parquet"))


def parquet(file: Path, /, **columns) -> Path:
    pq.write_table(pa.table(columns), file)
    return file


def test_parquet_says_what_csv_says(folder):
    labels = pa.array(["cat", "dog"]).dictionary_encode()
    pictures = [{"bytes": b"x"}] * 2
    path = parquet(
        folder / "t.parquet",
        image=pictures,
        label=labels,
        Path=["a.jpg", "b.jpg"],
        split=["train", None],
        age=[3, None],
    )
    assert rows(path, "age") == [("a.jpg", "cat", "train", "3"), ("b.jpg", "dog", "", "")]


def test_labels_may_be_numbers(folder):
    assert rows(parquet(folder / "t.parquet", path=["a.jpg"], label=[7])) == [("a.jpg", "7", "", "")]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"path": ["a.jpg", "x.jpg"], "label": ["cat", "cat"]},
            "row 2 of '.*t.parquet' names '.*x.jpg', which does not exist",
        ),
        ({"path": ["a.jpg", "b.jpg"], "label": ["cat", None]}, "row 2 of '.*t.parquet' has no label"),
        ({"path": ["a.jpg"], "class": ["cat"]}, "has no column label: its columns are path, class"),
        ({"path": [], "label": []}, "holds no rows"),
    ],
)
def test_what_is_wrong_with_parquet(folder, columns, words):
    with pytest.raises(DataError, match=words):
        read_table(parquet(folder / "t.parquet", **columns))


def test_what_is_no_parquet(folder):
    with pytest.raises(DataError, match=r"t.parquet' \(not a Parquet file: "):
        read_table(table(folder, b"PAR1 no", "t.parquet"))
