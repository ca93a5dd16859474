from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from image_classifier.dataset.discovery import FileTree, discover
from image_classifier.dataset.sources import Digits, Folder, Hub, TorchvisionDataset, deferred
from image_classifier.errors import ConfigError, SourceError
from tests.conftest import ROOT
from tests.sources.test_download import Server, server  # noqa: F401  (a fixture)
from tests.sources.test_unpack import packed

DOWNLOADED = ("cifar10", "flowers102", "oxford_pets")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(paths: Path | list[Path]) -> FileTree:
    return discover(paths if isinstance(paths, list) else [paths])


def parts(tree: FileTree) -> dict[str, int]:
    return dict(Counter(image.split for image in tree.images))


def classes(tree: FileTree) -> list[str]:
    return sorted({image.label for image in tree.images})


def source_of(*overrides: str) -> Any:
    """The source that conf/data describes."""
    from hydra import compose, initialize_config_dir

    from image_classifier.cli import hydra_app

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("prepare", list(overrides))
    return hydra_app.instantiate(config.data.source)


def test_digits(here):
    root = Digits("data/digits")()
    tree = found(root)
    assert len(tree.images) == 1797
    assert classes(tree) == list("0123456789")
    assert parts(tree) == {"train": 1442, "test": 355}
    with Image.open(root / tree.images[0].path) as image:
        assert image.size == (8, 8)
    assert Digits("data/digits")() == root
    assert found(root) == tree
    assert [path.name for path in Path("data").iterdir()] == ["digits"]


def test_an_archive_is_looked_for(here, tree):
    packed(tree, here / "shelf" / "set.tar")
    assert len(found(Folder(archive="set.tar", search=["nowhere", "shelf"])()).images) == 20
    with pytest.raises(SourceError, match="get it from there"):
        Folder(archive="other.tar", search=["shelf"], hint="get it from there")()


def test_a_missing_folder_names_the_nearest(here, tree):
    with pytest.raises(SourceError, match=r"does not exist: did you mean '.*tree'"):
        Folder(dir=str(tree.with_name("trees")))()
    with pytest.raises(ConfigError, match=r"data\.dir is not set"):
        Folder()()
    (here / "notes.txt").touch()
    with pytest.raises(SourceError, match="neither a folder nor an archive nor a table"):
        Folder(dir="notes.txt")()


def test_folders_archives_and_tables_may_be_mixed(here, make_tree):
    first, second = make_tree("first", cat=3, dog=2), make_tree("second", cat=1, bird=4)
    table = here / "labels.csv"
    table.write_text("path,label\nfirst/cat/000.png,owl\n")
    archive = packed(second, here / "set.zip")
    assert Folder(dir=str(table))() == table
    paths = Folder(dir=[str(first), str(archive)])()
    assert isinstance(paths, list)
    assert paths[0] == first
    assert Counter(image.label for image in found(paths).images) == {"cat": 4, "dog": 2, "bird": 4}
    assert Folder(dir=[str(first)])() == first


def test_each_archive_may_have_its_sha256(here, make_tree):
    archives = [packed(make_tree(name, cat=1, dog=1), here / f"{name}.tar") for name in ("first", "second")]
    sums = [hashlib.sha256(archive.read_bytes()).hexdigest() for archive in archives]
    roots = Folder(archive=[str(archive) for archive in archives], sha256=sums)()
    assert [root.name for root in roots] == [f"first-{sums[0][:8]}", f"second-{sums[1][:8]}"]
    with pytest.raises(ConfigError, match="has 1 entries for 2 archives"):
        Folder(archive=[str(archive) for archive in archives], sha256=sums[0])()
    with pytest.raises(ConfigError, match=r"data\.sha256 is for archives"):
        Folder(dir=str(here / "first"), sha256=sums[0])()


def test_an_archive_on_the_web(here, tree, server: Server):  # noqa: F811
    content = packed(tree, here / "set.zip").read_bytes()
    server.content = content
    digest = hashlib.sha256(content).hexdigest()
    root = Folder(archive=server.url, sha256=digest)()
    assert len(found(root).images) == 20
    assert Folder(archive=server.url, sha256=digest)() == root
    assert len(server.seen) == 1
    with pytest.raises(SourceError, match="is not that of an archive"):
        Folder(archive=f"{server.url}.exe")()


def test_a_damaged_archive_from_the_web_says_what_to_delete(here, server: Server):  # noqa: F811
    server.content = b"no archive"
    with pytest.raises(
        SourceError, match=r"damaged or encrypted: get it again; delete 'data/downloads/set-\w{8}\.zip'"
    ):
        Folder(archive=server.url)()


