"""`-m`: several runs side by side, through joblib, submitit on this machine, and submitit on SLURM."""

from __future__ import annotations

import csv
import os
import pickle
import re
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from image_classifier.cli.multirun import Escape, _Sent
from image_classifier.errors import DataError
from tests.conftest import QUICK, Command, write_image

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number in range(40):
        write_image(tmp_path / "tree" / ("cat", "dog")[number % 2] / f"{number:03d}.png", number)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_error_that_comes_from_another_process_escapes_hydra_here() -> None:
    for error, kind in ((DataError("no images", "give some"), DataError), (OSError("disk"), RuntimeError)):
        arrived = pickle.loads(pickle.dumps(_Sent(error)))
        assert isinstance(arrived, Escape) and isinstance(arrived.error, kind) and str(error) in str(arrived.error)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "submitit_slurm"])
def test_the_launchers_are_known(launcher: str, command: Command, folder: Path) -> None:
    line = (f"hydra/launcher={launcher}", "data=folder", "data.dir=tree", "--cfg", "hydra")
    answer = command("prepare", *line)
    assert answer.code == 0, answer.err
    assert f"_target_: hydra_plugins.hydra_{launcher.split('_')[0]}_launcher" in answer.out
    assert command("prepare", "-m", *line).code == 2  # Hydra would end in a traceback


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "submitit_slurm"])
def test_a_launcher_that_is_not_installed_is_one_line(
    launcher: str, command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = f"hydra-{launcher.split('_')[0]}-launcher"
    pytest.importorskip(f"hydra_plugins.{plugin.replace('-', '_')}")
    command(
        "prepare", f"hydra/launcher={launcher}", "data=folder", "data.dir=tree", "--cfg", "hydra"
    )  # finds the plugins
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], f"{launcher}.yaml")
    for line in ((f"hydra/launcher={launcher}",), ("-m", f"hydra/launcher={launcher}", "hydra.launcher.n_jobs=2")):
        answer = command("prepare", "data=folder", "data.dir=tree", *line)
        assert (
            answer.code == 2
            and answer.out == ""
            and answer.err
            == (
                f"error: hydra/launcher={launcher} needs the package {plugin}, which is not installed: "
                "pip install 'image-classifier[launchers]'\n"
            )
        )


def test_a_job_of_a_sweep_knows_the_line_that_runs_it_alone(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []
    monkeypatch.setattr("image_classifier.cli.verbs.prepare.prepare", lambda config: lines.append(sys.argv[1:]))
    assert (
        command(
            "prepare", "-m", "data=folder", "--data.dir", "a tree", "data.split.val=0.1,0.2", "hydra.sweep.dir=x"
        ).code
        == 0
    )
    assert lines == [["prepare", "data=folder", "data.dir='a tree'", f"data.split.val={share}"] for share in (0.1, 0.2)]


LINE = (
    "data=folder",
    "data.dir=tree",
    "data.image_size=16",
    "data.batch_size=8",
    "model=mlp",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
)


def sweep(folder: Path, verb: str, *line: str, path: str = "") -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "commands.py"), verb, "-m", *line]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    environment |= {"PATH": f"{path}:{environment['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [("joblib", "hydra.launcher.n_jobs=2"), ("submitit_local",)], ids=lambda words: words[0]
)
def test_runs_that_start_at_once_on_a_fresh_database_and_cache_all_finish(
    launcher: tuple[str, ...], folder: Path
) -> None:
    code, err = sweep(folder, "train", *LINE, "seed=0,1", f"hydra/launcher={launcher[0]}", *launcher[1:])
    assert code == 0, err
    runs = sorted(path.parent.name for path in folder.glob("models/*/bundle.json"))
    assert runs == ["tree-mlp", "tree-mlp-2"]
    assert (
        len({(folder / "runs" / name / "config.yaml").read_text().partition("seed: ")[2].split()[0] for name in runs})
        == 2
    )
    with sqlite3.connect(folder / "mlflow.db") as database:
        assert sorted(database.execute("select name, status from runs")) == [(name, "FINISHED") for name in runs]
    assert len(list(folder.glob("data/cache/*/pixels.u8"))) == 1
    assert os.path.getsize(next(folder.glob("data/cache/*/pixels.u8"))) == 40 * 16 * 16 * 3  # each image once


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_job_that_fails_stops_no_other_and_is_one_line(launcher: str, folder: Path) -> None:
    code, err = sweep(
        folder, "prepare", "data=folder", "data.dir=tree", "data.split.val=0.1,2,0.2", f"hydra/launcher={launcher}"
    )
    assert code == 2 and err.splitlines()[-1].startswith("error: data.split.val must be") and "Traceback" not in err, (
        err
    )
    assert len(list(folder.glob("data/manifests/*.csv"))) == 2


SBATCH = """#!{python}
import os, re, subprocess, sys
count = int(re.search(r"--array=0-(\\d+)", open(sys.argv[-1]).read())[1]) + 1
for task in range(count):
    job = {{"SLURM_JOB_ID": str(100 + task), "SLURM_ARRAY_JOB_ID": "100", "SLURM_NTASKS": "1"}}
    job["SLURM_ARRAY_TASK_ID"] = str(task)
    quiet = {{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}}
    subprocess.Popen(["bash", sys.argv[-1]], env=os.environ | job, start_new_session=True, **quiet)
print("Submitted batch job 100")
"""
SRUN = """#!{python}
import os, sys
step = {{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_NUM_NODES": "1"}}
step |= {{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}}
words = sys.argv[1:]
while words[0].startswith("-"):
    words = words[1 if "=" in words[0] or words[0] == "--unbuffered" else 2 :]
os.execvpe(words[0], words, os.environ | step)
"""
SACCT = "#!/bin/sh\necho 'JobID|State'\n"


@pytest.fixture
def fake_slurm(tmp_path: Path) -> Path:
    """sbatch, srun and sacct that run a job array on this machine."""
    path = tmp_path / "slurm"
    path.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        script = path / name
        script.write_text(text.format(python=sys.executable))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.slow
def test_a_sweep_goes_through_slurms_queue(folder: Path, fake_slurm: Path) -> None:
    line = (
        *LINE,
        *QUICK,
        "seed=0,1",
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.timeout_min=5",
    )
    code, err = sweep(folder, "train", *line, path=str(fake_slurm))
    assert code == 0, err
    assert len(list(folder.glob("models/*/bundle.json"))) == 2
    script = next(folder.glob("runs/multirun/*/.submitit/*/*.sh")).read_text()
    assert "--partition=gpu" in script and re.search(r"--array=0-1", script)
    for path in folder.glob("runs/*/metrics.csv"):
        with path.open() as file:
            assert len(list(csv.DictReader(file))) == 1
