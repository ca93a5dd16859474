"""`--images -`: an image, an archive or a list, each line of which counts as soon as it is there; nothing else
becomes rows.
"""

from __future__ import annotations

import errno
import io
import os
import tempfile
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from image_classifier.errors import DataError, StorageError
from image_classifier.sources.inputs import Inputs
from tests.sources.test_inputs import ARCHIVES, FILES, found, picture


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_on_standard_input_is_its_images(tmp_path: Path, name: str) -> None:
    ARCHIVES[name](tmp_path / name, FILES)
    items = found(["-"], (tmp_path / name).read_bytes())
    assert [item.name for item in items] == [f"-/{member}" for member in ("b/2.png", "a/1.png", "../out.png", "x.png")]
    assert items[0].content() == picture(2)


@pytest.mark.parametrize(
    "content",
    [
        np.random.default_rng(0).bytes(3000),
        b"one.png\ntwo.png\n".decode().encode("utf-16"),
        b"\x7fELF" + bytes(99),
        b"x" * 300 + b"\1" * 300,
        b"\n\2",
    ],
)
def test_what_is_no_text_is_one_error(content: bytes) -> None:
    with pytest.raises(DataError, match="not an image, an archive or a list"):
        found(["-"], content)


def test_a_zero_far_down_a_list_is_an_error() -> None:
    with pytest.raises(DataError, match="not an image, an archive or a list"):
        found(["-"], b"a.png\n" * 2000 + b"\0\n")


def test_names_that_begin_as_archives_and_images_do_are_names() -> None:
    names = ["BZh/1.png", "BMW.png", "PK.png", "II*.png", "esc\x1b.png", "a\tb.png"]
    for name in names:
        assert [item.name for item in found(["-"], f"{name}\n{name}".encode())] == [name, name]


def test_each_line_counts_as_soon_as_it_is_there() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as stdin, os.fdopen(writer, "wb", buffering=0) as producer:
        items = iter(Inputs(["-"], lambda: stdin))
        for name in ("1.png", "2.png"):
            producer.write(f"{name}\n".encode())
            assert next(items).name == name  # else this waits for ever


def test_an_image_that_comes_byte_by_byte_is_one() -> None:
    class Slow(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            return self.read(1)

    (item,) = Inputs(["-"], lambda: Slow(picture(1)))
    assert item.content() == picture(1)


def test_a_full_disk_under_an_archive_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(tempfile.SpooledTemporaryFile):  # type: ignore[type-arg]
        def write(self, content: bytes) -> NoReturn:  # type: ignore[override]
            raise OSError(errno.ENOSPC, "No space left on device")

    ARCHIVES["a.zip"](tmp_path / "a.zip", FILES)
    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", Full)
    with pytest.raises(StorageError, match=f"no space left while writing '{tempfile.gettempdir()}'"):
        found(["-"], (tmp_path / "a.zip").read_bytes())
