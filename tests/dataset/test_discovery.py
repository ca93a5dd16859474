from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classifier.dataset.discovery import discover, list_folder, unreadable
from image_classifier.errors import ConfigError, DataError, UnreadableImage
from tests.conftest import write_image


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    return root


def labels(tree) -> dict[str, str]:
    return {image.path: image.label for image in tree.images}


def splits(tree) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for image in tree.images:
        found.setdefault(image.split, set()).add(image.label)
    return found


def test_a_folder_per_class(tree):
    deep = write_image(tree / "cat" / "kittens" / "deep" / "x.PNG", 99, size=7)
    found = discover([tree])
    assert found.root == tree
    assert Counter(image.label for image in found.images) == {"cat": 11, "dog": 10}
    assert [image.path for image in found.images] == sorted(image.path for image in found.images)
    image = next(image for image in found.images if image.path == "cat/kittens/deep/x.PNG")
    status = deep.stat()
    assert (image.label, image.split, image.key) == ("cat", "", "")
    assert (image.size, image.mtime_ns, image.ctime_ns) == (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    assert (found.strays, found.empty, found.ignored) == ((), (), ())


def test_no_file_is_opened(tree, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("opened")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    assert len(discover([tree]).images) == 20


def test_the_file_systems_order_does_not_matter(tree, monkeypatch):
    (tree / "empty").mkdir()
    touch(tree, "b.txt", "a.txt", "cat/notes.txt")
    expected = discover([tree])
    real = os.scandir

    class Reversed:
        def __init__(self, path):
            self.entries = real(path)

        def __enter__(self):
            return iter(sorted(self.entries, key=lambda entry: entry.name, reverse=True))

        def __exit__(self, *_):
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Reversed)
    assert discover([tree]) == expected


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: not name.startswith(".") and len(name.encode()) < 40
)


@given(files=st.dictionaries(st.tuples(NAMES, NAMES), st.booleans(), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_every_visible_file_is_an_image_of_its_folder_or_a_stray(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("any")
    names = {
        (f"c{folder}", f"{name}.png" if image else f"{name}.txt"): image for (folder, name), image in files.items()
    }
    for folder, name in names:
        touch(root, f"{folder}/{name}")
    images = {f"{folder}/{name}": folder for (folder, name), image in names.items() if image}
    if not images:
        with pytest.raises(DataError, match="holds no images"):
            discover([root])
        return
    found = discover([root])
    assert labels(found) == images
    assert set(found.strays) == {f"{folder}/{name}" for (folder, name), image in names.items() if not image}
    assert set(found.empty) == {folder for folder, _ in names} - set(images.values())


def test_strays_are_named_and_litter_is_not(tree):
    expected = discover([tree])
    touch(
        tree,
        "__MACOSX/cat/a.png",
        ".hidden/a.png",
        "cat/._a.png",
        "cat/.DS_Store",
        "cat/Thumbs.db",
        "cat/sub/desktop.ini",
    )
    assert discover([tree]) == expected
    touch(tree, "stray.png", "cat/notes.txt", "cat/noextension", "cat/sub/x.svg", "README.md")
    strays = ("README.md", "cat/noextension", "cat/notes.txt", "cat/sub/x.svg", "stray.png")
    assert discover([tree]) == replace(expected, strays=strays)


def test_strays_of_a_tree_in_parts(tmp_path):
    touch(
        tmp_path,
        "train/cat/a.png",
        "test/cat/a.png",
        "train/b.png",
        "labels.csv",
        "c.png",
        "docs/d.png",
        "train/cat/e.xml",
    )
    found = discover([tmp_path])
    assert found.strays == ("c.png", "labels.csv", "train/b.png", "train/cat/e.xml")
    assert found.ignored == ("docs",)


def test_what_is_left_out_is_said(tmp_path, caplog):
    touch(tmp_path, "train/cat/a.png", "train/dog/a.png", "train/b.png", "val/cat/a.png", "docs/d.png")
    discover([tmp_path])
    assert "1 images next to the class folders" in caplog.text
    assert "not part of any split and skipped: docs" in caplog.text


@pytest.mark.parametrize(
    "name", ["with space", "quote'\"", "-rf", "😀 名前", "percent%20", "a,b;c", "line\nbreak", "back\\slash"]
)
def test_odd_names_work(make_tree, name):
    root = make_tree(cat=2)
    try:
        touch(root, f"{name}/{name}.png", f"{name}/{name}")
    except OSError:
        pytest.skip("this file system refuses the name")
    found = discover([root])
    assert labels(found)[f"{name}/{name}.png"] == name
    assert found.strays == (f"{name}/{name}",)
    assert all((root / image.path).exists() for image in found.images)


def test_names_that_are_not_utf8_work_for_files_but_not_for_classes(tree):
    odd = os.fsdecode(b"latin-\xe9")
    try:
        touch(tree, f"cat/{odd}.png")
    except OSError:
        pytest.skip("this file system refuses the name")
    assert f"cat/{odd}.png" in labels(discover([tree]))
    touch(tree, f"{odd}/a.png")
    with pytest.raises(DataError, match="is not UTF-8"):
        discover([tree])
    assert "latin" in labels(discover([tree], {odd: "latin"})).values()


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "test"), {"train", "test"}),
        (("Training", "VALID", "Testing"), {"train", "val", "test"}),
        (("train", "validation"), {"train", "val"}),
        (("train",), {"train"}),
        (("train", "dev", "docs"), {"train", "val"}),  # docs is in no split
        (("val", "test"), {""}),  # no train part: two classes
    ],
)
def test_given_splits(tmp_path, folders, expected):
    for folder in folders:
        touch(tmp_path, f"{folder}/cat/a.png", f"{folder}/dog/a.png")
    found = discover([tmp_path])
    assert {image.split for image in found.images} == expected
    assert set(labels(found).values()) == ({"cat", "dog"} if "train" in expected else {"test", "val"})


