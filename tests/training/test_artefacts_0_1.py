"""Run folders and bundles of version 0.1, from before modules and classes moved: they resume, load and start runs."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from image_classifier.bundle import read_bundle
from image_classifier.inference.checkpoint import load_classifier
from image_classifier.inference.load import load_predictor
from tests.conftest import Command

ARTEFACTS = Path(__file__).resolve().parents[1] / "artefacts_0_1"
SAFE = ("trainer.accelerator=cpu", "logger=none")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that SIGTERM stopped in its third epoch of five, as it was found on the disk."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ARTEFACTS / "run", tmp_path / "runs" / "old-run")
    return tmp_path / "runs" / "old-run"


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_folder_resumes_to_its_end(run: Path, command: Command) -> None:
    before, settings = rows(run), yaml.safe_load((run / "config.yaml").read_text())
    answer = command("train", "resume=last", "name=old-run", *SAFE)
    assert answer.code == 0, answer.err
    assert "resume: from runs/old-run/checkpoints/last.ckpt, step 19" in answer.err
    after = rows(run)
    assert after[: len(before)] == before and [row["epoch"] for row in after] == ["1", "2", "3", "4", "5"]
    assert json.loads((run / "run.json").read_text())["finished"]
    # Saved paths of classes that moved are kept as they were, and every other setting too.
    saved = yaml.safe_load((run / "config.yaml").read_text())
    new = {"effort", "finetune"}  # keys that later versions added
    saved = {key: value for key, value in saved.items() if key not in new}
    assert {**saved, "logger": None, "trainer": None} == {**settings, "logger": None, "trainer": None}


@pytest.mark.slow
def test_a_run_folder_is_compared_with_what_it_was(run: Path, command: Command) -> None:
    answer = command("train", "resume=last", "name=old-run", "optimizer.lr=0.5", *SAFE)
    assert answer.code == 2 and "optimizer.lr=0.5 in a run that began with 0.03" in answer.err


@pytest.mark.slow
def test_a_checkpoint_without_its_run_folder_starts_a_run_that_resumes_it(run: Path, command: Command) -> None:
    """Keys that version 0.1 did not have, such as data.unpack.*, are no difference."""
    shutil.copy(run / "checkpoints" / "last.ckpt", "old.ckpt")
    line = (
        "data.image_size=16 data.batch_size=128 model=whitened model.backbone.widths=[4,8,8] "
        "model.backbone.convolutions=1 augment=strong augment.shift=1 loss=bce optimizer=muon optimizer.lr=0.03 "
        "scheduler=linear scheduler.warmup=4 callbacks=ema callbacks.averaging.decay=0.9 "
        "callbacks.unfreeze.every_n_epochs=1 trainer.max_epochs=5 trainer.speed=safe trainer.deterministic=true "
        "plots.figures=false diagnostics=none"
    )
    answer = command("train", "resume=old.ckpt", "name=again", *line.split(), *SAFE)
    assert answer.code == 0, answer.err
    assert "step 19" in answer.err


@pytest.mark.parametrize("backend", ["checkpoint", "onnx"])
def test_a_bundle_predicts_what_it_did(backend: str) -> None:
    bundle = read_bundle(ARTEFACTS / "bundle")
    bundle.verify()
    predictor = load_predictor(ARTEFACTS / "bundle", backend)
    with np.load(ARTEFACTS / "bundle" / "golden.npz") as golden:
        np.testing.assert_allclose(predictor.backend.logits(golden["pixels"]), golden["logits"], atol=2e-4)


@pytest.mark.slow
def test_a_bundle_starts_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ARTEFACTS / "bundle", tmp_path / "models" / "old")
    line = ("model.from=old", "data.image_size=8", "trainer.max_epochs=1", "diagnostics=none", "plots.figures=false")
    answer = command("train", "name=new", *line, *SAFE)
    assert answer.code == 0, answer.err
    child, parent = load_classifier(Path("models/new/model.ckpt")), load_classifier(Path("models/old/model.ckpt"))
    assert child[1]["backbone"] == parent[1]["backbone"]
    assert not torch.equal(child[0].head.weight, parent[0].head.weight)
