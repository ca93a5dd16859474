"""`tune`: spaces that cannot be are refused at once; no trial is lost, however its worker ends; a broken trial ends
no study.
"""

from __future__ import annotations

import csv
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from image_classifier.errors import ConfigError, StorageError, TrainingError
from image_classifier.training.tuning import storage as storage_module
from image_classifier.training.tuning.plots import plot_study
from image_classifier.training.tuning.results import StudyPaths, table, write_csv
from image_classifier.training.tuning.space import parse_space
from image_classifier.training.tuning.storage import GRACE_S
from image_classifier.training.tuning.study import TuneSettings, open_study
from image_classifier.training.tuning.subprocess_run import GO_ON, MARK, STOP
from image_classifier.training.tuning.trials import MAX_ATTEMPTS, Owner, Trials, owner_in
from image_classifier.training.tuning.worker import TrialPlan, Workers
from tests.conftest import ROOT

RANGE = {"kind": "float", "low": 0.0, "high": 1.0}
SPACE = parse_space({"optimizer": {"lr": RANGE}})
STORAGE = "sqlite:///tune.db"

# Stands in for `train`: reports three values below lr, as its arguments say; keeps a checkpoint and a bundle as a run
# does.
TRAIN = (
    """
import os, pathlib, sys, time
arguments = dict(word.partition("=")[::2] for word in sys.argv[1:])
rate, name = float(arguments["optimizer.lr"]), arguments["name"]
pathlib.Path("runs", name, "checkpoints").mkdir(parents=True, exist_ok=True)
pathlib.Path("runs", name, "checkpoints", "last.ckpt").touch()
for step in range(1, 4):
    print(f"{mark}[{step}, {rate * step / 3}]", flush=True)
    word = sys.stdin.readline().strip()
    assert word in ("{go}", "{stop}", ""), word
    if word == "{stop}":
        sys.exit(0)
    {body}
pathlib.Path("models", name).mkdir(parents=True)
""".replace("{mark}", MARK)
    .replace("{go}", GO_ON)
    .replace("{stop}", STOP)
)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def opened(**asked: Any) -> Trials:
    return open_study(TuneSettings(**asked), "study", 0, {"search": "this"})


def plan(body: str = "", program: str | None = None) -> TrialPlan:
    paths = StudyPaths("study", Path("runs"), Path("models"), Path("plots"))
    return TrialPlan(
        SPACE, (), (), paths, program=(sys.executable, "-c", program or TRAIN.replace("{body}", body or "pass"))
    )


def run(body: str = "", program: str | None = None, **asked: Any) -> Trials:
    """Run a study of stand-ins to its end."""
    chosen = TuneSettings(**{"pruner": "none", **asked})
    trials = open_study(chosen, "study", 0, {"search": "this"})
    Path("runs/study").mkdir(parents=True, exist_ok=True)
    with owner_in(Path("runs/study")) as owner:
        Workers(trials, chosen, plan(body, program), owner).run()
    return trials


def states(trials: Trials) -> list[TrialState]:
    return [trial.state for trial in trials.trials()]


# The study


def test_a_study_ends_with_its_budget_and_goes_on_with_a_greater_one() -> None:
    assert states(run(num_trials=3)) == [TrialState.COMPLETE] * 3
    trials = run(num_trials=5, workers=2)
    assert states(trials) == [TrialState.COMPLETE] * 5
    assert all(trial.value == pytest.approx(trial.params["optimizer.lr"]) for trial in trials.trials())
    assert len({trial.params["optimizer.lr"] for trial in trials.trials()}) == 5


def test_the_same_seed_and_number_suggest_the_same_values_after_a_restart() -> None:
    def values(trials: Trials) -> list[dict[str, Any]]:
        for number in range(len(trials.trials()), len(trials.trials()) + 3):
            trial = trials.claim({"optimizer.lr": SPACE[0].distribution}, None, Owner("here-1", Path("runs")))
            assert trial is not None
            trials.complete(number, trial.params["optimizer.lr"])
        return [trial.params for trial in trials.trials()]

    values(opened(storage="sqlite:///a.db"))
    restarted = values(opened(storage="sqlite:///a.db"))
    once = opened(storage="sqlite:///b.db")
    values(once)
    assert values(once) == restarted and len({row["optimizer.lr"] for row in restarted}) == 6


def test_only_the_best_keep_their_folders() -> None:
    trials = run(num_trials=4, keep=2)
    best = sorted(trials.trials(), key=lambda trial: -(trial.value or 0))[:2]
    for folder in ("runs", "models"):
        assert {path.name for path in Path(folder).glob("study-*")} == {f"study-{trial.number}" for trial in best}
    assert len(list(Path("runs/study").glob("*.log"))) == 4


