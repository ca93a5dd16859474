from __future__ import annotations

import hashlib
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_classifier.dataset import scan as facts_module
from image_classifier.dataset import workers
from image_classifier.dataset.discovery import FileTree, discover, discover_test
from image_classifier.errors import DataError, UnreadableImage
from image_classifier.images import DecodeLimits, inspect
from tests.conftest import write_image
from tests.dataset.conftest import LIMITS, WHITE, assert_fresh, assert_same, read, scanned


def test_facts_are_what_one_look_at_each_file_tells(tree, facts_store):
    write_image(tree / "cat" / "wide.png", 1, size=90)
    Image.new("L", (70, 30), 9).save(tree / "cat" / "grey.bmp")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tree / "dog" / "clear.webp")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((400, 900, 3), np.uint8)).save(tree / "dog" / "turned.jpg", exif=exif)
    found = discover([tree])
    facts = read(found, facts_store)
    assert len(facts) == len(found.images)
    assert facts.errors == {}
    for row, image in enumerate(found.images):
        content = (tree / image.path).read_bytes()
        header, pixels = inspect(content, LIMITS, WHITE, at_least=(64, 64))
        assert facts.digests[row].tobytes() == hashlib.sha256(content).digest()
        assert (facts.widths[row], facts.heights[row], facts.frames[row]) == (
            header.width,
            header.height,
            header.frames,
        )
        assert facts.format_names[facts.formats[row]] == header.format
        assert facts.mode_names[facts.modes[row]] == header.mode
        assert (facts.orientation[row], facts.bits[row], facts.transparent[row]) == (
            header.orientation,
            header.bits,
            header.transparent,
        )
        small = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(facts.thumbnails[row], small)
    assert [array.dtype for array in (facts.digests, facts.widths, facts.formats, facts.thumbnails)] == [
        np.uint8,
        np.int32,
        np.uint8,
        np.uint8,
    ]
    assert facts.thumbnails.shape == (len(facts), 16, 16, 3)
    turned = [image.path for image in found.images].index("dog/turned.jpg")
    assert (facts.widths[turned], facts.heights[turned], facts.orientation[turned]) == (400, 900, 6)


def test_transparency_is_laid_on_the_background(tree, facts_store):
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tree / "cat" / "000.png")
    found = discover([tree])
    assert (read(found, facts_store).thumbnails[0] == 255).all()
    assert (read(found, facts_store, background=(1, 2, 3)).thumbnails[0] == (1, 2, 3)).all()


def test_an_unchanged_tree_is_not_opened(tree, facts_store, opened, fine_clock):
    _, first = scanned(tree, facts_store)
    assert len(opened) == 20
    _, second = scanned(tree, facts_store)
    assert len(opened) == 20
    assert_same(first, second)
    assert not second.thumbnails.flags.writeable


def test_only_what_changed_is_opened(tree, facts_store, opened, fine_clock, tmp_path):
    scanned(tree, facts_store)
    opened.clear()
    write_image(tree / "cat" / "000.png", 500)
    write_image(tree / "cat" / "new.png", 501)
    (tree / "cat" / "001.png").rename(tree / "dog" / "moved.png")
    (tree / "dog" / "002.png").unlink()
    found, facts = scanned(tree, facts_store)
    assert sorted(opened) == ["000.png", "moved.png", "new.png"]
    assert_fresh(found, facts, tmp_path)


def test_broken_files_have_a_reason_and_are_not_opened_again(tree, facts_store, opened, fine_clock):
    (tree / "cat" / "000.png").write_bytes(b"no picture")
    (tree / "cat" / "001.png").write_bytes(b"")
    whole = (tree / "cat" / "002.png").read_bytes()
    (tree / "cat" / "002.png").write_bytes(whole[:-30])
    (tree / "cat" / "003.png").write_bytes(bytes(2000))
    limits = DecodeLimits(max_bytes=1500)
    time.sleep(0.03)
    facts = read(discover([tree]), facts_store, limits=limits)
    assert set(facts.errors) == {0, 1, 2, 3}
    assert facts.errors[0].startswith("not a")
    assert "empty" in facts.errors[1]
    assert "larger than" in facts.errors[3]
    assert facts.digests[0].tobytes() == hashlib.sha256(b"no picture").digest()
    assert not facts.thumbnails[:4].any()
    assert not facts.widths[:4].any()
    opened.clear()
    assert_same(read(discover([tree]), facts_store, limits=limits), facts)
    assert opened == []


