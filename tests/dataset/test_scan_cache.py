from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from image_classifier.dataset import scan as facts_module
from image_classifier.dataset.discovery import discover
from image_classifier.errors import StorageError
from tests.conftest import ROOT, write_image
from tests.dataset.conftest import LIMITS, assert_fresh, read, scanned


def test_long_scans_are_kept_in_pieces_and_end_as_one(make_tree, facts_store, tmp_path, monkeypatch, fine_clock):
    monkeypatch.setattr(facts_module, "_BLOCK_FILES", 3)
    monkeypatch.setattr(facts_module, "_COMMIT_FILES", 10)
    found, facts = scanned(make_tree(cat=25, dog=12), facts_store)
    (folder,) = facts_store.iterdir()
    assert sorted(path.name for path in folder.iterdir())[1:] == ["lock"]
    monkeypatch.undo()
    assert_fresh(found, facts, tmp_path)


KILLED = """
import os, sys
from pathlib import Path
from image_classifier.dataset import scan, scan_cache
from image_classifier.dataset.discovery import discover
from image_classifier.images import DecodeLimits
scan._BLOCK_FILES, scan._COMMIT_FILES, scan._TICK_NS = 4, 8, 0
module, name, left = {place}
real = getattr(module, name)
def die(*arguments, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
    return real(*arguments, **options)
setattr(module, name, die)
scan.scan_files(discover([Path(sys.argv[1])]), Path(sys.argv[2]), DecodeLimits(), (255, 255, 255), 2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "kept"),
    [
        ("scan, 'load_bytes', 30", 8),
        ("scan_cache, '_read', 2", 8),
        ("scan_cache.np, 'save', 3", 16),
        ("scan_cache, '_errors', 6", 40),
        ("scan_cache.shutil, 'rmtree', 9", 40),
    ],
)
def test_a_killed_scan_goes_on_where_it_was(make_tree, facts_store, tmp_path, opened, fine_clock, place, kept):
    root = make_tree(cat=20, dog=22)
    time.sleep(0.03)
    line = [sys.executable, "-c", KILLED.format(place=place), str(root), str(facts_store)]
    assert subprocess.run(line, cwd=ROOT, timeout=60, check=False).returncode == -9
    found, facts = scanned(root, facts_store)
    assert len(opened) <= 42 - kept
    assert_fresh(found, facts, tmp_path)
    (folder,) = facts_store.iterdir()
    assert len([path for path in folder.iterdir() if path.name != "lock"]) == 1


def test_ctrl_c_keeps_what_was_read(make_tree, facts_store, tmp_path, opened, fine_clock, monkeypatch):
    monkeypatch.setattr(facts_module, "_BLOCK_FILES", 5)
    root = make_tree(cat=20, dog=20)
    time.sleep(0.03)
    real = facts_module._Scan._stamp
    calls: list[int] = []

    def interrupt(*arguments):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(facts_module._Scan, "_stamp", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scanned(root, facts_store)
    opened.clear()
    found, facts = scanned(root, facts_store)
    assert len(opened) == 20
    assert_fresh(found, facts, tmp_path)


TWO = """
import sys
from pathlib import Path
from image_classifier.dataset import scan
from image_classifier.dataset.discovery import discover
from image_classifier.images import DecodeLimits
scan._BLOCK_FILES, scan._COMMIT_FILES = 4, 8
for _ in range(5):
    found = scan.scan_files(discover([Path(sys.argv[1])]), Path(sys.argv[2]), DecodeLimits(), (255, 255, 255), 2)
print(found.digests.tobytes().hex() + found.thumbnails.tobytes().hex())
"""


@pytest.mark.slow
def test_two_scans_at_once(make_tree, facts_store, tmp_path):
    root = make_tree(cat=20, dog=20)
    line = [sys.executable, "-c", TWO, str(root), str(facts_store)]
    both = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    expected = read(discover([root]), tmp_path / "alone")
    assert printed == {expected.digests.tobytes().hex() + expected.thumbnails.tobytes().hex()}


@pytest.mark.parametrize("name", ["paths.bin", "table.npy", "thumbnails.npy", "errors.json"])
@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b""), lambda path: os.truncate(path, 150)]
)
def test_a_damaged_cache_is_built_again(make_tree, facts_store, tmp_path, name, damage, fine_clock, caplog):
    root = make_tree(cat=30)
    (root / "cat" / "000.png").write_bytes(b"x")
    before = scanned(root, facts_store)[1]
    digests = np.array(before.digests)
    (path,) = facts_store.rglob(name)
    damage(path)
    found, facts = scanned(root, facts_store)
    assert_fresh(found, facts, tmp_path)
    np.testing.assert_array_equal(facts.digests, digests)
    if path.exists() and name != "errors.json":
        assert "damaged" in caplog.text


def test_other_settings_and_roots_have_their_own_store(tree, make_tree, facts_store):
    found = discover([tree])
    small = replace(LIMITS, max_pixels=100)
    assert read(found, facts_store).errors == {}
    assert len(read(found, facts_store, limits=small).errors) == 20
    read(found, facts_store, background=(0, 0, 0))
    read(discover([make_tree("second", cat=1)]), facts_store)
    assert len(list(facts_store.iterdir())) == 4


def test_a_link_to_the_root_is_the_same_root(tree, facts_store, opened, fine_clock, tmp_path):
    scanned(tree, facts_store)
    opened.clear()
    (tmp_path / "link").symlink_to(tree)
    scanned(tmp_path / "link", facts_store)
    assert opened == []


def test_a_store_that_cannot_be_written(tree, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a file has that name"):
        read(discover([tree]), tmp_path / "file" / "facts")


def test_a_full_disk_is_told_and_leaves_the_old_store(tree, facts_store, monkeypatch, fine_clock, opened):
    scanned(tree, facts_store)
    write_image(tree / "cat" / "new.png", 99)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("numpy.save", full)
        with pytest.raises(StorageError, match="no space left"):
            scanned(tree, facts_store)
    opened.clear()
    scanned(tree, facts_store)
    assert opened == ["new.png"]


_REFUSED = """
import resource, signal, sys
from pathlib import Path
from image_classifier.dataset.scan import scan_files
from image_classifier.dataset.discovery import discover
from image_classifier.errors import StorageError
from image_classifier.images import DecodeLimits
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tree, store = discover([Path(sys.argv[1])]), Path(sys.argv[2])
refused = 0
# Bytes a file may have: at each the system refuses another write.
for most in (1, 100, 500, 2000, 5000, 10_000, 15_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    try:
        scan_files(tree, store, DecodeLimits(), (255, 255, 255))
    except StorageError:
        refused += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(refused, len(scan_files(tree, store, DecodeLimits(), (255, 255, 255)).errors))
"""


@pytest.mark.slow
def test_a_disk_that_refuses_is_a_storage_error_wherever_it_does(make_tree, tmp_path):
    line = [sys.executable, "-c", _REFUSED, str(make_tree(cat=100, dog=100)), str(tmp_path / "store")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout.split() == ["7", "0"]
