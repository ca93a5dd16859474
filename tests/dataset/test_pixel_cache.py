from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from image_classifier.dataset import pixel_cache as cache_module
from image_classifier.dataset.pixel_cache import CacheSettings, PixelCache, open_cache
from image_classifier.dataset.reader import ImageReader
from image_classifier.errors import ConfigError, DataError, StorageError
from image_classifier.images import Preprocess, decode
from image_classifier.manifest import Manifest, Record
from tests.conftest import ROOT, listed, write_image

PREPROCESS = Preprocess(8)
ROW = 8 * 8 * 3


@pytest.fixture
def settings(tmp_path) -> CacheSettings:
    return CacheSettings(str(tmp_path / "cache"))


def expected(manifest: Manifest) -> np.ndarray:
    return np.stack([PREPROCESS(decode(manifest.file(record))) for record in manifest])


def everything(cache: PixelCache) -> np.ndarray:
    return cache.gather(np.arange(len(cache.rows)))


def store(settings: CacheSettings) -> Path:
    (directory,) = Path(settings.dir).iterdir()
    return directory


def no_decode(monkeypatch) -> None:
    monkeypatch.setattr(ImageReader, "read", lambda *_: pytest.fail("decoded again"))


def test_the_cache_is_the_evaluation_path(tree, settings, monkeypatch):
    manifest = listed(tree)
    cache = open_cache(manifest, PREPROCESS, settings)
    np.testing.assert_array_equal(everything(cache), expected(manifest))
    assert cache.size == 8
    assert not cache.pixels.flags.writeable
    assert everything(cache).flags.writeable
    no_decode(monkeypatch)
    np.testing.assert_array_equal(everything(open_cache(manifest, PREPROCESS, settings)), expected(manifest))


def test_only_new_images_are_decoded_and_copies_once(tree, settings, monkeypatch):
    open_cache(listed(tree), PREPROCESS, settings)
    write_image(tree / "cat" / "new.png", 500)
    shutil.copy(tree / "cat" / "new.png", tree / "cat" / "copy.png")
    decoded: list[bytes] = []
    read = ImageReader.read
    monkeypatch.setattr(
        ImageReader, "read", lambda self, path, digest: decoded.append(digest) or read(self, path, digest)
    )
    manifest = listed(tree)
    cache = open_cache(manifest, PREPROCESS, settings)
    assert len(decoded) == 1
    assert len(cache.pixels) == 21
    np.testing.assert_array_equal(everything(cache), expected(manifest))


def test_other_preprocessing_has_its_own_cache(tree, settings):
    manifest = listed(tree)
    for preprocess in (PREPROCESS, Preprocess(8, "pad"), Preprocess(8, interpolation="bicubic")):
        open_cache(manifest, preprocess, settings)
    assert len(list(Path(settings.dir).iterdir())) == 3


def cut_index(directory: Path) -> None:
    os.truncate(directory / "index.u8", 7 * 32 + 5)


def lengthen_pixels(directory: Path) -> None:
    with (directory / "pixels.u8").open("ab") as file:
        file.write(b"x" * (ROW + 5))


def cut_pixels(directory: Path) -> None:
    with (directory / "pixels.u8").open("r+b") as file:
        file.truncate(3 * ROW + 1)


def spoil_index(directory: Path) -> None:
    (directory / "index.u8").write_bytes(b"\xff garbage\n" * 30)


@pytest.mark.parametrize(
    "harm", [[cut_index], [lengthen_pixels], [cut_index, lengthen_pixels], [cut_pixels], [spoil_index]]
)
@pytest.mark.parametrize("added", [False, True])
def test_a_crash_or_damage_heals(tree, settings, harm, added):
    open_cache(listed(tree), PREPROCESS, settings)
    for step in harm:
        step(store(settings))
    if added:
        write_image(tree / "dog" / "new.png", 500)
    manifest = listed(tree)
    cache = open_cache(manifest, PREPROCESS, settings)
    np.testing.assert_array_equal(everything(cache), expected(manifest))
    if added and harm != [spoil_index]:  # rows that no name finds any more stay until `clean`
        assert (store(settings) / "pixels.u8").stat().st_size == len(manifest) * ROW


