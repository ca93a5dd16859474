from __future__ import annotations

import io
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from image_classifier.dataset import archive as archive_module
from image_classifier.dataset.prepare import DataSettings, prepare
from image_classifier.dataset.scan import scan
from image_classifier.dataset.sources import Digits, Folder, TorchvisionDataset, deferred
from image_classifier.errors import ConfigError, SourceError, StorageError
from tests.conftest import ROOT


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def packed(root: Path, target: Path, prefix: str = "") -> Path:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as bundle:
            for path in files:
                bundle.write(path, prefix + path.relative_to(root).as_posix())
    else:
        with tarfile.open(target, "w:gz" if target.name.endswith("gz") else "w") as tar:
            for path in files:
                tar.add(path, prefix + path.relative_to(root).as_posix())
    return target


def test_digits(here):
    root = Digits("data/digits")()
    manifest = scan(root)
    assert len(manifest) == 1797
    assert manifest.classes == tuple("0123456789")
    assert len(manifest.indices("test")) == 355
    assert {(record.width, record.height) for record in manifest} == {(8, 8)}
    dates = [path.stat().st_mtime_ns for path in sorted(root.rglob("*.png"))]
    assert Digits("data/digits")() == root
    assert [path.stat().st_mtime_ns for path in sorted(root.rglob("*.png"))] == dates
    assert [path.name for path in Path("data").iterdir()] == ["digits"]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".zip"])
@pytest.mark.parametrize("prefix", ["", "flowers/", "a/b/"])
def test_archives_are_unpacked_once(here, tree, suffix, prefix):
    archive = packed(tree, here / f"set{suffix}", prefix)
    root = Folder(archive=str(archive))()
    assert root.relative_to("data").parts[0].startswith("set-")
    assert [record.sha256 for record in scan(root)] == [record.sha256 for record in scan(tree)]
    marker = root / "marker"
    marker.touch()
    assert Folder(dir=str(archive))() == root
    assert marker.exists()


def test_a_new_version_of_an_archive_gets_a_new_folder(here, tree):
    first = Folder(archive=str(packed(tree, here / "set.tar")))()
    (tree / "cat" / "000.png").unlink()
    assert Folder(archive=str(packed(tree, here / "set.tar")))() != first


def test_an_archive_is_looked_for(here, tree):
    (here / "shelf").mkdir()
    packed(tree, here / "shelf" / "set.tar")
    assert len(scan(Folder(archive="set.tar", search=["nowhere", "shelf"])())) == 20
    with pytest.raises(SourceError, match="get it from there"):
        Folder(archive="other.tar", search=["shelf"], hint="get it from there")()


def test_a_missing_folder_names_the_nearest(here, tree):
    with pytest.raises(SourceError, match=r"does not exist: did you mean '.*tree'"):
        Folder(dir=str(tree.with_name("trees")))()
    with pytest.raises(ConfigError, match=r"data\.dir is not set"):
        Folder()()
    (here / "notes.txt").touch()
    with pytest.raises(SourceError, match="neither a folder nor an archive"):
        Folder(dir="notes.txt")()


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.zip"])
@pytest.mark.parametrize("harm", ["cut", "garbage", "empty"])
def test_a_damaged_archive_leaves_nothing(here, tree, name, harm):
    content = packed(tree, here / name).read_bytes()
    (here / name).write_bytes({"cut": content[: len(content) // 2], "garbage": b"garbage" * 500, "empty": b""}[harm])
    with pytest.raises(SourceError, match="damaged"):
        Folder(archive=name)()
    assert list(Path("data").iterdir()) == []


def test_nothing_escapes_from_an_archive(here):
    link = zipfile.ZipInfo("cat/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for member in ("../evil.png", "/evil.png", "..\\evil.png", link):
        with zipfile.ZipFile("evil.zip", "w") as bundle:
            bundle.writestr(member, b"x")
        with pytest.raises(SourceError, match="refused"):
            Folder(archive="evil.zip")()
    for name, kind in (("../evil.png", tarfile.REGTYPE), ("cat/link.png", tarfile.SYMTYPE)):
        with tarfile.open("evil.tar", "w") as tar:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info, io.BytesIO())
        with pytest.raises(SourceError, match="refused"):
            Folder(archive="evil.tar")()
    assert sorted(path.name for path in here.iterdir()) == ["data", "evil.tar", "evil.zip"]
    assert list(Path("data").iterdir()) == []


def test_an_archive_larger_than_the_disk(here, tree, monkeypatch):
    packed(tree, here / "set.tar")
    monkeypatch.setattr(archive_module.shutil, "disk_usage", lambda _: archive_module.shutil._ntuple_diskusage(1, 1, 100))
    with pytest.raises(StorageError, match=r"unpacks to .* MB"):
        Folder(archive="set.tar")()
    assert list(Path("data").iterdir()) == []


class Pictures:
    """Shaped like a data set of torchvision."""

    classes = ("cat", "dog/wolf")

    def __init__(self, count: int = 6) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return Image.new("RGB", (5, 5), (index * 40, 0, 0)), index % 2


def test_a_torchvision_data_set_is_written_once(here):
    source = TorchvisionDataset("data/set", Pictures, lambda: Pictures(2))
    manifest = scan(source())
    assert [len(manifest.indices(split)) for split in ("train", "test")] == [6, 2]
    assert manifest.classes == ("cat", "dog_wolf")
    assert TorchvisionDataset("data/set", lambda: pytest.fail("fetched again"))() == Path("data/set")


def test_no_network(here, tree):
    def fail():
        raise OSError("no route to host")

    with pytest.raises(SourceError, match=r"no route to host.*data\.archive=PATH"):
        TorchvisionDataset("data/set", fail)()
    assert not Path("data/set").exists()
    packed(tree, here / "set.tar")
    assert len(scan(TorchvisionDataset("data/set", fail, archive="set.tar")())) == 20


def test_deferred_loads_nothing_and_takes_only_data_sets():
    code = """if True:
        import sys
        from image_classifier.dataset.sources import deferred
        deferred("torchvision.datasets.CIFAR10", root="data/downloads", train=True, download=True)
        assert not {"torch", "torchvision"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(ConfigError, match="torchvision.datasets"):
        deferred("os.system", command="true")


def test_the_data_stage_loads_no_torch():
    code = (
        "import sys, image_classifier.dataset.sources, image_classifier.dataset.prepare; assert not {'torch', 'sklearn', 'hydra'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("name", "images", "classes", "parts"),
    [
        ("simpsons-mnist.tar.gz", 10_000, 10, (6400, 1600, 2000)),
        ("flowers-native.tar", 700, 5, (560, 140, 0)),
        ("clothing.tar", 1513, 10, (800, 341, 372)),
    ],
)
def test_real_sets(here, shared_data, name, images, classes, parts):
    if not (shared_data / name).exists():
        pytest.skip(f"{name} is not here")
    manifest = prepare(Folder(archive=name, search=[str(shared_data)])(), DataSettings(name="real"))
    assert (len(manifest), len(manifest.classes)) == (images, classes)
    counts = tuple(len(manifest.indices(split)) for split in ("train", "val", "test"))
    assert all(abs(count - part) <= 5 for count, part in zip(counts, parts, strict=True))