def test_the_layout_of_a_competition_archive(here, make_tree):
    root = make_tree("train/simpsons_dataset", homer_simpson=4, lisa_simpson=3)
    shutil.copytree(root / "lisa_simpson", here / "testset" / "testset")
    (here / "sample_submission.csv").write_text("Id,Expected\n")
    for place in ("train", "testset"):
        packed(here / place, here / "packed" / f"{place}.tar", f"{place}/")
    whole = here / "whole"
    for path in ("train", "testset"):
        shutil.copytree(here / path, whole / path)
    archive = packed(whole, here / "journey-springfield.zip")
    for source in (
        source_of("data=simpsons", f"data.archive={archive}"),
        source_of("data=simpsons", f"data.dir={whole}"),
    ):
        assert Counter(image.label for image in found(source()).images) == {"homer_simpson": 4, "lisa_simpson": 3}


def test_two_sets_of_cats_are_merged(here, make_tree):
    first, second = make_tree("first", Bengal=3, Sphynx=2), make_tree("second", Bengal=2, Manx=1)
    archives = [packed(root, here / f"{root.name}.zip", "images/") for root in (first, second)]
    paths = source_of("data=cats", f"data.archive=[{archives[0]},{archives[1]}]")()
    assert Counter(image.label for image in found(paths).images) == {"Bengal": 5, "Sphynx": 2, "Manx": 1}
    with pytest.raises(ConfigError, match=r"pass data\.archive=\[FIRST\.zip,SECOND\.zip\]"):
        source_of("data=cats")()


@pytest.mark.slow
def test_the_recipes_of_the_systems_are_plain_yaml():
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cats, flowers = (compose("prepare", [f"data={name}"]).data for name in ("cats", "flowers"))
    assert (cats.split.test, cats.split.val, cats.split.seed, cats.classes.top) == (0.2, 0.16, 83, 50)
    assert (flowers.split.test, flowers.split.val, flowers.split.seed) == (0.05, 0.05, 2024)


class Pictures:
    """Shaped like a data set of torchvision."""

    classes = ("cat", "dog/wolf")

    def __init__(self, count: int = 6) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return Image.new("RGB", (5, 5), (index * 40, 0, 0)), index % 2


def pictures(root: str, download: bool) -> Pictures:
    return Pictures()


def test_a_torchvision_data_set_is_written_once(here):
    source = TorchvisionDataset("data/set", pictures, test=lambda **_: Pictures(2), val=lambda **_: Pictures(4))
    tree = found(source())
    assert parts(tree) == {"train": 6, "val": 4, "test": 2}
    assert classes(tree) == ["cat", "dog_wolf"]
    assert TorchvisionDataset("data/set", lambda **_: pytest.fail("fetched again"))() == Path("data/set")
    assert sorted(path.name for path in Path("data/set").iterdir()) == ["test", "train", "val"]


def test_files_that_lie_on_the_disk_are_kept_as_they_are(here, make_tree):
    originals = sorted(make_tree("set", cat=2, dog=2).rglob("*.png"))

    class Files(Pictures):
        def __init__(self) -> None:
            super().__init__(4)
            self._images, self._labels = originals, [0, 0, 1, 1]

        def __getitem__(self, index: int):
            pytest.fail("decoded")

    root = TorchvisionDataset("data/set", lambda **_: Files())()
    assert [path.read_bytes() for path in sorted(root.rglob("*.png"))] == [path.read_bytes() for path in originals]


def pets(folder: Path) -> dict[str, Path]:
    """The two archives of Oxford-IIIT Pet, in small."""
    names = [f"{breed}_{number}" for breed in ("Abyssinian", "great_pyrenees") for number in range(1, 4)]
    for position, name in enumerate(names):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (position * 40, 0, 0)).save(folder / "images" / f"{name}.jpg")
    (folder / "annotations").mkdir()
    for part, chosen in (("trainval", names[:2] + names[3:5]), ("test", [names[2], names[5]])):
        lines = [f"{name} {1 + name.startswith('great')} 1 1" for name in chosen]
        (folder / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")
    archives = {name: folder / f"{name}.tar.gz" for name in ("images", "annotations")}
    for name, archive in archives.items():
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder / name, name)
    return archives


