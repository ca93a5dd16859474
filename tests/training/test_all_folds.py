"""`data.fold=all`: every image is predicted once by a network that did not see it, the networks become one model, and a
stopped command goes on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from image_classifier.bundle import read_bundle
from image_classifier.cli.train_config import compose_train_config
from image_classifier.errors import CheckpointError, ConfigError, DataError
from image_classifier.inference.attribution import attribution_map
from image_classifier.inference.checkpoint import ENSEMBLE, load_classifier
from image_classifier.inference.onnx_runtime import OnnxBackend
from image_classifier.manifest import Manifest
from image_classifier.modeling.ensemble import EnsembleClassifier
from image_classifier.predictions import PredictionTable, softmax
from image_classifier.training import run
from image_classifier.training.cross_validation.all_folds import joined_tables, train
from tests.conftest import QUICK, Command, write_image

FOLDS, NAME = 3, "whole"
FOLD_NAMES = [f"{NAME}-fold-{number}" for number in range(FOLDS)]
LINE = (
    "data=folder",
    "data.dir=tree",
    "data.image_size=16",
    "data.batch_size=4",
    "data.duplicates.threshold=1",
    "data.split.test=0.25",
    f"data.folds={FOLDS}",
    "data.fold=all",
    "model=mlp",
    "model.backbone.hidden=[16]",
    "trainer.max_epochs=2",
    *QUICK,
    f"name={NAME}",
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the command was killed when the second fold was trained and not evaluated yet."""
    folder, before = tmp_path_factory.mktemp("folds"), Path.cwd()
    for number in range(48):
        write_image(folder / "tree" / "abc"[number % 3] / f"{number:02d}.png", number)
    os.chdir(folder)
    calls = []

    def killed(tables):  # type: ignore[no-untyped-def]
        calls.append(tables)
        if len(calls) == 2:
            raise SystemExit(137)
        return calibrate(tables)

    calibrate = run.calibrate
    logger = logging.getLogger("image_classifier")
    level = logger.level
    logger.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "calibrate", killed)
        with pytest.raises(SystemExit):
            train(compose_train_config(LINE), overrides=LINE)
    yield folder
    logger.setLevel(level)
    os.chdir(before)


@pytest.fixture(scope="module")
def whole(stopped: Path) -> Path:
    """The bundle, after the same command was started again, which leaves the first fold as it is."""
    first = stopped / "runs" / NAME / "folds" / FOLD_NAMES[0] / "checkpoints" / "last.ckpt"
    date = first.stat().st_mtime_ns
    train(compose_train_config(LINE), overrides=LINE)
    assert first.stat().st_mtime_ns == date
    return stopped / "models" / NAME


@pytest.fixture
def images(whole: Path) -> np.ndarray:
    with np.load(whole / "golden.npz") as golden:
        return np.asarray(golden["pixels"])


def test_a_stopped_command_keeps_its_folds_and_goes_on(stopped: Path, whole: Path) -> None:
    text = (stopped / "runs" / NAME / "train.log").read_text()
    assert f"fold 1 of 3: {FOLD_NAMES[0]} is trained" in text
    assert text.count(f"training {FOLD_NAMES[1]}") == 2 and f"resume: from runs/{NAME}/folds/{FOLD_NAMES[1]}" in text
    assert json.loads((stopped / "runs" / NAME / "run.json").read_text())["finished"]
    assert [path.name for path in (stopped / "models").iterdir()] == [NAME]


def test_every_training_image_is_predicted_once_by_a_network_that_did_not_see_it(stopped: Path, whole: Path) -> None:
    manifest = Manifest.read(whole / "manifest.csv", stopped / "tree")
    table = PredictionTable.read(stopped / "plots" / NAME / "val")
    assert list(table.paths) == list(manifest.part("train").paths) and len(manifest.indices("val")) == 0
    assert len(table.paths) == 48 - len(manifest.indices("test")) and table.ood_scores is not None
    own = stopped / "runs" / NAME / "folds"
    for name in FOLD_NAMES:
        fold = PredictionTable.read(own / "plots" / name / "val")
        trained_on = Manifest.read(own / "models" / name / "manifest.csv", stopped / "tree").part("train").paths
        assert not set(fold.paths) & set(trained_on)
        rows = [table.paths.index(path) for path in fold.paths]
        np.testing.assert_array_equal(table.logits[rows], fold.logits)


