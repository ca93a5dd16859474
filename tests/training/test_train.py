"""One real training: everything it promises to leave, and that it says where."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from image_classifier.bundle import read_bundle
from image_classifier.exporting.parity import check_parity
from image_classifier.inference.checkpoint import CheckpointBackend, load_classifier
from image_classifier.inference.onnx_runtime import OnnxBackend
from image_classifier.manifest import Manifest
from image_classifier.training.bundle_writer import model_card
from tests.conftest import PROGRAM, ROOT


def test_the_last_lines_say_the_scores_where_everything_is_and_what_to_try_next(trained: Path) -> None:
    out = (trained / "stdout.txt").read_text()
    assert re.search(r"^test accuracy 0\.\d{4}  \[0\.\d{4}, [01]\.\d{4}\]$", out, re.MULTILINE)
    assert re.search(r"^test f1_macro 0\.\d{4}  \[0\.\d{4}, [01]\.\d{4}\]$", out, re.MULTILINE)
    assert re.search(r"^images/s \d+\.\d$", out, re.MULTILINE)
    for place in ("models/digits", "plots/digits", "runs/digits/train.log", "mlflow.db"):
        assert place in out
    assert out.splitlines()[-1] == f"next     {PROGRAM} infer --checkpoint_name digits --images PATH"


def test_intervals_are_in_the_bundle_its_card_and_the_parts_metrics_but_are_no_scalars(trained: Path) -> None:
    bundle = read_bundle(trained / "models/digits")
    part = json.loads((trained / "plots/digits/test/metrics.json").read_text())
    low, high = bundle.info.intervals["test"]["f1_macro"]
    assert part["intervals"]["f1_macro"] == [low, high] and low < bundle.info.metrics["test"]["f1_macro"] < high
    assert (
        f"| test | f1_macro | {bundle.info.metrics['test']['f1_macro']:.4f} | [{low:.4f}, {high:.4f}] |"
        in bundle.path("MODEL_CARD.md").read_text()
    )
    assert (
        set(part["per_class"][0]["intervals"]) == {"precision", "recall", "f1"}
        and 0 <= part["per_class"][0]["roc_auc"] <= 1
    )
    scores = json.loads((trained / "plots/digits/metrics.json").read_text())["test"]
    assert all(isinstance(value, float) for value in scores.values()) and "top5_accuracy" in scores


def test_the_log_says_what_was_chosen_and_why(trained: Path) -> None:
    log = (trained / "stderr.txt").read_text()
    assert re.search(r"^precision: \S+ \(.+\)$", log, re.MULTILINE)
    assert re.search(r"^memory layout: channels \w+ \(.+\)$", log, re.MULTILINE)
    assert "Traceback" not in log and "Warning" not in log
    assert (trained / "runs/digits/train.log").read_text().count("images/s") == 2


def test_the_bundle_is_whole_and_hashed(digits_bundle: Path) -> None:
    bundle = read_bundle(digits_bundle)
    bundle.verify()
    assert set(bundle.info.files) == {
        "model.onnx",
        "model.ckpt",
        "model.safetensors",
        "manifest.csv",
        "config.yaml",
        "golden.npz",
        "MODEL_CARD.md",
        "ood.npz",
        "report.html",
    }
    assert bundle.info.classes == tuple("0123456789")
    assert (
        bundle.info.provenance["manifest_sha256"]
        == Manifest.read(digits_bundle / "manifest.csv", Path("data/digits")).sha256
    )
    assert bundle.info.provenance["command"][1:] == [
        "train",
        "name=digits",
        "trainer.max_epochs=2",
        "+trainer.limit_train_batches=6",
    ]
    assert bundle.info.provenance["initial_weights"] == {"origin": "scratch"}
    for name in ("MODEL_CARD.md", "report.html"):
        assert "The training started from scratch." in bundle.path(name).read_text()
    assert not [path for path in digits_bundle.parent.iterdir() if path.name != "digits"]


def test_checkpoint_and_onnx_give_the_golden_answers(digits_bundle: Path) -> None:
    golden = np.load(digits_bundle / "golden.npz")
    names = [str(row) for row in range(len(golden["pixels"]))]
    for backend in (
        OnnxBackend(digits_bundle / "model.onnx"),
        CheckpointBackend(load_classifier(digits_bundle / "model.ckpt")[0]),
    ):
        assert check_parity(golden["logits"], backend.logits(golden["pixels"]), names, type(backend).__name__) < 1e-5


def test_the_metrics_are_functions_of_the_predictions(trained: Path) -> None:
    directory = trained / "plots/digits/test"
    with (directory / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    right = sum(row["label"] == row["predicted_class"] for row in rows) / len(rows)
    assert json.loads((directory / "metrics.json").read_text())["accuracy"] == pytest.approx(right)
    assert read_bundle(trained / "models/digits").info.metrics["test"]["accuracy"] == pytest.approx(right)
    assert np.load(directory / "logits.npy").shape == (len(rows), 10)


def test_every_plot_is_a_picture(trained: Path) -> None:
    plots = {
        path.relative_to(trained / "plots/digits").as_posix() for path in (trained / "plots/digits").rglob("*.png")
    }
    parts = {
        f"{part}/{name}.png"
        for part in ("val", "test")
        for name in ("confusion_matrix", "class_scores", "samples", "reliability", "risk_coverage")
    }
    explained = {name for name in plots if name.startswith("explain/")}
    assert (
        plots - explained == parts | {"loss.png", "accuracy.png", "f1.png", "robustness.png"} and len(explained) == 12
    )
    for name in plots:
        with Image.open(trained / "plots/digits" / name) as picture:
            assert min(picture.size) > 300


def test_last_and_best_checkpoint_are_apart_and_load_without_pickled_code(trained: Path) -> None:
    last, best = (
        torch.load(trained / f"runs/digits/checkpoints/{name}.ckpt", weights_only=True) for name in ("last", "best")
    )
    with (trained / "runs/digits/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert last["global_step"] == 12 == int(rows[-1]["step"])
    top = max(rows, key=lambda row: float(row["val/f1_macro"]))
    assert best["global_step"] == int(top["step"])


@pytest.mark.slow
def test_mlflow_has_parameters_metrics_an_epoch_tags_and_artifacts(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(trained)
    client = MlflowClient(tracking_uri=f"sqlite:///{trained}/mlflow.db")
    experiment = client.get_experiment_by_name("image_classifier")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "digits"
    assert run.data.params["data.batch_size"] == "64" and run.data.params["model.name"] == "convnet"
    assert {"train/loss", "train/accuracy", "val/loss", "val/f1_macro", "test/accuracy", "test/f1_macro"} <= set(
        run.data.metrics
    )
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val/f1_macro")] == [1, 2]
    assert {"git_commit", "manifest_sha256", "bundle"} <= set(run.data.tags)
    assert {path.name for path in trained.glob("mlruns/*/*/artifacts/*")} == {"bundle", "plots", "tables"}
    (table,) = trained.glob("mlruns/*/*/artifacts/tables/test_answers.json")
    assert len(json.loads(table.read_text())["data"]) == 355
    told = {
        "test/ece_uncalibrated",
        "test/aurc",
        "test/set_coverage",
        "val/aurc",
        "test/accuracy_low",
        "robustness/blur_3",
        "latency/onnx_p50_ms",
    }
    assert told <= set(run.data.metrics)


def test_a_class_cannot_write_into_the_model_card(digits_bundle: Path) -> None:
    bundle = read_bundle(digits_bundle)
    names = ("<img src=x onerror=alert(1)>", "a | b\n# c", "[x](y)", *bundle.info.classes[3:])
    card = model_card(replace(bundle.info, classes=names), Manifest.read(bundle.path("manifest.csv"), Path()))
    line = next(line for line in card.splitlines() if line.startswith("An image classifier"))
    assert not re.search(r"(?<!\\)[<>|\[\]#]", line) and "a \\| b \\# c" in line


@pytest.mark.slow
def test_the_default_run_reaches_98_percent(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "commands.py"), "train", "logger=none"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"^test accuracy (0\.\d+) ", done.stdout, re.MULTILINE)
    assert found and float(found[1]) >= 0.98