def test_torchvision_unpacks_what_was_downloaded(here, server: Server, monkeypatch):  # noqa: F811
    from torchvision.datasets import OxfordIIITPet

    archives = pets(here / "made")
    resources, files = [], []
    for name, archive in archives.items():
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        files.append({"url": f"{server.url}/{name}.tar.gz", "md5": md5, "path": f"oxford-iiit-pet/{name}.tar.gz"})
        resources.append((f"https://nowhere.invalid/{name}.tar.gz", md5))
    place = here / "data/downloads" / files[1]["path"]
    place.parent.mkdir(parents=True)
    shutil.copy(archives["annotations"], place)  # put there by hand
    server.content = archives["images"].read_bytes()
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", tuple(resources))
    train, test = (deferred("torchvision.datasets.OxfordIIITPet", split=split) for split in ("trainval", "test"))
    root = TorchvisionDataset("data/pets", train, test=test, files=files)()
    tree = found(root)
    assert parts(tree) == {"train": 4, "test": 2}
    assert classes(tree) == ["Abyssinian", "Great Pyrenees"]
    assert (root / "train/Abyssinian/000000.jpg").read_bytes() == (here / "made/images/Abyssinian_1.jpg").read_bytes()
    assert sorted(path.name for path in root.iterdir()) == ["test", "train"]


@pytest.fixture
def offline(monkeypatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_without_a_network_one_line_says_what_to_fetch_and_where_to_put_it(here, offline, name):
    source = source_of(f"data={name}")
    with pytest.raises(SourceError) as error:
        source()
    line = str(error.value)
    assert "\n" not in line
    for file in source.files:
        assert file["url"] in line
        assert f"'data/downloads/{file['path']}'" in line
    assert not list(Path("data").glob(f"{name}*"))


@pytest.mark.parametrize("name", DOWNLOADED)
def test_without_a_network_the_command_ends_with_2(here, offline, command, name):
    answer = command("prepare", f"data={name}")
    assert answer.code == 2
    assert [line for line in answer.err.splitlines() if line.startswith("error: https://")] != []


@pytest.mark.parametrize("name", DOWNLOADED)
def test_the_files_are_those_that_torchvision_knows(name):
    from torchvision import datasets

    files = {(file["url"], file["md5"], Path(file["path"]).name) for file in source_of(f"data={name}").files}
    if name == "cifar10":
        known = {(datasets.CIFAR10.url, datasets.CIFAR10.tgz_md5, datasets.CIFAR10.filename)}
    elif name == "flowers102":
        prefix = datasets.Flowers102._download_url_prefix
        known = {(prefix + file, md5, file) for file, md5 in datasets.Flowers102._file_dict.values()}
    else:
        known = {(url, md5, Path(url).name) for url, md5 in datasets.OxfordIIITPet._RESOURCES}
    assert files == known


def test_a_damaged_data_set(here, tree):
    def fail(**_: object) -> Pictures:
        raise RuntimeError("File not found or corrupted.")

    with pytest.raises(SourceError, match=r"corrupted.*data\.archive=PATH"):
        TorchvisionDataset("data/set", fail)()
    assert not Path("data/set").exists()
    packed(tree, here / "set.tar")
    assert len(found(TorchvisionDataset("data/set", fail, archive="set.tar")()).images) == 20


def test_deferred_loads_nothing_and_takes_only_data_sets():
    code = """if True:
        import sys
        from image_classifier.dataset.sources import deferred
        deferred("torchvision.datasets.CIFAR10", train=True)
        assert not {"torch", "torchvision"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(ConfigError, match="torchvision.datasets"):
        deferred("os.system", command="true")


def test_sources_load_no_client_before_it_is_needed():
    code = """if True:
        import sys, image_classifier.dataset.sources
        assert not {"torch", "sklearn", "hydra", "dvc", "datasets", "kagglehub", "pyarrow"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_hub_needs_a_name():
    with pytest.raises(ConfigError, match="pass data.dir=hf:OWNER/NAME"):
        Hub(None, "hf")()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "images", "labels", "splits"),
    [
        ("simpsons-mnist.tar.gz", 10_000, 10, {"train": 8000, "test": 2000}),
        ("flowers-native.tar", 700, 5, {"": 700}),
        ("clothing.tar", 1513, 10, {"train": 800, "val": 341, "test": 372}),
    ],
)
def test_real_sets(here, shared_data, name, images, labels, splits):
    if not (shared_data / name).exists():
        pytest.skip(f"{name} is not here")
    tree = found(Folder(archive=name, search=[os.fspath(shared_data)])())
    assert (len(tree.images), len(classes(tree)), parts(tree)) == (images, labels, splits)
