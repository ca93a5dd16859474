"""What --images can name."""

import io
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from image_classifier.errors import ConfigError, DataError, UnreadableImage
from image_classifier.images import DecodeLimits
from image_classifier.inference import writers
from image_classifier.sources import archive, inputs
from image_classifier.sources.archive import ArchiveLimits
from image_classifier.sources.image_source import ImageSource
from image_classifier.sources.inputs import Inputs


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.png",
        "a.JPG",
        "sub/c.webp",
        "sub/.hidden.png",
        "notes.txt",
        "-dash.png",
        "with space.png",
        "a[1].png",
        ".dot/d.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def found(items: list[str], stdin: bytes = b"", **limits: object) -> list[ImageSource]:
    asked = Inputs(items, lambda: io.BytesIO(stdin), **limits)  # type: ignore[arg-type]
    asked.check()
    return list(asked)


def names(items: list[str], stdin: bytes = b"") -> list[str]:
    return [Path(item.name).name for item in found(items, stdin)]


def reason(item: ImageSource) -> str:
    with pytest.raises(UnreadableImage) as caught:
        item.content()
    return caught.value.reason


def picture(seed: int, size: int = 8, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, form)
    return file.getvalue()


def test_folders_are_searched_in_sorted_order_without_hidden_and_other_files(tree: Path) -> None:
    assert names([str(tree)]) == ["-dash.png", "a.JPG", "a[1].png", "b.png", "c.webp", "with space.png"]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.lists(st.sampled_from(["a", "a.b", "b", "ab", "é"]), min_size=1, max_size=3).map(tuple), max_size=8))