def test_a_failing_trial_says_why_and_the_study_goes_on() -> None:
    trials = run("assert step < 2 or name != 'study-1', 'too much'", num_trials=3)
    assert states(trials) == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert trials.one(1).user_attrs["reason"] == "AssertionError: too much"
    assert not Path("runs/study-1").exists()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("print('error: no', file=sys.stderr); sys.exit(2)", "the last with: no"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL"),
    ],
)
def test_when_the_first_all_fail_the_study_stops_with_the_reason(body: str, says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        run(body, num_trials=50)
    assert states(opened()) == [TrialState.FAIL] * 3


def test_values_that_are_no_numbers_are_a_failure() -> None:
    trials = run(program=TRAIN.replace("{body}", "pass").replace("{rate * step / 3}", "NaN"), num_trials=1)
    assert trials.one(0).user_attrs["reason"] == "it reported no val/f1_macro"


def test_a_trial_that_lags_behind_is_pruned_and_keeps_nothing() -> None:
    program = TRAIN.replace("{body}", "pass").replace("rate * step / 3", "(step if name[-1] in '01234' else 0)")
    trials = run(program=program, num_trials=7, pruner="median")
    assert states(trials) == [TrialState.COMPLETE] * 5 + [TrialState.PRUNED] * 2
    assert not Path("models/study-6").exists() and not Path("runs/study-6").exists()


@pytest.mark.slow
def test_time_over_gives_trials_back_and_the_next_command_finishes_them() -> None:
    start = time.monotonic()
    trials = run("time.sleep(30)", num_trials=2, max_time="0.02", workers=2)
    assert time.monotonic() - start < 15
    assert states(trials) == [TrialState.WAITING] * 2
    assert [trial.user_attrs["attempts"] for trial in trials.trials()] == [0, 0]
    assert states(run(num_trials=2)) == [TrialState.COMPLETE] * 2


@pytest.mark.slow
def test_another_space_or_budget_of_training_is_another_study() -> None:
    opened()
    with pytest.raises(ConfigError, match="begun with another search"):
        open_study(TuneSettings(), "study", 0, {"search": "that"})
    Path("text.db").write_text("this is no database, however often it is asked " * 50)
    with pytest.raises(StorageError, match=r"cannot open tune.storage=sqlite:///text.db .file is not a database"):
        opened(storage="sqlite:///text.db")
    with pytest.raises(StorageError, match="cannot open tune.storage=nodriver://") as refused:
        opened(storage="nodriver://user:secret@host/name")
    assert "secret" not in str(refused.value)


# Trials whose worker died


def claimed(trials: Trials, owner: Owner) -> int:
    trial = trials.claim({"optimizer.lr": SPACE[0].distribution}, 1, owner)
    assert trial is not None
    return trial.number


def test_a_trial_of_a_dead_worker_on_this_machine_is_run_again_at_once_under_its_number() -> None:
    trials = opened()
    with owner_in(Path("runs/study")) as dead:
        claimed(trials, dead)
        lock = Path(f"runs/study/.{dead.name}.lock")
        assert lock.exists()
    lock.touch()  # a killed process lets go of the lock and leaves the file
    params = trials.one(0).params
    after = run(num_trials=1)
    assert states(after) == [TrialState.COMPLETE]
    assert after.one(0).params == params and after.one(0).user_attrs["attempts"] == 2
    assert not lock.exists()


def age_heartbeats(seconds: int) -> None:
    """Make the database believe that the last heartbeats were so long ago."""
    with closing(sqlite3.connect("tune.db")) as database, database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', ?)", (f"-{seconds} seconds",))


def test_a_trial_of_another_machine_is_taken_up_when_its_heartbeat_stops() -> None:
    trials, here = opened(), Owner("here-1", Path("runs"))
    number = claimed(trials, Owner("elsewhere-1", Path("runs")))
    assert trials.requeue_dead(here) == [0]
    age_heartbeats(GRACE_S - 10)
    assert trials.requeue_dead(here) == [0]
    trials.record_heartbeat(number)
    assert trials.requeue_dead(here) == [0]
    age_heartbeats(GRACE_S + 10)
    assert trials.requeue_dead(here) == []
    assert states(trials) == [TrialState.WAITING]
    # The next worker has it again: not stale in the moment before its own first heartbeat.
    assert trials.study.ask().number == 0
    assert trials.requeue_dead(here) == [0]


def test_a_dead_trial_of_long_ago_is_taken_up_at_once() -> None:
    claimed(opened(), Owner("elsewhere-1", Path("runs")))
    age_heartbeats(GRACE_S + 10)
    after = run(num_trials=1)
    assert states(after) == [TrialState.COMPLETE] and after.one(0).user_attrs["attempts"] == 2


def test_a_trial_without_any_heartbeat_is_taken_up_too() -> None:
    trials, here = opened(), Owner("here-1", Path("runs"))
    # Its worker was killed in the moment of its claim; or an older version of this package ran it.
    trial = trials.study.ask({"optimizer.lr": SPACE[0].distribution})
    for key, value in (("owner", "elsewhere-1"), ("attempts", 1), ("beat", 7)):
        trial.set_user_attr(key, value)
    assert trials.requeue_dead(here) == [0]
    age_heartbeats(GRACE_S + 10)
    assert trials.requeue_dead(here) == []
    assert states(run(num_trials=1)) == [TrialState.COMPLETE]


@pytest.mark.slow
def test_the_heartbeat_survives_a_database_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "HEARTBEAT_S", 1)
    trials, beats = opened(), []
    number = claimed(trials, Owner("here-1", Path("runs")))

    def record(trial_id: int) -> None:
        beats.append(trial_id)
        if len(beats) == 1:
            raise optuna.exceptions.StorageInternalError("away")
        enough.set()

    enough = threading.Event()
    monkeypatch.setattr(trials.storage, "record_heartbeat", record)
    with trials.heartbeat(number):
        assert enough.wait(20)
    count = len(beats)
    time.sleep(1.2)
    assert len(beats) == count  # and it ends with the block


