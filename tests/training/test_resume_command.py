"""`train resume=…` on the command line: what goes on, from which settings, and what is refused in one line."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from image_classifier.evaluation.metrics.compute import compute_metrics
from image_classifier.evaluation.reliability.calibration import calibration_score
from image_classifier.evaluation.reliability.selective_prediction import risk_curve
from image_classifier.evaluation.reliability_results import Trust
from image_classifier.training.callbacks.csv_metrics import CSVMetrics
from image_classifier.training.reporting import Results, TrainedRun
from tests.conftest import QUICK, Answer, Command, MakeTree, write_image

SMALL = (
    "data=folder",
    "data.dir=tree",
    "data.image_size=16",
    "data.batch_size=4",
    "model.backbone.channels=[4,8]",
    "model.backbone.dropout=0.2",
)
SHORT = (*SMALL, *QUICK, "trainer.max_epochs=3", "trainer.deterministic=true", "scheduler=exponential")


@pytest.fixture(autouse=True)
def in_a_folder_with_a_tree(tmp_path: Path, make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    make_tree(cat=10, dog=10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "image_classifier.training.run.write_bundle", weights_only
    )  # ONNX and figures take most of so short a run
    monkeypatch.setattr("image_classifier.training.run.write_results", answers_only)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights_only(trained: TrainedRun, results: Results) -> dict[str, Any]:
    trained.run.bundle.mkdir(parents=True, exist_ok=True)
    torch.save(trained.classifier.state_dict(), trained.run.bundle / "weights.pt")
    return {"git": ""}


def answers_only(trained: TrainedRun) -> Results:
    tables = trained.tables
    trained.run.plots.mkdir(parents=True, exist_ok=True)
    np.save(trained.run.plots / "logits.npy", tables["val"].logits)
    metrics = {split: compute_metrics(table) for split, table in tables.items()}
    trusts = {split: Trust(calibration_score(table), risk_curve(table), None, None) for split, table in tables.items()}
    return Results(metrics, dict.fromkeys(tables), {split: found.scalars() for split, found in metrics.items()}, trusts)


@pytest.fixture
def stopped(command: Command, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`stopped(*line)` trains with SIGTERM in the second epoch."""

    def end_of_epoch(self: CSVMetrics, trainer: Any, module: Any) -> None:
        _say_epoch(self, trainer, module)
        if trainer.current_epoch == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def run(*line: str) -> Answer:
        with monkeypatch.context() as patch:
            patch.setattr(CSVMetrics, "on_train_epoch_end", end_of_epoch)
            return command("train", *line)

    return run


_say_epoch = CSVMetrics.on_train_epoch_end


