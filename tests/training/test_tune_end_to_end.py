"""Studies of real trainings: killed, stopped and gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from tests.conftest import PROGRAM, ROOT, MakeTree

STORAGE = "sqlite:///tune.db"
SMALL = (
    "data=folder",
    "data.dir=tree",
    "data.image_size=16",
    "data.batch_size=4",
    "model.backbone.channels=[4,8]",
    "audit.fail_on=null",
    "data.split.test=0.2",
)
TUNE = (sys.executable, str(ROOT / "commands.py"), "tune", *SMALL, "name=s", "search=learning_rate", "tune.pruner=none")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def started(*line: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*TUNE, *line], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def when_trained(number: int, process: subprocess.Popen[str]) -> None:
    """Wait until a trial has reported twice."""
    end = time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None:
        table = Path(f"runs/s-{number}/metrics.csv")
        if table.exists() and len(table.read_text().splitlines()) > 2:
            return
        time.sleep(0.2)
    raise AssertionError(process.communicate())


@pytest.mark.slow
def test_a_study_killed_in_mid_training_goes_on_and_loses_no_trial(make_tree: MakeTree) -> None:
    make_tree(cat=20, dog=20)
    line = (
        "tune.num_trials=4",
        "tune.workers=2",
        "trainer.max_epochs=60",
        "callbacks.early_stopping=null",
        "tune.keep=null",
    )
    process = started(*line)
    when_trained(0, process)
    process.kill()
    process.communicate()
    done = subprocess.run([*TUNE, *line], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "trial 0: its worker died; it is run again" in done.stderr
    trials = optuna.load_study(study_name="s", storage=STORAGE).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    assert all(list(trial.intermediate_values) == list(range(1, 61)) for trial in trials)
    assert (
        Path("plots/s-0/val").is_dir() and not Path("plots/s-0/test").exists()
    )  # the test part is not for choosing by
    said = Path("runs/s/s-0.log").read_text()
    assert "resume: from" in said  # and not from the start
    assert Path("plots/s/history.png").exists() and f"next     {PROGRAM} train" in done.stdout
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri="sqlite:///mlflow.db")
    experiment = client.get_experiment_by_name("image_classifier")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id], "tags.study = 's'")) >= 4


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_a_study_and_its_trials(number: signal.Signals, code: int, make_tree: MakeTree) -> None:
    make_tree(cat=20, dog=20)
    process = started("tune.num_trials=2", "trainer.max_epochs=100000", "callbacks.early_stopping=null", "logger=none")
    when_trained(0, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert [trial.state for trial in optuna.load_study(study_name="s", storage=STORAGE).trials] == [TrialState.WAITING]
    assert list(Path("runs/s-0/checkpoints").glob("*.ckpt"))
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert os.getcwd() not in left and "name=s-0" not in left
