"""A kill or a full disk in the middle of a save never costs the checkpoint that was good."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from image_classifier.training.checkpoint_io import SafeCheckpointIO

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


def test_a_full_disk_is_one_storage_error_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint({"step": 1}, path)
    done = subprocess.run([sys.executable, "-c", _FULL, str(path)], capture_output=True, text=True, check=True)
    assert "no space left" in done.stdout
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]