def test_the_model_is_the_mean_of_its_networks(stopped: Path, whole: Path, images: np.ndarray) -> None:
    ensemble, blueprint = load_classifier(whole / "model.ckpt")
    assert isinstance(ensemble, EnsembleClassifier) and blueprint[ENSEMBLE] == FOLDS
    pixels = torch.from_numpy(images)
    bundles = [stopped / "runs" / NAME / "folds" / "models" / name for name in FOLD_NAMES]
    with torch.inference_mode():
        answers = [load_classifier(bundle / "model.ckpt")[0].answer(pixels) for bundle in bundles]
        logits, embeddings = ensemble.answer(pixels)
    mean = np.mean([softmax(each.numpy()) for each, _ in answers], axis=0)
    np.testing.assert_allclose(softmax(logits.numpy()), mean, atol=1e-6)
    torch.testing.assert_close(embeddings, torch.stack([each for _, each in answers]).mean(0))
    torch.testing.assert_close(ensemble.embed(pixels), embeddings)


def test_its_exports_answer_alike_and_tell_the_scores_origin(command: Command, whole: Path, images: np.ndarray) -> None:
    ensemble, _ = load_classifier(whole / "model.ckpt")
    logits, embeddings = OnnxBackend(whole / "model.onnx").logits_and_embeddings(images)
    with torch.inference_mode():
        expected, features = ensemble.answer(torch.from_numpy(images))
    np.testing.assert_allclose(softmax(logits), softmax(expected.numpy()), atol=1e-5)
    np.testing.assert_allclose(embeddings, features.numpy(), rtol=1e-3, atol=1e-4)
    assert command("verify", NAME).code == 0
    assert read_bundle(whole).info.provenance["out_of_fold"] == FOLDS
    assert "Split val: These predictions are out of fold" in (whole / "MODEL_CARD.md").read_text()
    assert command("report", NAME, "--split", "val").code == 0
    assert "predictions are out of fold" in Path("plots", NAME, "val", "report.html").read_text()
    answer = command("test", NAME, "--split", "val")
    assert answer.code == 2 and "no val split" in answer.err


def test_a_heat_map_is_the_mean_of_those_of_the_networks(whole: Path, images: np.ndarray) -> None:
    ensemble, _ = load_classifier(whole / "model.ckpt")
    heat = attribution_map(ensemble, images[0], 0).heat
    assert heat.shape == (16, 16) and heat.max() in (0, 1)


@pytest.mark.slow
def test_other_settings_do_not_join_trained_folds(whole: Path) -> None:
    other = [*LINE, "optimizer.lr=0.5"]
    notes = Path("runs", NAME, "run.json")
    content = notes.read_text()
    notes.write_text(content.replace('"finished": true', '"finished": false'))
    try:
        with pytest.raises(ConfigError, match="trained with other images or settings"):
            train(compose_train_config(other), overrides=other)
    finally:
        notes.write_text(content)


def test_no_training_starts_from_several_networks(command: Command, whole: Path) -> None:
    answer = command("train", *LINE[:-1], "data.fold=0", f"model.from={NAME}", "name=child")
    assert answer.code == 2 and "holds 3 networks" in answer.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.folds=5"], "data.fold must be 0 to 4 or all"),
        (["data.folds=5", "data.fold=7"], "data.fold must be 0 to 4 or all"),
        (["data.fold=all"], "data.fold=all needs data.folds"),
    ],
)
def test_folds_that_cannot_be_are_refused_before_images_are_read(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = command("train", "data=digits", *words)
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_folds_that_do_not_hold_every_image_once_are_refused() -> None:
    rows = {"splits": np.array([1, 1], np.int8), "targets": np.array([0, 1])}
    manifest = Manifest(
        Path(), ("a", "b"), ("x", "y"), groups=np.zeros(2, np.uint64), digests=np.zeros((2, 32), np.uint8),
        widths=np.ones(2, np.int32), heights=np.ones(2, np.int32), **rows,
    )  # fmt: skip
    tables = [
        PredictionTable((path,), np.array([code]), np.zeros((1, 2), np.float32), ("x", "y"))
        for code, path in enumerate("ab")
    ]
    assert joined_tables(tables[::-1], manifest).paths == ("a", "b")
    with pytest.raises(DataError, match="every training image once"):
        joined_tables([*tables, tables[0]], manifest)
    with pytest.raises(DataError, match="labels have changed"):
        joined_tables([tables[0], PredictionTable(("b",), np.array([0]), tables[1].logits, ("x", "y"))], manifest)


def test_a_checkpoint_of_more_networks_than_weights_is_refused(whole: Path, tmp_path: Path) -> None:
    content = torch.load(whole / "model.ckpt", weights_only=True)
    content["hyper_parameters"]["blueprint"][ENSEMBLE] = 10**9
    torch.save(content, tmp_path / "many.ckpt")
    with pytest.raises(CheckpointError, match="names 1000000000 networks"):
        load_classifier(tmp_path / "many.ckpt")
