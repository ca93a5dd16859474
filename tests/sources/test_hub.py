from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from image_classifier.dataset.sources import Folder, Hub
from image_classifier.errors import ConfigError, SourceError
from image_classifier.sources.hub import fetch_from_hub, is_hub_name


class ImageFeature:
    """datasets.Image"""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class ClassLabel:
    """datasets.ClassLabel"""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def int2str(self, number: int) -> str:
        return self.names[number]


class Value:
    """datasets.Value"""


class Rows:
    """What of datasets.Dataset is used."""

    def __init__(self, features: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        self.features, self.rows = features, rows

    def select_columns(self, names: list[str]) -> Rows:
        return Rows(
            {name: self.features[name] for name in names}, [{name: row[name] for name in names} for row in self.rows]
        )

    def cast_column(self, name: str, feature: Any) -> Rows:
        return Rows({**self.features, name: feature}, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        image = next(name for name, feature in self.features.items() if isinstance(feature, ImageFeature))
        assert not self.features[image].decode, "decoding and encoding again would change the pixels"
        return iter(self.rows)


def picture(kind: str, shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file, kind)
    return file.getvalue()


def rows(count: int, names: list[str], **more: Any) -> Rows:
    images = [{"bytes": picture("JPEG" if number % 2 else "PNG", number), "path": None} for number in range(count)]
    return Rows(
        {"image": ImageFeature(), "label": ClassLabel(names), **more},
        [{"image": image, "label": number % len(names), **dict.fromkeys(more)} for number, image in enumerate(images)],
    )


Install = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def hugging_face(monkeypatch) -> Install:
    """Put a fake `datasets` in place, whose load_dataset gives what it is told to."""

    def install(splits: dict[str, Rows] | Exception) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(*arguments: Any, **options: Any) -> dict[str, Rows]:
            calls.append((*arguments, options))
            if isinstance(splits, Exception):
                raise splits
            return splits

        client = ModuleType("datasets")
        vars(client).update(
            Image=ImageFeature, ClassLabel=ClassLabel, load_dataset=load_dataset, disable_progress_bars=lambda: None
        )
        monkeypatch.setitem(sys.modules, "datasets", client)
        return calls

    return install


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_the_files_come_as_they_are_in_folders_of_their_class(here, hugging_face):
    splits = {"train": rows(4, ["cat", "dog/wolf"]), "test": rows(2, ["cat", "dog/wolf"])}
    calls = hugging_face(splits)
    root = Hub("hf:owner/pets", "hf", revision="v1")()
    assert calls == [("owner/pets", None, {"revision": "v1"})]
    assert root == Path("data/hf/owner--pets--v1")
    expected = ["test/cat/000000.png", "test/dog_wolf/000001.jpg", "train/cat/000000.png", "train/cat/000002.png"]
    assert files(root) == [*expected, "train/dog_wolf/000001.jpg", "train/dog_wolf/000003.jpg"]
    assert (root / "train/cat/000002.png").read_bytes() == splits["train"].rows[2]["image"]["bytes"]
    assert Hub("owner/pets", "hf", revision="v1")() == root
    assert len(calls) == 1


def test_one_split_is_no_split(here, hugging_face):
    hugging_face({"train": rows(4, ["cat", "dog"])})
    assert files(Folder(dir="hf:owner/pets")()) == [
        "cat/000000.png",
        "cat/000002.png",
        "dog/000001.jpg",
        "dog/000003.jpg",
    ]


def test_a_file_that_lies_elsewhere_is_copied(here, hugging_face, make_tree):
    original = make_tree("owner/pets", cat=1) / "cat/000.png"  # a repository on the disk
    table = rows(2, ["cat", "dog"])
    table.rows[0]["image"] = {"bytes": None, "path": str(original)}
    hugging_face({"train": table})
    root = fetch_from_hub("hf:owner/pets:small", here)
    assert (root / "cat/000000.png").read_bytes() == original.read_bytes()


def test_labels_may_be_texts_and_rows_unlabelled(here, hugging_face, caplog):
    table = rows(4, ["cat", "dog"])
    table.features["label"] = Value()
    for row, label in zip(table.rows, ["owl", "emu", None, -1], strict=True):
        row["label"] = label
    hugging_face({"train": table})
    assert files(fetch_from_hub("hf:birds", here)) == ["emu/000001.jpg", "owl/000000.png"]
    assert "2 images without a label are skipped" in caplog.text


def test_columns_that_cannot_be_told_are_asked_for(here, hugging_face):
    hugging_face({"train": rows(4, ["cat", "dog"], mask=ImageFeature(), breed=ClassLabel(["a", "b"]))})
    with pytest.raises(
        ConfigError,
        match=r"image_column is not clear: the columns are image, label, mask, breed: "
        r"pass data=hf data\.source\.image_column=NAME",
    ):
        fetch_from_hub("hf:owner/pets", here)
    assert not (here / "hf/owner--pets").exists()
    assert files(fetch_from_hub("hf:owner/pets", here, image_column="image", label_column="label")) != []
    with pytest.raises(ConfigError, match="label_column"):
        fetch_from_hub("hf:owner/other", here, image_column="image", label_column="labl")


def test_what_the_client_says_is_one_line(here, hugging_face):
    hugging_face(ConnectionError("Couldn't reach 'owner/pets'\non the Hub"))
    hint = r"no network\? get https://huggingface\.co/datasets/owner/pets elsewhere and pass data\.dir=FOLDER"
    with pytest.raises(
        SourceError, match=rf"^'hf:owner/pets' cannot be fetched \(Couldn't reach 'owner/pets' on the Hub\): {hint}.*$"
    ):
        fetch_from_hub("hf:owner/pets", here)
    assert not (here / "hf").exists()


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("hf:owner/pets", "datasets", "hf"), ("kaggle:owner/pets", "kagglehub", "kaggle")]
)
def test_a_client_that_is_not_installed(here, monkeypatch, name, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    hint = rf"pip install 'image-classifier\[{extra}\]'"
    with pytest.raises(SourceError, match=f"the client {package} is not installed: {hint}"):
        fetch_from_hub(name, here)


@pytest.mark.parametrize("name", ["hf:", "hf:../x", "kaggle:/etc", "hf:owner/", "hf:a b"])
def test_names_that_cannot_be(here, name):
    assert is_hub_name(name)
    with pytest.raises(ConfigError, match="is not the name of a data set"):
        fetch_from_hub(name, here)


@pytest.fixture
def kaggle(monkeypatch) -> list[str]:
    """A fake `kagglehub`: data sets lie where CACHE says; calls are noted."""
    calls: list[str] = []

    def download(name: str) -> str:
        calls.append(name)
        if not KAGGLE_CACHE:
            raise ConnectionError("HTTPSConnectionPool(host='www.kaggle.com'): Max retries exceeded")
        return KAGGLE_CACHE[-1]

    client = ModuleType("kagglehub")
    vars(client).update(dataset_download=download, competition_download=download)
    monkeypatch.setitem(sys.modules, "kagglehub", client)
    KAGGLE_CACHE.clear()
    return calls


KAGGLE_CACHE: list[str] = []


def test_kaggle_is_asked_once(here, kaggle, make_tree):
    cache = make_tree("cache/versions/3", cat=2, dog=2)
    KAGGLE_CACHE.append(str(cache))
    root = Folder(dir="kaggle:owner/pets")()
    assert files(root) == files(cache)
    assert Hub("owner/pets", "kaggle")() == root == Path("data/kaggle/owner--pets")
    assert kaggle == ["owner/pets"]
    cache.rename(here / "moved")  # the client's cache was emptied
    KAGGLE_CACHE[:] = [str(here / "moved")]
    assert len(files(Folder(dir="kaggle:owner/pets")())) == 4
    assert kaggle == ["owner/pets", "owner/pets"]


def test_kaggle_without_a_network(here, kaggle):
    page = r"https://www\.kaggle\.com/competitions/journey-springfield in a browser and pass data\.archive=FILE\.zip"
    with pytest.raises(
        SourceError, match=rf"'kaggle:journey-springfield' cannot be fetched \(.*Max retries.*get {page}"
    ):
        fetch_from_hub("kaggle:journey-springfield", here)


@pytest.mark.parametrize("label", ["..", ".", ".hidden", "", "a\0b"])
def test_a_class_that_is_no_folder_is_refused_and_nothing_is_left(hugging_face, here, label):
    hugging_face({"train": rows(4, ["cat", label])})
    with pytest.raises(SourceError, match="cannot be used as the name of a folder"):
        fetch_from_hub("hf:owner/pets", here / "data")
    assert not [path for path in here.rglob("*") if path.is_file()]


def test_two_classes_never_share_a_folder(hugging_face, here):
    hugging_face({"train": rows(4, ["a/b", "a_b"])})
    with pytest.raises(SourceError, match="would share a folder"):
        fetch_from_hub("hf:owner/pets", here / "data")


def test_a_row_cannot_name_a_file_of_this_machine(hugging_face, here):
    (here / "secret.png").write_bytes(picture("PNG", 1))
    wicked = rows(2, ["cat", "dog"])
    wicked.rows[0]["image"] = {"bytes": None, "path": str(here / "secret.png")}
    hugging_face({"train": wicked})
    with pytest.raises(SourceError, match="does not belong to it"):
        fetch_from_hub("hf:owner/pets", here / "data")
    assert not list((here / "data").rglob("*.png"))