@pytest.mark.parametrize("missing", ["index.u8", "pixels.u8"])
def test_a_lost_file_heals(tree, settings, missing):
    manifest = listed(tree)
    open_cache(manifest, PREPROCESS, settings)
    (store(settings) / missing).unlink()
    np.testing.assert_array_equal(everything(open_cache(manifest, PREPROCESS, settings)), expected(manifest))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_leaves_what_was_there(tree, settings, monkeypatch, number):
    old = listed(tree)
    open_cache(old, PREPROCESS, settings)
    before = {path.name: path.read_bytes() for path in store(settings).iterdir()}
    write_image(tree / "dog" / "new.png", 500)

    def refuse(*_):
        raise OSError(number, "refused")

    monkeypatch.setattr(cache_module.os, "fsync", refuse)
    with pytest.raises(StorageError):
        open_cache(listed(tree), PREPROCESS, settings)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in store(settings).iterdir()} == before


def test_too_little_space_is_known_before(tree, settings, monkeypatch):
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 100))
    with pytest.raises(StorageError, match=r"MB.*data.cache.dir=PATH"):
        open_cache(listed(tree), PREPROCESS, settings)
    assert not (store(settings) / "pixels.u8").exists()


def test_unreadable_images_are_named_and_the_rest_is_kept(tree, settings):
    manifest = listed(tree)
    content = (tree / "cat" / "000.png").read_bytes()
    broken = []
    for name in ("cut1.png", "cut2.png"):
        (tree / "cat" / name).write_bytes(content[:-30] + name.encode())  # the header is fine
        digest = hashlib.sha256((tree / "cat" / name).read_bytes()).hexdigest()
        broken.append(Record(f"cat/{name}", "cat", "train", digest[:16], digest, 12, 12))
    with pytest.raises(DataError, match=r"2 images .*cut1.png.*cut2.png"):
        open_cache(Manifest.of(tree, [*broken, *manifest]), PREPROCESS, settings)
    np.testing.assert_array_equal(everything(open_cache(manifest, PREPROCESS, settings)), expected(manifest))


def test_a_file_that_changed_is_not_taken_for_the_old_one(tree, settings):
    manifest = listed(tree)
    write_image(tree / "cat" / "003.png", 777)
    with pytest.raises(DataError, match=r"1 images .*changed since the manifest was written.*cat/003.png"):
        open_cache(manifest, PREPROCESS, settings)


def test_two_builders_at_once(tree, settings):
    manifest = listed(tree)
    with ThreadPoolExecutor(4) as pool:
        caches = list(pool.map(lambda _: open_cache(manifest, PREPROCESS, settings), range(4)))
    for cache in caches:
        np.testing.assert_array_equal(everything(cache), expected(manifest))
    assert (store(settings) / "pixels.u8").stat().st_size == len(manifest) * ROW


def test_mean_and_std_are_exact_and_know_no_order(tree, settings, monkeypatch):
    cache = open_cache(listed(tree), PREPROCESS, settings)
    indices = np.arange(5, 20)
    monkeypatch.setattr(cache_module, "_CHUNK_BYTES", 4 * ROW)
    mean, std = cache.mean_std(indices)
    pixels = cache.gather(indices).reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=0), rtol=1e-9)
    assert cache.mean_std(indices[::-1]) == (mean, std)


def test_a_constant_channel_has_a_std():
    cache = PixelCache(np.full((2, 4, 4, 3), 9, np.uint8), np.array([0, 1]))
    assert cache.mean_std(np.array([0, 1]))[1] == [1 / 255] * 3
    with pytest.raises(DataError, match="no training images"):
        cache.mean_std(np.array([], dtype=np.int64))


