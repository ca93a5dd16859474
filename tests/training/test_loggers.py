"""Every logger gets the same metrics, the run's parameters and its ending; nothing leaves the machine where that is
asked for.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from image_classifier.cli.hydra_app import instantiate
from image_classifier.errors import ConfigError
from image_classifier.mlflow_tracking import Tracker
from image_classifier.training.loggers import MLflowLogger, RunLoggers
from tests.conftest import ROOT, MakeTree

SMALL = (
    "data=folder",
    "data.dir=tree",
    "data.image_size=16",
    "data.batch_size=4",
    "model.backbone.channels=[4,8]",
    "audit.fail_on=null",
)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def scalars_of(folder: Path) -> dict[str, list[float]]:
    """What TensorBoard itself reads from a folder of event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def run_of(key: str, value: str) -> Any:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(
        tracking_uri=f"sqlite:///{Path.cwd()}/mlflow.db"
    )  # MLflow keeps a store a process by its address
    experiment = client.search_experiments(filter_string="name != 'Default'")[0]
    return client.search_runs([experiment.experiment_id], f"{key} = '{value}'")[0]


@pytest.mark.slow
def test_several_loggers_are_told_the_same() -> None:
    mlflow = MLflowLogger("sqlite:///mlflow.db", "tests", "run", {"study": "s"})
    several = [mlflow, TensorBoardLogger("run", "tensorboard", "", default_hp_metric=False), CSVLogger("run", "csv")]
    loggers = RunLoggers(several)
    loggers.begin({"optimizer.lr": 0.1, "model.name": "mlp"}, {"manifest_sha256": "abc"})
    for epoch in (0, 1):
        metrics = {"val/f1_macro": 0.5 + epoch / 4, "epoch": epoch}
        for logger in several:
            logger.log_metrics(metrics, step=10 * (epoch + 1))  # as Lightning does: one dict for all
    loggers.log_metrics({"test/accuracy": 0.75}, epoch=1, step=20)
    loggers.finish("KILLED")

    rows = rows_of(Path("run/csv/version_0/metrics.csv"))
    assert [(row["epoch"], row["val/f1_macro"]) for row in rows if row["val/f1_macro"]] == [("0", "0.5"), ("1", "0.75")]
    assert [row["test/accuracy"] for row in rows if row["test/accuracy"]] == ["0.75"]
    assert yaml.safe_load(Path("run/csv/version_0/hparams.yaml").read_text()) == {
        "optimizer.lr": 0.1,
        "model.name": "mlp",
        "status": "KILLED",
    }
    scalars = scalars_of(Path("run/tensorboard"))
    assert (scalars["val/f1_macro"], scalars["test/accuracy"]) == ([0.5, 0.75], [0.75])
    logged = run_of("tags.study", "s")
    assert logged.data.metrics == {"val/f1_macro": 0.75, "test/accuracy": 0.75}
    assert logged.data.params == {"optimizer.lr": "0.1", "model.name": "mlp"}
    assert (logged.info.status, logged.data.tags["manifest_sha256"]) == ("KILLED", "abc")
    assert [line.split()[0] for line in loggers.where()] == ["MLflow", "TensorBoard", "CSV"]


def test_only_a_tracker_that_is_asked_to_copies_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    monkeypatch.setattr(Tracker, "set_tags", lambda self, tags: None)
    monkeypatch.setattr(Tracker, "log_artifacts", lambda self, directory, name: copied.append((self.run_name, name)))
    for name, artifacts in (("with", True), ("without", False)):
        loggers = RunLoggers([MLflowLogger("sqlite:///mlflow.db", "tests", name, artifacts=artifacts)])
        loggers.keep({"bundle": "models"}, {"bundle": Path("models")})
    assert copied == [("with", "bundle")]


def test_no_logger_is_fine() -> None:
    loggers = RunLoggers([])
    loggers.begin({}, {})
    loggers.finish()
    assert loggers.where() == ["loggers  none"]


@pytest.mark.parametrize(
    ("target", "flags", "says"),
    [
        ("WandbLogger", ["pytorch_lightning.loggers.wandb._WANDB_AVAILABLE"], "pip install 'image-classifier[wandb]'"),
        (
            "TensorBoardLogger",
            [
                "lightning_fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE",
                "lightning_fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE",
            ],
            "pip install 'image-classifier[tensorboard]'",
        ),
    ],
)
def test_a_missing_package_is_one_line_with_what_to_install(
    target: str, flags: list[str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Missing:
        def __bool__(self) -> bool:
            return False

        def __str__(self) -> str:
            return "Requirement 'wandb>=0.12.10' not met. HINT: Try running `pip install -U 'wandb>=0.12.10'`"

    for flag in flags:
        monkeypatch.setattr(flag, Missing())
    with pytest.raises(ConfigError) as refused:
        instantiate({"_target_": f"pytorch_lightning.loggers.{target}", "save_dir": str(tmp_path)})
    assert says in str(refused.value) and "\n" not in str(refused.value)


def train(*line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "commands.py"), "train", *SMALL, "trainer.max_epochs=2", *line]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env={**kept, **environment})


@pytest.mark.slow
def test_a_real_run_with_all_loggers_at_once(make_tree: MakeTree) -> None:
    make_tree(cat=20, dog=20)
    done = train(
        "logger=several", "+logger@logger.wandb=wandb", "logger.wandb.offline=true", "name=all", "data.split.test=0.2"
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(Path("runs/all/csv/version_0/metrics.csv"))
    f1 = [float(row["val/f1_macro"]) for row in rows if row["val/f1_macro"]]
    assert len(f1) == 2
    scalars = scalars_of(Path("runs/all/tensorboard"))
    assert scalars["val/f1_macro"] == pytest.approx(f1)
    logged = run_of("attributes.run_name", "all")
    assert logged.data.metrics["val/f1_macro"] == pytest.approx(f1[-1])
    assert logged.data.params["model.name"] == "convnet" and logged.info.status == "FINISHED"
    assert scalars["test/accuracy"] == [pytest.approx(logged.data.metrics["test/accuracy"])]
    (offline,) = Path("runs/all/wandb").glob("offline-run-*/run-*.wandb")
    content = offline.read_bytes()
    assert all(
        word in content for word in (b"val/f1_macro", b"train/loss", b"test/accuracy", b"model.name", b"FINISHED")
    )
    assert "wandb sync runs/all/wandb/offline-run-" in done.stdout


@pytest.mark.slow
def test_wandb_without_a_login_is_one_line_and_leaves_no_bundle(make_tree: MakeTree) -> None:
    make_tree(cat=20, dog=20)
    done = train("logger=wandb", "name=out", HOME=os.getcwd(), NETRC="nowhere")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: wandb cannot start") and "logger.offline=true" in last
    assert not Path("models/out").exists()


@pytest.mark.slow
def test_wandb_obeys_its_own_offline_mode(make_tree: MakeTree) -> None:
    make_tree(cat=20, dog=20)
    assert train("logger=wandb", "name=out", WANDB_MODE="offline").returncode == 0
    assert list(Path("runs/out/wandb").glob("offline-run-*/run-*.wandb"))