def test_train_may_be_a_class_of_trains(make_tree):
    assert splits(discover([make_tree(train=2, bus=2)])) == {"": {"bus", "train"}}


def test_links_are_followed_but_not_in_circles(tree):
    (tree / "dog" / "circle").symlink_to(tree / "dog")
    (tree / "dog" / "up").symlink_to(tree)
    (tree / "wolf").symlink_to(tree / "dog")
    (tree / "dog" / "self").symlink_to("self")
    found = discover([tree])
    assert {image.label for image in found.images} == {"cat", "dog", "wolf"}
    assert len({image.path for image in found.images}) == len(found.images)
    assert sum(image.path.startswith("wolf/") and "/up/" not in image.path for image in found.images) == 10


def test_links_to_nowhere_are_images_that_nobody_can_read(tree):
    (tree / "dog" / "gone.png").symlink_to("nowhere.png")
    (tree / "dog" / "loop.png").symlink_to("loop.png")
    broken = [image for image in discover([tree]).images if image.size < 0]
    assert [image.path for image in broken] == ["dog/gone.png", "dog/loop.png"]


def test_empty_classes_are_named(tree):
    for name in ("bird", "fish/deep/er"):
        (tree / name).mkdir(parents=True)
    touch(tree, "fish/notes.txt")
    assert discover([tree]).empty == ("bird", "fish")


def test_images_without_class_folders(tmp_path):
    touch(tmp_path, "a.png")
    with pytest.raises(DataError, match="not in class folders: give each class its own"):
        discover([tmp_path])


@pytest.mark.parametrize("folders", [(), ("cat",), ("cat", "dog/deep")])
def test_a_tree_without_images(tmp_path, folders):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(DataError, match=f"'{tmp_path}' holds no images"):
        discover([tmp_path])


def test_a_missing_folder(tmp_path):
    with pytest.raises(DataError, match="cannot read the folder .*none' \\(No such file or directory\\)"):
        discover([tmp_path / "none"])
    with pytest.raises(ConfigError, match=r"no folder .*data\.dir=FOLDER"):
        discover([])


