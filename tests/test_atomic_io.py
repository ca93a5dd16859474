"""Files and folders appear whole or not at all."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from image_classifier import atomic_io
from image_classifier.atomic_io import atomic_directory, atomic_file, file_lock, write_text
from image_classifier.errors import StorageError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_a_full_disk_is_one_storage_error_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"good")
    code = f"""
import resource, signal
from pathlib import Path
from image_classifier.errors import StorageError
from image_classifier.atomic_io import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(Path({str(path)!r}), b"x" * 100_000)
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no space left" in done.stdout
    assert path.read_bytes() == b"good"
    assert os.listdir(tmp_path) == ["model.ckpt"]


def test_a_failed_folder_never_appears(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "bundle") as directory:
        (directory / "model.onnx").write_bytes(b"half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_a_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for content in ("one", "two"):
        with atomic_directory(target, overwrite=True) as directory:
            (directory / "name").write_text(content)
    with pytest.raises(StorageError, match="overwrite=true"), atomic_directory(target):
        pass
    assert (target / "name").read_text() == "two"
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_one_storage_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="no permission"):
        write_text(tmp_path / "file", "")


def test_a_folder_is_replaced_in_one_step_where_the_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    if not atomic_io._exchanged(first, second):
        pytest.skip("this file system cannot exchange two names")
    (first / "model").write_text("old")

    def killed(*paths: object) -> None:
        raise AssertionError("a second rename")

    monkeypatch.setattr(os, "rename", killed)
    with atomic_directory(first, overwrite=True) as directory:
        (directory / "model").write_text("new")
    assert (first / "model").read_text() == "new" and sorted(os.listdir(tmp_path)) == ["first", "second"]


def test_a_kill_between_the_two_renames_loses_no_folder(tmp_path: Path) -> None:
    old = tmp_path / ".bundle.old"
    old.mkdir()
    (old / "name").write_text("good")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "bundle", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "bundle" / "name").read_text() == "good"


def test_what_dead_processes_left_is_swept_and_what_living_ones_write_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    for owner in (dead.pid, os.getpid()):
        (tmp_path / f".bundle.{host}-{owner}.x.part").mkdir()
    with atomic_directory(tmp_path / "bundle"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".bundle.{host}-{os.getpid()}.x.part", "bundle"]


def test_a_lock_that_is_removed_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    lock, inside, most = tmp_path / "lock", [0], [0]

    def work() -> None:
        for _ in range(50):
            with file_lock(lock, remove=True):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and os.listdir(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), file_lock(lock, remove=True):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
