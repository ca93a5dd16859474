"""However a run ends, what it leaves is true: metrics of the epoch they stand beside, newest and best checkpoint,
exit code.
"""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import QUICK, Command, MakeTree

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "data=folder",
    "data.dir=tree",
    "data.image_size=16",
    "data.batch_size=4",
    *QUICK,
    "model.backbone.channels=[4,8]",
    "name=run",
)


@pytest.fixture(autouse=True)
def in_a_folder_with_a_tree(tmp_path: Path, make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(cat=20, dog=20)
    monkeypatch.chdir(tmp_path)


def history() -> list[dict[str, str]]:
    with Path("runs/run/metrics.csv").open() as file:
        return list(csv.DictReader(file))


def checkpoint(name: str) -> dict[str, object]:
    content: dict[str, object] = torch.load(f"runs/run/checkpoints/{name}.ckpt", weights_only=True)
    return content


@pytest.mark.slow
def test_an_epoch_without_validation_has_no_validation_metrics(command: Command) -> None:
    answer = command("train", *SMALL, "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2", "scheduler=plateau")
    assert answer.code == 0, answer.err
    assert [bool(row["val/loss"]) for row in history()] == [False, True, True]  # the last epoch is always validated
    assert checkpoint("last")["global_step"] == 24
    assert checkpoint("best")["global_step"] == 16


@pytest.mark.slow
def test_a_run_cut_in_the_middle_of_an_epoch_says_that_epochs_loss(command: Command) -> None:
    answer = command("train", *SMALL, "trainer.max_epochs=5", "trainer.max_steps=11")
    assert answer.code == 0, answer.err
    first, second = history()
    assert (first["step"], second["step"]) == ("8", "11")
    assert first["train/loss"] != second["train/loss"]


def test_a_broken_network_never_replaces_a_good_checkpoint(command: Command) -> None:
    answer = command(
        "train",
        *SMALL,
        "optimizer=sgd",
        "optimizer.lr=1e38",
        "scheduler=constant",
        "trainer.max_epochs=3",
        "data.batch_size=32",
    )
    assert answer.code == 2 and answer.err.splitlines()[-1].startswith("error: ")
    for path in Path("runs").rglob("*.ckpt"):
        assert all(
            torch.isfinite(value).all()
            for value in torch.load(path, weights_only=True)["state_dict"].values()
            if value.is_floating_point()
        )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("optimizer._target_=torch.optim.Adagrad",), "cannot build the optimizer or the scheduler"),
        (("trainer.max_epochs=-1", "trainer.max_time=00:00:00:05"), "needs the length of the run"),
        (("trainer.precision=bf16-true",), "bf16-mixed"),
        (("trainer.devices=0", "trainer.accelerator=cpu"), "invalid trainer.devices=0"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_shows_only_while_running_is_one_line_too(command: Command, line: tuple[str, ...], says: str) -> None:
    answer = command("train", *SMALL, "trainer.max_epochs=1", *line)
    assert answer.code == 2, answer.err
    assert says in answer.err.splitlines()[-1] and "Traceback" not in answer.err
    assert not Path("models/run").exists()


@pytest.mark.slow
def test_a_trial_run_of_one_batch_works(command: Command) -> None:
    assert (
        command("train", *SMALL[:-3], "name=run", "model.backbone.channels=[4,8]", "+trainer.fast_dev_run=true").code
        == 0
    )


def test_kept_splits_are_said(command: Command) -> None:
    assert command("prepare", "data=folder", "data.dir=tree", "data.manifest_path=m.csv").code == 0
    answer = command("prepare", "data=folder", "data.dir=tree", "data.manifest_path=m.csv", "data.split.val=0.4")
    assert "keeps its split: 20 % are val, not 40 %" in answer.err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_the_newest_step_and_says_so_by_its_exit_code(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    line = [
        sys.executable,
        str(ROOT / "commands.py"),
        "train",
        *SMALL,
        "trainer.max_epochs=100000",
        "~callbacks.early_stopping",
    ]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stderr is not None
    for text in process.stderr:
        if text.startswith("epoch 3/"):
            break
    time.sleep(0.2)
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert int(str(checkpoint("last")["global_step"])) >= 24
    assert not (tmp_path / "models/run").exists()