def test_a_file_that_could_not_be_read_is_tried_again(tree, facts_store, monkeypatch, fine_clock):
    real = facts_module.load_bytes

    def refuse(path, limits):
        if path.name == "000.png":
            raise UnreadableImage(path, "Permission denied")
        return real(path, limits)

    monkeypatch.setattr(facts_module, "load_bytes", refuse)
    _, facts = scanned(tree, facts_store)
    assert facts.errors == {0: "Permission denied", 10: "Permission denied"}
    monkeypatch.setattr(facts_module, "load_bytes", real)
    assert scanned(tree, facts_store)[1].errors == {}


def test_a_link_to_nowhere_is_tried_again(tree, facts_store, fine_clock):
    (tree / "cat" / "link.png").symlink_to(tree / "target.png")
    assert "no such file" in next(iter(scanned(tree, facts_store)[1].errors.values()))
    write_image(tree / "target.png", 77)
    assert scanned(tree, facts_store)[1].errors == {}


def coarse(tree: FileTree) -> FileTree:
    """The tree as a file system with ticks of two seconds shows it."""
    tick = 2 * 10**9
    images = (
        replace(image, mtime_ns=image.mtime_ns // tick * tick, ctime_ns=image.ctime_ns // tick * tick)
        for image in tree.images
    )
    return replace(tree, images=tuple(images))


def test_a_change_within_the_tick_of_a_scan_is_seen(tree, facts_store, tmp_path):
    """As in git: what carries the time of the scan may have changed after it."""
    path = tree / "cat" / "000.png"
    Image.new("RGB", (9, 9), (1, 2, 3)).save(path, compress_level=0)
    size = path.stat().st_size
    read(coarse(discover([tree])), facts_store)
    Image.new("RGB", (9, 9), (9, 8, 7)).save(path, compress_level=0)
    assert path.stat().st_size == size
    found = coarse(discover([tree]))
    assert_fresh(found, read(found, facts_store), tmp_path)


def test_settled_files_are_not_opened_again_on_a_coarse_clock(tree, facts_store, opened, monkeypatch):
    found = coarse(discover([tree]))
    now = time.time_ns()
    monkeypatch.setattr(facts_module.time, "time_ns", lambda: now + 5 * 10**9)
    read(found, facts_store)
    opened.clear()
    read(found, facts_store)
    assert opened == []


def test_times_in_the_future_do_not_hide_changes(tree, facts_store, tmp_path):
    path = tree / "cat" / "000.png"
    future = time.time_ns() + 10**15
    Image.new("RGB", (9, 9), (1, 2, 3)).save(path, compress_level=0)
    os.utime(path, ns=(future, future))
    scanned(tree, facts_store)
    Image.new("RGB", (9, 9), (3, 2, 1)).save(path, compress_level=0)
    os.utime(path, ns=(future, future))
    assert_fresh(*scanned(tree, facts_store), tmp_path)


NAMES = ["a.png", "b.png", "-c.png", "d e.png", "e\nf.png", os.fsdecode(b"g\xe9.png")]
CHANGES = st.tuples(
    st.sampled_from(
        ["write", "edit", "edit and keep the time", "delete", "touch", "rename", "swap", "break", "copy with its time"]
    ),
    st.sampled_from(NAMES),
    st.sampled_from(NAMES),
    st.integers(0, 255),
)


def change(folder: Path, what: str, one: str, other: str, colour: int) -> None:
    """Do one thing to the files; pictures are as large in bytes as in each other, so that sizes tell nothing."""
    path, second = folder / one, folder / other
    times = path.stat() if path.exists() else None
    if what == "write" or not times:
        Image.new("RGB", (5, 5), (colour, 0, 9)).save(path, compress_level=0)
    elif what.startswith("edit"):
        with path.open("r+b") as file:
            file.seek(45)
            file.write(bytes([colour]))
        if "time" in what:
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif what == "delete":
        path.unlink()
    elif what == "touch":
        path.touch()
    elif what == "rename":
        path.rename(second)
    elif what == "swap" and second.exists() and one != other:
        path.rename(folder / "third")
        second.rename(path)
        (folder / "third").rename(second)
    elif what == "break":
        path.write_bytes(bytes([colour]) * (colour % 3))
    elif what == "copy with its time" and one != other:
        shutil.copy2(path, second)


@pytest.mark.slow
@given(rounds=st.lists(st.lists(CHANGES, max_size=4), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_whatever_happens_between_scans_the_facts_are_those_of_a_fresh_look(tmp_path_factory, rounds):
    base = tmp_path_factory.mktemp("changes")
    write_image(base / "tree" / "cat" / "stays.png", 1)
    for number, name in enumerate(NAMES):
        change(base / "tree" / "cat", "write", name, name, number)
        os.utime(base / "tree" / "cat" / name, ns=(0, 0))  # as an archive may unpack them
    opened: list[str] = []
    real = facts_module.load_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts_module, "_TICK_NS", 0)
        patch.setattr(os, "fsync", lambda _: None)  # which takes most of the time
        patch.setattr(facts_module, "load_bytes", lambda path, limits: opened.append(path.name) or real(path, limits))
        scanned(base / "tree", base / "store")
        for changes in rounds:
            opened.clear()
            for one in changes:
                change(base / "tree" / "cat", *one)
            tree, facts = scanned(base / "tree", base / "store")
            assert "stays.png" not in opened
            assert_fresh(tree, facts, base)


def test_parts_of_a_tree_share_what_is_known(tmp_path, facts_store, opened, fine_clock):
    root = tmp_path / "tree"
    for seed, path in enumerate(("train/cat/a.png", "train/dog/b.png", "test/cat/c.png", "val/cat/d.png")):
        write_image(root / path, seed)
    scanned(root, facts_store)
    opened.clear()
    facts = read(discover_test([root]), facts_store)
    assert len(facts) == 1
    write_image(root / "test" / "cat" / "e.png", 9)
    time.sleep(0.03)
    assert_fresh(discover_test([root]), read(discover_test([root]), facts_store), tmp_path)
    opened.clear()
    found, facts = scanned(root, facts_store)
    assert opened == []
    assert_fresh(found, facts, tmp_path)


@pytest.mark.slow
def test_processes_tell_what_threads_tell(make_tree, facts_store, tmp_path, monkeypatch):
    root = make_tree(cat=300, dog=300)
    (root / "cat" / "bad.png").write_bytes(b"bad")
    (root / "cat" / os.fsdecode(b"latin-\xe9.png")).write_bytes((root / "dog" / "000.png").read_bytes())
    found = discover([root])
    threads = read(found, facts_store)
    monkeypatch.setattr(workers, "MANY", 1)
    assert_same(read(found, tmp_path / "other"), threads)


def test_files_that_break_loaders(shared_data, facts_store, tmp_path):
    shutil.unpack_archive(shared_data / "dirty-images.tar.gz", tmp_path / "dirty", filter="data")
    root = next(path.parent for path in (tmp_path / "dirty").rglob("MANIFEST.tsv"))
    found, facts = scanned(root, facts_store)
    assert 10 < len(facts.errors) < len(facts) - 30
    good = np.setdiff1d(np.arange(len(facts)), list(facts.errors))
    assert (facts.widths[good] > 0).all()
    assert (facts.formats[good] != -1).all()
    assert all(reason and "\n" not in reason for reason in facts.errors.values())
    assert_same(read(found, facts_store), facts)


def test_a_worker_that_is_killed_is_one_line(tree, facts_store, monkeypatch):
    monkeypatch.setattr(
        facts_module,
        "map_blocks",
        lambda *_: (_ for _ in ()).throw(DataError("a worker process ended with SIGKILL", "free memory")),
    )
    with pytest.raises(DataError, match="SIGKILL"):
        read(discover([tree]), facts_store)