def test_a_trial_that_kills_its_worker_each_time_fails_for_good() -> None:
    trials, here = opened(), Owner("here-1", Path("runs"))
    for _ in range(MAX_ATTEMPTS):
        trials.requeue(claimed(trials, here))
    assert states(trials) == [TrialState.FAIL]
    assert "died" in trials.one(0).user_attrs["reason"]


def test_a_run_that_was_done_when_its_worker_died_is_not_run_again() -> None:
    trials = opened()
    number = claimed(trials, Owner("dead-1", Path("runs")))
    trials.storage.set_trial_intermediate_value(trials._id_of(number), 1, 0.75)
    trials.requeue(number)
    Path("models/study-0").mkdir(parents=True)
    after = run("sys.exit('run again')", num_trials=1)
    assert states(after) == [TrialState.COMPLETE] and after.one(0).value == 0.75


@pytest.mark.slow
def test_budgets_hold_when_many_claim_at_once() -> None:
    trials, claims = opened(), []
    workers = [
        threading.Thread(target=lambda: [claims.append(claimed_or_none(opened())) for _ in range(3)]) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(number for number in claims if number is not None) == [0, 1, 2, 3, 4]
    assert states(trials)[:5] == [TrialState.RUNNING] * 5


def claimed_or_none(trials: Trials) -> int | None:
    trial = trials.claim({"optimizer.lr": SPACE[0].distribution}, 5, Owner("here-1", Path("runs")))
    return None if trial is None else trial.number


@pytest.mark.slow
def test_four_processes_make_one_database_at_once_and_load_no_torch(tmp_path: Path) -> None:
    code = "import sys; from image_classifier.training.tuning.study import TuneSettings, open_study\n"
    code += "trials = open_study(TuneSettings(), 'study', 0, {}); trials.study.ask(); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(4)
    ]
    errors = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0] * 4, errors
    assert [trial.number for trial in optuna.load_study(study_name="study", storage=STORAGE).trials] == [0, 1, 2, 3]


# What a study leaves


def test_table_csv_and_figures_show_every_trial_best_first(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trials = run("assert name != 'study-3', 'too much'", num_trials=5)
    rows = table(trials.trials(), TuneSettings())
    values = [float(row.split()[1]) for row in rows[1:5]]
    assert values == sorted(values, reverse=True) and "failed: AssertionError: too much" in rows[-1]
    write_csv(trials.trials(), TuneSettings(), Path("plots/trials.csv"))
    with Path("plots/trials.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert (
        len(lines) == 5
        and lines[-1]["state"] == "failed"
        and float(lines[0]["optimizer.lr"]) == pytest.approx(values[0], abs=1e-4)
    )
    said = plot_study(trials.study, "val/f1_macro", Path("plots"))
    assert Path("plots/history.png").read_bytes().startswith(b"\x89PNG")
    assert "no importance.png" in said[-1]  # of a single key


def test_importance_is_drawn_when_there_are_trials_enough() -> None:
    trials, space = opened(), {"optimizer.lr": SPACE[0].distribution, "optimizer.weight_decay": SPACE[0].distribution}
    for _ in range(6):
        trial = trials.study.ask(space)
        trials.complete(trial.number, trial.params["optimizer.lr"])
    plot_study(trials.study, "val/f1_macro", Path("plots"))
    assert Path("plots/importance.png").read_bytes().startswith(b"\x89PNG")