def test_a_folder_comes_in_the_order_of_its_paths(
    tmp_path_factory: pytest.TempPathFactory, places: set[tuple[str, ...]]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for parts in places:
        folder = root.joinpath(*parts[:-1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{parts[-1]}.png").touch()
    (root / "z.png").touch()
    assert [item.content() for item in found([str(root)])] == sorted(root.rglob("*.png"))


def test_files_globs_and_lists(tree: Path) -> None:
    assert names([str(tree / "notes.txt")]) == ["notes.txt"]  # a file that is named is tried, whatever its suffix
    assert names([str(tree / "*.png")]) == ["-dash.png", "a[1].png", "b.png", "with space.png"]
    assert names([str(tree / "**" / "*.webp")]) == ["c.webp"]
    assert names([str(tree / "a[1].png")]) == ["a[1].png"]  # an existing file is never a pattern
    assert names(["-"], b"one.png\r\ntwo three.png\n\n") == ["one.png", "two three.png"]
    assert names(["-"], b"odd \xff.png") == ["odd \udcff.png"]
    assert names([str(tree / "missing.png")]) == ["missing.png"]  # becomes a row with an error
    many = [f"folder/{number}.png" for number in range(2000)]
    assert [item.name for item in found(["-"], "\n".join(many).encode())] == many


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_an_image_on_standard_input_is_one(form: str) -> None:
    content = picture(1, 64, form)
    assert [(item.name, item.content()) for item in found(["-"], content)] == [("-", content)]
    assert names(["-"], b"BMW/1.png\nGIFs/2.png") == ["1.png", "2.png"]


def test_an_image_on_standard_input_is_read_no_further_than_its_limit() -> None:
    (item,) = found(["-"], picture(1, 200), limits=DecodeLimits(max_bytes=1000))
    assert len(item.content()) == 1001  # type: ignore[arg-type]


@pytest.mark.parametrize("item", ["*.gif", ""])
def test_nothing_found_is_an_error(tree: Path, item: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "empty").mkdir()
    monkeypatch.chdir(tree / "empty")
    with pytest.raises(DataError, match="holds no image"):
        names([item or "."])
    with pytest.raises(DataError, match="no image to answer"):
        names(["-"])


Pack = Callable[[Path, list[tuple[str, bytes]]], None]


def as_zip(path: Path, files: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in files:
            bundle.writestr(name, content)


def as_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    plain = io.BytesIO()
    kind = path.name.rpartition(".")[2]
    with tarfile.open(
        fileobj=plain, mode="w" if kind in ("tar", "zst") else f"w:{'gz' if kind == 'tgz' else kind}"
    ) as tar:  # type: ignore[call-overload]
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    if kind == "zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(plain.getvalue())
    else:
        path.write_bytes(plain.getvalue())


ARCHIVES = {
    "a.zip": as_zip,
    "a.tar": as_tar,
    "a.tar.gz": as_tar,
    "a.tgz": as_tar,
    "a.tar.zst": as_tar,
    "a.tar.bz2": as_tar,
    "a.tar.xz": as_tar,
}
FILES = [
    ("b/2.png", picture(2)),
    ("a/1.png", picture(1)),
    ("../out.png", picture(3)),
    ("notes.txt", b"no"),
    ("__MACOSX/._1.png", b"no"),
    ("x.png", b""),
]


@pytest.mark.parametrize("name", ARCHIVES)
def test_the_images_of_an_archive_come_in_its_order_and_nothing_is_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ARCHIVES[name](tmp_path / name, FILES)
    items = found([name])
    assert [item.name for item in items] == [
        f"{name}/{member}" for member in ("b/2.png", "a/1.png", "../out.png", "x.png")
    ]
    assert [item.content() for item in items] == [
        content for member, content in FILES if member.endswith(".png") and "MACOSX" not in member
    ]
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_cut_archive_is_a_row_and_no_stop(tmp_path: Path, name: str) -> None:
    ARCHIVES[name](tmp_path / name, [(f"{number}.png", picture(number, 60)) for number in range(9)])
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    items = found([str(tmp_path / name), "after.png"])
    assert items[-1].name == "after.png"
    assert items[-2].name == str(tmp_path / name) and "damaged" in reason(items[-2])


def test_an_archive_without_images_is_a_row(tmp_path: Path) -> None:
    as_zip(tmp_path / "a.zip", [("notes.txt", b"")])
    (item,) = found([str(tmp_path / "a.zip")])
    assert reason(item) == "the archive holds no image"


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
@pytest.mark.parametrize(
    ("limits", "says"),
    [(ArchiveLimits(max_members=2), "more than 2 members"), (ArchiveLimits(max_bytes=1000), "more than 1,000 bytes")],
)
def test_more_than_an_archive_may_hold_ends_it(tmp_path: Path, name: str, limits: ArchiveLimits, says: str) -> None:
    ARCHIVES[name](tmp_path / name, [(f"{number}.png", picture(number, 12)) for number in range(5)])
    items = found([str(tmp_path / name)], archive=limits)
    assert 2 <= len(items) <= 3 and says in reason(items[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar.zst"])
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, name: str) -> None:
    ARCHIVES[name](tmp_path / name, [("big.png", bytes(300 * 2**20))])
    (item,) = found([str(tmp_path / name)])
    assert "times its size" in reason(item)


def test_an_archive_that_needs_too_much_memory_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise MemoryError

    as_tar(tmp_path / "a.tar.xz", FILES)
    monkeypatch.setattr(lzma.LZMAFile, "read", refuse)
    (item,) = found([str(tmp_path / "a.tar.xz")])
    assert reason(item) == "unpacking it takes more memory than there is"


@pytest.mark.parametrize("name", ["a.tar.zst", "a.TZST", "t.parquet", "https://host/a.tar.zst?x"])
def test_a_package_that_is_missing_is_told_before_work_begins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (inputs, writers, archive):
        monkeypatch.setattr(module, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"pip install 'image-classifier\[arrow\]'"):
        Inputs([name], io.BytesIO).check()
    with pytest.raises(ConfigError, match=r"pip install 'image-classifier\[arrow\]'"):
        writers.check_format("parquet", to_a_file=True)


def test_a_package_that_is_missing_for_an_archive_without_a_suffix_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_tar(tmp_path / "a.tar.zst", FILES)
    monkeypatch.setattr(archive, "find_spec", lambda package: None)
    (item,) = found(["-"], (tmp_path / "a.tar.zst").read_bytes())
    assert "pip install 'image-classifier[arrow]'" in reason(item)


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_a_member_that_is_too_large_is_its_own_row(tmp_path: Path, name: str) -> None:
    ARCHIVES[name](tmp_path / name, [("big.png", picture(1, 99)), ("small.png", picture(2))])
    big, small = found([str(tmp_path / name)], limits=DecodeLimits(max_bytes=5000))
    assert "larger than" in reason(big) and small.content() == picture(2)


def test_a_tar_whose_name_is_gigabytes_fills_no_memory(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 2**33
    (tmp_path / "a.tar").write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + b"x" * 3 * 2**20)
    (item,) = found([str(tmp_path / "a.tar")])
    assert "absurd size" in reason(item)


def test_an_encrypted_member_is_its_own_row(tmp_path: Path) -> None:
    as_zip(tmp_path / "a.zip", [("1.png", picture(1)), ("2.png", picture(2))])
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[content.find(b"PK\x01\x02") + 8] |= 1
    content[6] |= 1
    (tmp_path / "a.zip").write_bytes(content)
    first, second = found([str(tmp_path / "a.zip")])
    assert "encrypted" in reason(first) and second.content() == picture(2)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["a.zip", "a.tar", "a.tar.gz"]), st.data())
def test_no_damage_of_an_archive_raises(tmp_path: Path, name: str, data: st.DataObject) -> None:
    ARCHIVES[name](tmp_path / name, FILES)
    content = bytearray((tmp_path / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / name).write_bytes(content)
    assert found([str(tmp_path / name)])


def write_table(path: Path, column: str, rows: list[str]) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"other": ["x"] * len(rows), column: rows}), path)
    else:
        comma = "\t" if path.suffix == ".tsv" else ","
        path.write_text(f"other{comma}{column}\n" + "".join(f'x{comma}"{row}"\n' for row in rows), encoding="utf-8-sig")


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet"])
@pytest.mark.parametrize("column", ["path", "Image"])
def test_a_table_names_images_from_its_own_folder(tmp_path: Path, name: str, column: str) -> None:
    (tmp_path / "sub").mkdir()
    rows = ["a b, c.png", "sub/é.png", "/root.png", "https://host/1.png", ""]
    write_table(tmp_path / "sub" / name, column, rows)
    items = found([str(tmp_path / "sub" / name)])
    own = str(tmp_path / "sub")
    assert [item.name for item in items] == [
        f"{own}/a b, c.png",
        f"{own}/sub/é.png",
        "/root.png",
        "https://host/1.png",
        f"{own}/{name}",
    ]
    assert "no path" in reason(items[-1])


def test_a_table_with_semicolons_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path;label\na,b.png;x\n")
    assert names([str(tmp_path / "t.csv")]) == ["a,b.png"]


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_table_without_paths_is_refused(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / name, "label", ["a"])
    with pytest.raises(DataError, match="no column path and no column image"):
        found([str(tmp_path / name)])
    (tmp_path / "t.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="cannot read the table"):
        found([str(tmp_path / "t.parquet")])


def test_limits_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="archive"):
        ArchiveLimits(max_members=0)