@pytest.mark.parametrize(
    ("values", "key"), [({"workers": 0}, "workers"), ({"max_gb": -1}, "max_gb"), ({"max_gb": float("nan")}, "max_gb")]
)
def test_settings_that_cannot_be(values, key):
    with pytest.raises(ConfigError, match=rf"data\.cache\.{key}"):
        CacheSettings(**values)


@pytest.mark.parametrize("room", [0, 7, 19, 20, 100])
def test_a_full_cache_decodes_the_rest_each_time(tree, tmp_path, room):
    manifest = listed(tree)
    settings = CacheSettings(str(tmp_path / "cache"), max_gb=room * ROW / 1e9)
    cache = open_cache(manifest, PREPROCESS, settings)
    assert len(cache.pixels) == min(room, 20)
    assert cache.is_whole == (room >= 20)
    np.testing.assert_array_equal(everything(cache), expected(manifest))
    some = np.array([19, 0, 7, 7, 3])
    np.testing.assert_array_equal(cache.gather(some), expected(manifest)[some])
    again = open_cache(manifest, PREPROCESS, settings)
    assert len(again.pixels) == min(room, 20)
    assert again.mean_std(np.arange(20)) == open_cache(
        manifest, PREPROCESS, CacheSettings(str(tmp_path / "whole"))
    ).mean_std(np.arange(20))


def test_the_bound_holds_for_all_image_sizes_together(tree, tmp_path):
    manifest = listed(tree)
    settings = CacheSettings(str(tmp_path / "cache"), max_gb=25 * ROW / 1e9)
    assert open_cache(manifest, PREPROCESS, settings).is_whole
    other = open_cache(manifest, Preprocess(8, "pad"), settings)
    assert len(other.pixels) == 5
    np.testing.assert_array_equal(
        everything(other), np.stack([Preprocess(8, "pad").read(manifest.file(record)) for record in manifest])
    )


def test_a_file_that_changes_under_a_full_cache_is_noticed(tree, tmp_path):
    cache = open_cache(listed(tree), PREPROCESS, CacheSettings(str(tmp_path / "cache"), max_gb=0))
    write_image(tree / "cat" / "003.png", 777)
    with pytest.raises(DataError, match=r"cat/003.png' changed"):
        everything(cache)


def test_mean_and_std_of_a_full_cache_are_of_a_sample(tree, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache_module, "_SAMPLE", 4)
    cache = open_cache(listed(tree), PREPROCESS, CacheSettings(str(tmp_path / "cache"), max_gb=0))
    with caplog.at_level("INFO"):
        mean, _ = cache.mean_std(np.arange(20))
    np.testing.assert_allclose(
        mean, cache.gather(np.array([0, 6, 12, 19])).reshape(-1, 3).mean(axis=0) / 255, rtol=1e-9
    )
    assert "4 of the 20 training images" in caplog.text


_KILLED = """
import sys
from image_classifier.dataset import pixel_cache as cache
from tests.conftest import listed
from pathlib import Path
from image_classifier.images import Preprocess
cache._COMMIT = 3
commit, number = cache._commit, 0
def counted(*parts):
    global number
    number += 1
    commit(*parts)
    print(number, flush=True)
    if number == 3:
        sys.stdin.read()  # killed here
cache._commit = counted
cache.open_cache(listed(Path(sys.argv[1])), Preprocess(8), cache.CacheSettings(sys.argv[2], workers=1))
"""


def test_a_killed_builder_leaves_what_it_had_committed(tree, settings):
    line = [sys.executable, "-c", _KILLED, str(tree), settings.dir]
    with subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() not in ("3", ""):
            pass
        process.kill()
    manifest = listed(tree)
    assert len(list(store(settings).glob("pixels.u8"))) == 1
    assert (store(settings) / "index.u8").stat().st_size == 9 * 32
    np.testing.assert_array_equal(everything(open_cache(manifest, PREPROCESS, settings)), expected(manifest))
    assert (store(settings) / "pixels.u8").stat().st_size == 20 * ROW