def rows(name: str) -> list[dict[str, str]]:
    with Path(f"runs/{name}/metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(name: str) -> dict[str, torch.Tensor]:
    content: dict[str, torch.Tensor] = torch.load(f"models/{name}/weights.pt", weights_only=True)
    return content


def refused(answer: Answer, *says: str) -> bool:
    last = answer.err.splitlines()[-1]
    return answer.code == 2 and last.startswith("error: ") and all(text in last for text in says)


@pytest.mark.slow
def test_a_stopped_run_goes_on_by_its_name_alone_and_ends_as_one_never_stopped(command: Command, stopped: Any) -> None:
    assert command("train", *SHORT, "name=whole").code == 0
    assert stopped(*SHORT, "name=cut").code == 143
    assert refused(command("train", *SHORT, "name=cut"), "is taken", "resume=last")
    answer = command("train", "resume=last", "name=cut")
    assert answer.code == 0, answer.err
    assert "resume: from runs/cut/checkpoints/step-" in answer.err
    assert rows("cut") == rows("whole") and len(rows("cut")) == 3
    one, other = weights("cut"), weights("whole")
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert Path("plots/cut/logits.npy").read_bytes() == Path("plots/whole/logits.npy").read_bytes()
    assert refused(command("train", "resume=last", "name=cut"), "is finished", "trainer.max_epochs")
    longer = command("train", "resume=last", "name=cut", "trainer.max_epochs=4")
    assert longer.code == 0 and "trainer.max_epochs: 4 instead of 3" in longer.err
    assert len(rows("cut")) == 4 and json.loads(Path("runs/cut/run.json").read_text())["finished"]


@pytest.mark.slow
def test_another_run_is_never_taken_for_the_same(command: Command, stopped: Any, tmp_path: Path) -> None:
    assert stopped(*SHORT, "name=cut").code == 143
    before = Path("runs/cut/checkpoints/last.ckpt").read_bytes()
    settings = Path("runs/cut/config.yaml").read_bytes()
    for change in ("optimizer.lr=0.5", "model=mlp", "data.image_size=8", "seed=3", "augment=none"):
        key = change.partition("=")[0]
        answer = command("train", "resume=last", "name=cut", change)
        assert refused(answer, key.replace("model", "model.").replace("augment", "augment."), "model.from=NAME"), (
            answer.err
        )
    write_image(tmp_path / "tree" / "cat" / "new.png", 123)
    assert refused(command("train", "resume=last", "name=cut"), "images")
    for number in range(9):
        write_image(tmp_path / "tree" / "bird" / f"{number}.png", 500 + number)
    assert refused(command("train", "resume=last", "name=cut"), "classes", "bird")
    assert Path("runs/cut/checkpoints/last.ckpt").read_bytes() == before
    assert Path("runs/cut/config.yaml").read_bytes() == settings


@pytest.mark.slow
def test_a_run_is_found_by_folder_and_by_checkpoint_and_what_is_none_is_refused(command: Command, stopped: Any) -> None:
    assert refused(command("train", *SHORT, "resume=last"), "no run")
    assert refused(command("train", *SHORT, "resume=last", "name=nobody"), "runs/nobody")
    assert refused(command("train", *SHORT, "resume=nowhere"), "nowhere")
    assert stopped(*SHORT).code == 143
    Path("empty").mkdir()
    Path("empty/text.ckpt").write_text("hello")
    assert refused(command("train", "resume=empty"), "not a run folder")
    assert refused(command("train", "resume=empty/text.ckpt"), "damaged")
    path = next(Path("runs/tree-convnet/checkpoints").glob("step-*.ckpt"))
    answer = command("train", f"resume={path}")
    assert answer.code == 0 and str(path) in answer.err, answer.err
    assert len(rows("tree-convnet")) == 3


def test_a_run_that_died_before_its_first_checkpoint_begins_again(command: Command) -> None:
    assert command("train", *SHORT, "name=whole").code == 0
    folder = Path("runs/cut")
    folder.mkdir()
    (folder / "config.yaml").write_text(Path("runs/whole/config.yaml").read_text().replace("whole", "cut"))
    (folder / ".metrics.csv.abc.part").touch()
    answer = command("train", "resume=last", "name=cut")
    assert answer.code == 0 and "has no checkpoint yet" in answer.err
    assert rows("cut") == rows("whole") and not list(folder.glob(".*.part"))


@pytest.mark.slow
def test_a_longer_schedule_is_refused_where_it_is_laid_out_for_the_run(command: Command, stopped: Any) -> None:
    line = (*SHORT, "scheduler=one_cycle", "name=cut")
    assert stopped(*line).code == 143
    assert refused(command("train", *line, "resume=last", "trainer.max_epochs=9"), "planned for 3")
    assert refused(command("train", *line, "resume=last", "trainer.max_epochs=0"), "trainer.max_epochs=0")


@pytest.mark.slow
def test_the_mlflow_run_goes_on_and_ends_once(command: Command, stopped: Any, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    line = tuple(item for item in SHORT if item != "logger=none")
    assert stopped(*line, "name=cut").code == 143
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("image_classifier")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"
    client.log_metric(run.info.run_id, "val/loss", 7.0, step=2)  # as if killed after it was logged, before it was saved
    assert command("train", "resume=last", "name=cut").code == 0
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    for name in ("val/loss", "train/loss"):
        assert [point.step for point in client.get_metric_history(run.info.run_id, name)] == [1, 2, 3]


@pytest.mark.slow
def test_a_requeued_slurm_job_goes_on_by_itself(
    command: Command, stopped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert stopped(*SHORT).code == 143
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    answer = command("train", *SHORT)
    assert answer.code == 0 and "SLURM started job 77 again" in answer.err
    assert len(rows("tree-convnet")) == 3 and not Path("runs/tree-convnet-2").exists()
    again = command("train", *SHORT)
    assert again.code == 0 and "is finished" in again.err and not Path("runs/tree-convnet-2").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert command("train", *SHORT, "trainer.max_epochs=1").code == 0
    assert Path("runs/tree-convnet-2").exists()


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(
    command: Command, stopped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stopped(*SHORT, "name=cut").code == 143
    before = Path("runs/cut/checkpoints/last.ckpt").read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("image_classifier.training.checkpoint_io._Watched.write", full)
        assert refused(command("train", "resume=last", "name=cut"), "no space left", "step-")
    assert Path("runs/cut/checkpoints/last.ckpt").read_bytes() == before
    assert not list(Path("runs/cut").rglob("*.part"))
    assert command("train", "resume=last", "name=cut").code == 0
