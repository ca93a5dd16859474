from __future__ import annotations

import hashlib
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pytest

from image_classifier.dataset.sources import unwrapped
from image_classifier.errors import SourceError, StorageError
from image_classifier.sources import unpack as module
from image_classifier.sources.archive import is_archive_name, stem
from image_classifier.sources.suffixes import ARCHIVE_SUFFIXES
from image_classifier.sources.unpack import unpack_once


def packed(root: Path, target: Path, prefix: str = "") -> Path:
    """All files of a folder in an archive of the kind that its name says."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as bundle:
            for path in files:
                bundle.write(path, prefix + path.relative_to(root).as_posix())
    else:
        kind = {"tar": "", "tgz": "gz", "tbz2": "bz2", "txz": "xz", "tzst": "zst"}.get(
            target.suffix[1:], target.suffix[1:]
        )
        plain = io.BytesIO()
        with tarfile.open(fileobj=plain, mode="w" if kind == "zst" else f"w:{kind}") as tar:
            for path in files:
                tar.add(path, prefix + path.relative_to(root).as_posix())
        if kind == "zst":
            with pyarrow.output_stream(str(target), compression="zstd") as file:
                file.write(plain.getvalue())
        else:
            target.write_bytes(plain.getvalue())
    return target


def content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.png"))}


@pytest.mark.parametrize("suffix", ARCHIVE_SUFFIXES)
@pytest.mark.parametrize("prefix", ["", "a/b/"])
def test_archives_are_unpacked_once(tmp_path, tree, suffix, prefix):
    archive = packed(tree, tmp_path / f"set{suffix}", prefix)
    assert is_archive_name(archive.name)
    assert stem(archive.name) == "set"
    folder = unpack_once(archive, tmp_path / "data")
    assert folder.parent == tmp_path / "data"
    assert folder.name.startswith("set-")
    assert content(unwrapped(folder)) == content(tree)
    (folder / "marker").touch()
    assert unpack_once(archive, tmp_path / "data") == folder
    assert (folder / "marker").exists()


def test_a_new_version_of_an_archive_gets_a_new_folder(tmp_path, tree):
    first = unpack_once(packed(tree, tmp_path / "set.tar"), tmp_path / "data")
    (tree / "cat" / "000.png").unlink()
    assert unpack_once(packed(tree, tmp_path / "set.tar"), tmp_path / "data") != first


def test_an_archive_is_compared_with_its_sha256_before_it_is_unpacked(tmp_path, tree):
    archive = packed(tree, tmp_path / "set.tar")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    folder = unpack_once(archive, tmp_path / "data", digest.upper())
    assert folder.name == f"set-{digest[:8]}"
    with pytest.raises(SourceError, match=r"set\.tar' has the sha256 .*data\.sha256"):
        unpack_once(archive, tmp_path / "data", "0" * 64)
    assert list((tmp_path / "data").iterdir()) == [folder]


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.tar.bz2", "set.tar.xz", "set.tar.zst", "set.zip"])
@pytest.mark.parametrize("harm", ["cut", "garbage", "empty"])
def test_a_damaged_archive_leaves_nothing(tmp_path, tree, name, harm):
    archive = packed(tree, tmp_path / name)
    whole = archive.read_bytes()
    archive.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"garbage" * 500, "empty": b""}[harm])
    with pytest.raises(SourceError, match="damaged"):
        unpack_once(archive, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_nothing_escapes_from_an_archive(tmp_path):
    link = zipfile.ZipInfo("cat/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for member in ("../evil.png", "/evil.png", "..\\evil.png", link):
        with zipfile.ZipFile(tmp_path / "evil.zip", "w") as bundle:
            bundle.writestr(member, b"x")
        with pytest.raises(SourceError, match="refused"):
            unpack_once(tmp_path / "evil.zip", tmp_path / "data")
    for name, kind in (("../evil.png", tarfile.REGTYPE), ("cat/link.png", tarfile.SYMTYPE)):
        with tarfile.open(tmp_path / "evil.tar", "w") as tar:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info, io.BytesIO())
        with pytest.raises(SourceError, match="refused"):
            unpack_once(tmp_path / "evil.tar", tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "evil.tar", "evil.zip"]
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("name", ["set.tar", "set.zip"])
def test_an_archive_larger_than_the_disk(tmp_path, tree, monkeypatch, name):
    archive = packed(tree, tmp_path / name)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: module.shutil._ntuple_diskusage(1, 1, 100))
    with pytest.raises(StorageError, match=r"unpacks to .* MB"):
        unpack_once(archive, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
