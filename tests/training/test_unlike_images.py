"""A model of cartoon faces says "I don't know" to digits, noise and flowers, and names its own test images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from image_classifier.bundle import read_bundle
from image_classifier.evaluation.reliability.ood import auroc
from image_classifier.inference.load import load_predictor
from image_classifier.manifest import Manifest
from image_classifier.predictions import PredictionTable
from tests.conftest import QUICK, Command


def write_pictures(folder: Path, pictures: np.ndarray) -> Path:
    folder.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number:04d}.png")
    return folder


@pytest.mark.slow
def test_digits_and_noise_are_refused_far_more_often_than_true_test_images(
    command: Command, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ("data=folder", f"data.archive={shared_data / 'simpsons-mnist.tar.gz'}", "data.image_size=28")
    answer = command("train", *data, "trainer.max_epochs=2", *QUICK, "augment=none", "name=simpsons")
    assert answer.code == 0, answer.err
    strange = {
        "digits": write_pictures(tmp_path / "digits", (load_digits().images[:200] * 255 / 16).astype(np.uint8)),
        "noise": write_pictures(
            tmp_path / "noise", np.random.default_rng(0).integers(0, 256, (200, 28, 28, 3), dtype=np.uint8)
        ),
    }
    own = PredictionTable.read(Path("plots/simpsons/test"))
    assert own.ood_scores is not None
    limit = read_bundle(Path("models/simpsons")).info.decision["ood"]["threshold"]
    assert (own.ood_scores > limit).mean() < 0.03
    predictor = load_predictor(Path("models/simpsons"))
    for name, folder in strange.items():
        rows = json.loads(command("infer", "checkpoint_name=simpsons", f"images={folder}", "format=json").out)
        refused = np.mean([row["reason"].startswith("unlike the training images") for row in rows])
        files = sorted(folder.iterdir())
        scores = predictor.table(files, [file.name for file in files], np.zeros(len(files), np.int64)).ood_scores
        assert scores is not None and refused > 0.9, f"{name}: {refused:.3f} refused"
        assert auroc(own.ood_scores, scores) > 0.98
    manifest = Manifest.read(Path("models/simpsons/manifest.csv"), tmp_path)
    assert len(own.targets) == len(manifest.indices("test"))
