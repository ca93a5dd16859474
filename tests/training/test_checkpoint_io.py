"""A kill or a full disk in the middle of a save never costs the checkpoint that was good."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from image_classifier.errors import CheckpointError
from image_classifier.training.checkpoint_io import (
    SafeCheckpointIO,
    damage,
    go_back_to,
    make_last,
    newest_readable,
    save_whole,
    step_path,
    steps,
    sweep,
)

_SAVE_FOR_EVER = """
import sys, torch
from image_classifier.training.checkpoint_io import SafeCheckpointIO
weights = torch.zeros(4_000_000)
print("ready", flush=True)
while True:
    SafeCheckpointIO().save_checkpoint({"weights": weights}, sys.argv[1])
"""


@pytest.mark.slow
def test_kill_9_while_saving_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint({"weights": torch.ones(4)}, path)
    for attempt in range(6):
        process = subprocess.Popen([sys.executable, "-c", _SAVE_FOR_EVER, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.037 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert "weights" in torch.load(path, weights_only=True)


_FULL = """
import resource, signal, sys, torch
from image_classifier.errors import StorageError
from image_classifier.training.checkpoint_io import SafeCheckpointIO
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # torch reports a full disk as a RuntimeError of its own
try:
    SafeCheckpointIO().save_checkpoint({"weights": torch.zeros(100_000)}, sys.argv[1])
except StorageError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_full_disk_is_one_storage_error_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint({"step": 1}, path)
    done = subprocess.run([sys.executable, "-c", _FULL, str(path)], capture_output=True, text=True, check=True)
    assert "no space left" in done.stdout
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def save(directory: Path, *numbers: int, keep: int = 9) -> None:
    for number in numbers:
        save_whole({"global_step": number, "weights": torch.full((1000,), float(number))}, step_path(directory, number))
        make_last(step_path(directory, number), keep)


def test_the_newest_few_are_kept_and_last_is_one_of_them(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 100_000, keep=2)
    assert [step for step, _ in steps(tmp_path)] == [100_000, 10]
    assert (tmp_path / "last.ckpt").samefile(step_path(tmp_path, 100_000)) and newest_readable(tmp_path) == step_path(
        tmp_path, 100_000
    )
    save(tmp_path, 100_000, keep=2)
    assert (tmp_path / "last.ckpt").samefile(step_path(tmp_path, 100_000)) and not list(tmp_path.glob(".*"))


def test_a_file_system_without_hard_links_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path, 5)
    assert (tmp_path / "last.ckpt").read_bytes() == step_path(tmp_path, 5).read_bytes()


@pytest.mark.parametrize("harm", ["cut", "one bit", "empty", "text"])
def test_every_damage_is_found_and_the_one_before_is_taken(
    harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 5, 10)
    path = step_path(tmp_path, 10)
    content = bytearray(path.read_bytes())
    if harm == "one bit":
        content[len(content) // 2] ^= 1  # within the weights
    path.write_bytes({"cut": content[:-1], "one bit": content, "empty": b"", "text": b"hello"}[harm])
    assert damage(path) and not damage(step_path(tmp_path, 5))
    assert newest_readable(tmp_path) == step_path(tmp_path, 5)
    assert "(last.ckpt) is damaged" in caplog.text


def test_without_any_good_one_the_best_is_taken_and_then_nothing(tmp_path: Path) -> None:
    assert newest_readable(tmp_path) is None
    save(tmp_path, 5)
    step_path(tmp_path, 5).write_text("broken")
    save_whole({"global_step": 3}, tmp_path / "best.ckpt")
    assert newest_readable(tmp_path) == tmp_path / "best.ckpt"
    (tmp_path / "best.ckpt").write_text("broken")
    with pytest.raises(CheckpointError, match="every checkpoint"):
        newest_readable(tmp_path)


def test_a_kill_between_the_checkpoint_and_its_second_name_costs_nothing(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save_whole({"global_step": 10}, step_path(tmp_path, 10))  # last.ckpt still is step 5
    assert newest_readable(tmp_path) == step_path(tmp_path, 10)


def test_who_goes_back_leaves_nothing_newer_behind(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15)
    go_back_to(step_path(tmp_path, 5), 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [step_path(tmp_path, 5).name]
    assert newest_readable(tmp_path) == step_path(tmp_path, 5)


@pytest.mark.parametrize(("best", "stays"), [(5, True), (10, False)])
def test_the_best_checkpoint_of_a_course_that_was_left_goes_too(best: int, stays: bool, tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    save_whole({"global_step": best}, tmp_path / "best.ckpt")
    go_back_to(step_path(tmp_path, 5), 5)
    assert (tmp_path / "best.ckpt").exists() == stays


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 5)
    (tmp_path / ".metrics.csv.x.part").touch()
    (tmp_path / "checkpoints" / ".step-000000006.ckpt.x.part").touch()
    sweep(tmp_path)
    assert not list(tmp_path.rglob("*.part")) and newest_readable(tmp_path / "checkpoints")