def test_a_folder_that_cannot_be_read_is_no_empty_class(tree, monkeypatch):
    real = os.scandir

    def refuse(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot read the folder '.*dog' \\(Permission denied\\): check"):
        discover([tree])


def test_progress_is_not_on_standard_output(tree, capfd):
    assert discover([tree], progress=True) == discover([tree])
    assert capfd.readouterr().out == ""


# Several roots


def test_roots_are_merged_by_class_name(tmp_path):
    touch(
        tmp_path,
        "x/a/cat/1.png",
        "x/a/dog/1.png",
        "x/b/cat/1.png",
        "x/b/bird/1.png",
        "x/b/note.txt",
        "x/unasked/fish/1.png",
    )
    (tmp_path / "x/b/none").mkdir()
    found = discover([tmp_path / "x/a", tmp_path / "x/b"])
    assert found.root == tmp_path / "x"
    assert labels(found) == {"a/cat/1.png": "cat", "a/dog/1.png": "dog", "b/cat/1.png": "cat", "b/bird/1.png": "bird"}
    assert (found.strays, found.empty) == (("b/note.txt",), ("b/none",))
    assert discover([tmp_path / "x/b", tmp_path / "x/a"]) == found


def test_a_root_in_parts_and_one_that_is_not(tmp_path):
    touch(tmp_path, "a/train/cat/1.png", "a/test/cat/1.png", "a/docs/x.png", "b/cat/1.png", "b/train/1.png")
    found = discover([tmp_path / "a", tmp_path / "b"])
    assert {image.path: (image.split, image.label) for image in found.images} == {
        "a/train/cat/1.png": ("train", "cat"),
        "a/test/cat/1.png": ("test", "cat"),
        "b/cat/1.png": ("", "cat"),
        "b/train/1.png": ("", "train"),
    }
    assert found.ignored == ("a/docs",)


def test_relative_roots_stay_relative(tmp_path, monkeypatch):
    touch(tmp_path, "data/a/cat/1.png", "data/b/cat/1.png", "c/cat/1.png")
    monkeypatch.chdir(tmp_path)
    assert discover([Path("data/a"), Path("data/b")]).root == Path("data")
    assert discover([Path("data/a"), Path("c")]).root == Path(".")
    assert set(labels(discover([Path("data/a"), Path("c")]))) == {"data/a/cat/1.png", "c/cat/1.png"}
    assert discover([Path("data/a")]).root == Path("data/a")
    monkeypatch.chdir(tmp_path / "data/b")
    found = discover([Path("../a"), Path("../../c")])
    assert all((found.root / image.path).exists() for image in found.images)


@pytest.mark.parametrize(
    ("second", "words"), [("a", "named twice"), ("a/cat", "is inside"), (".", "is inside"), ("link", "named twice")]
)
def test_roots_that_overlap_are_refused(tmp_path, second, words):
    touch(tmp_path, "a/cat/1.png")
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(ConfigError, match=f"data.dir: .*{words}.*: name each folder once"):
        discover([tmp_path / "a", tmp_path / second])


def test_neighbours_with_a_common_beginning_do_not_overlap(tmp_path):
    touch(tmp_path, "cats/cat/1.png", "cats2/cat/1.png")
    assert set(labels(discover([tmp_path / "cats", tmp_path / "cats2"]))) == {"cats/cat/1.png", "cats2/cat/1.png"}


def test_classes_are_renamed_and_so_merged(tmp_path):
    touch(tmp_path, "a/Katze/1.png", "a/dog/1.png", "b/cat/1.png")
    found = discover([tmp_path / "a", tmp_path / "b"], {"Katze": "cat", "dog": "Hund"})
    assert labels(found) == {"a/Katze/1.png": "cat", "a/dog/1.png": "Hund", "b/cat/1.png": "cat"}


def test_names_may_be_swapped(tmp_path):
    touch(tmp_path, "a/1.png", "b/1.png")
    assert labels(discover([tmp_path], {"a": "b", "b": "a"})) == {"a/1.png": "b", "b/1.png": "a"}


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        ({"Kat": "x"}, "'Kat', which is not a class: did you mean 'Katze'"),
        ({"zzz": "x"}, "not a class: classes: Katze, dog"),
        ({"dog": " "}, "no name"),
    ],
)
def test_a_rename_that_cannot_be(tmp_path, rename, words):
    touch(tmp_path, "Katze/1.png", "dog/1.png")
    with pytest.raises(ConfigError, match=words):
        discover([tmp_path], rename)


# Names and lines


def test_a_listing_is_sorted_and_shows_what_is_visible(tmp_path):
    touch(tmp_path, "b.png", "a.JPG", "z.txt", ".h.png", "d/x", "c/x", "__pycache__/x")
    listing = list_folder(tmp_path)
    assert (listing.folders, listing.images, listing.others) == (["c", "d"], ["a.JPG", "b.png"], ["z.txt"])


def test_unreadable_images_are_reported_in_one_line(tmp_path):
    failures = [UnreadableImage(tmp_path / f"bad{number}.jpg", "odd\nreason") for number in range(5)]
    text = str(unreadable(tmp_path, failures))
    assert "5 images" in text and "bad2.jpg" in text and "bad3.jpg" not in text and "and 2 more: delete" in text
    assert "\n" not in text
    assert isinstance(unreadable(tmp_path, failures[:1]), UnreadableImage)


def test_real_trees(shared_data, tmp_path):
    shutil.unpack_archive(shared_data / "clothing.tar", tmp_path, "tar", filter="data")
    (root,) = tmp_path.iterdir() if len(list(tmp_path.iterdir())) == 1 else (tmp_path,)
    assert {split: len(names) for split, names in splits(discover([root])).items()} == {
        "train": 10,
        "val": 10,
        "test": 10,
    }
    assert len(discover([root]).images) == 1513
