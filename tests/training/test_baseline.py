"""The verb `baseline`, and its scores beside a model's in every report."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from image_classifier.bundle import read_bundle
from image_classifier.cli.train_config import compose_train_config
from image_classifier.dataset.pixel_cache import CacheSettings, PixelCache
from image_classifier.dataset.settings import DataSettings
from image_classifier.manifest import Manifest, Record
from image_classifier.modeling.classifier import Classifier
from image_classifier.modeling.embeddings import EmbeddingStore
from image_classifier.training import baseline as baseline_module
from image_classifier.training.baseline import baselines_of_run, fit_logistic
from image_classifier.training.builders import TrainingInputs
from image_classifier.training.hardware import Hardware
from image_classifier.training.run_dir import RunDir
from tests.conftest import QUICK, Command, MakeTree

LINE = ("data=folder", "data.dir=tree", "data.image_size=16", "model.backbone.channels=[4,8]", "data.split.test=0.2")
TRAIN = ("data.batch_size=8", "trainer.max_epochs=1", *QUICK)


@pytest.fixture(autouse=True)
def _here(make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_tree(cat=16, dog=10, eel=10).parent)


def stored(folder: Path, num_classes: int, count: int, width: int = 6) -> tuple[EmbeddingStore, Manifest, np.ndarray]:
    """Random embeddings around a centre for each class, and the manifest of the images they are of: all in train."""
    rng = np.random.default_rng(count)
    targets = np.arange(count) % num_classes
    embeddings = (rng.normal(size=(num_classes, width))[targets] + rng.normal(size=(count, width))) * [
        1,
        10,
        100,
        0.1,
        1,
        0,
    ][:width]
    names = [f"{row:064x}" for row in range(1, count + 1)]
    records = [
        Record(f"{row}.png", str(code), "train", name[-16:], name, 8, 8)
        for row, (code, name) in enumerate(zip(targets, names, strict=True))
    ]
    manifest = Manifest.of(Path("x"), records)
    store = EmbeddingStore(folder)
    store.add(manifest.digests[::-1], embeddings[::-1])
    return store, manifest, embeddings.astype(np.float32)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_each_regression_is_scikit_learns_on_standardised_features(num_classes: int, tmp_path: Path) -> None:
    store, manifest, embeddings = stored(tmp_path, num_classes, 200)
    scaled = (embeddings - embeddings.mean(axis=0)) / np.maximum(embeddings.std(axis=0), 1e-9)
    for strength, model in fit_logistic(store, manifest, 0).items():
        expected = LogisticRegression(C=strength, max_iter=1000, tol=1e-6).fit(
            scaled.astype(np.float64), manifest.targets
        )
        logits = model.logits(embeddings)
        assert logits.shape == (200, num_classes)
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        np.testing.assert_allclose(
            probabilities / probabilities.sum(axis=1, keepdims=True), expected.predict_proba(scaled), atol=0.01
        )


def test_more_features_than_memory_is_meant_to_hold_are_sampled_with_every_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, manifest, embeddings = stored(tmp_path, 5, 200)
    monkeypatch.setattr(baseline_module, "_MAX_NUMBERS", 12 * embeddings.shape[1])
    with caplog.at_level("INFO"):
        models = fit_logistic(store, manifest, 0)
    assert "fitted to 12 of the 200 training images" in caplog.text
    assert all(model.weights.shape == (6, 5) for model in models.values())


def test_the_verb_computes_once_and_keeps_its_scores(command: Command) -> None:
    first = command("baseline", *LINE, "name=b")
    assert first.code == 0, first.err
    assert "embeddings: 0 of 36 images are in" in first.err and "36 of 36 images computed" in first.err
    second = command("baseline", *LINE, "name=b")
    assert "embeddings: 36 of 36 images are in" in second.err and "computed" not in second.err
    assert second.out == first.out
    assert re.search(r"^most_frequent +0\.\d{4} +0\.\d{4}  always 'cat'", first.out, re.MULTILINE)
    assert re.search(
        r"^logistic .* on 8 features of convnet \(random weights, seed 0\) at 16 px$", first.out, re.MULTILINE
    )
    kept = json.loads(Path("plots/b/baselines.json").read_text())["baselines"]
    assert {name: set(value["scores"]) for name, value in kept.items()} == {
        "most_frequent": {"val", "test"},
        "logistic": {"val", "test"},
    }
    assert (
        "embeddings: 0 of 36" in command("baseline", *LINE, "name=b", "seed=1", "data.split.seed=0").err
    )  # other weights
    assert command("clean").code == 0
    assert not Path("data/cache").exists()


@pytest.mark.slow
def test_a_report_shows_the_baselines_beside_the_model(command: Command) -> None:
    assert command("baseline", *LINE).code == 0
    answer = command("train", *LINE, *TRAIN, "name=x")
    assert answer.code == 0, answer.err
    rows = [
        line.split()[0]
        for line in answer.out.splitlines()
        if line.startswith(("baseline ", "most_frequent", "logistic", "this model"))
    ]
    assert rows == ["baseline", "most_frequent", "logistic", "this"]
    for split in ("val", "test"):
        beside = json.loads(Path(f"plots/x/{split}/metrics.json").read_text())["baselines"]
        assert set(beside) == {"most_frequent", "logistic"} and 0 <= beside["logistic"]["accuracy"] <= 1
    bundle = read_bundle(Path("models/x"))
    assert set(bundle.info.provenance["baselines"]) == {"most_frequent", "logistic"}
    assert "| test | logistic: logistic regression" in bundle.path("MODEL_CARD.md").read_text()
    own = bundle.info.metrics["test"]["accuracy"]
    worse = [
        name
        for name, value in bundle.info.provenance["baselines"].items()
        if value["scores"]["test"]["accuracy"] >= own
    ]
    for name in ("most_frequent", "logistic"):
        assert (f"does not beat the baseline {name}: accuracy" in answer.err) == (name in worse)
    tested = command("test", "--checkpoint_name", "x")
    assert [line for line in tested.out.splitlines() if line.startswith(tuple(rows))] == [
        line for line in answer.out.splitlines() if line.startswith(tuple(rows))
    ]
    folder = command("test", "--checkpoint_name", "x", "--test_dir", "tree", "--format", "json")
    assert set(json.loads(folder.out)["baselines"]) == {"most_frequent"}


def test_a_run_that_asks_for_the_regression_learns_the_same(tmp_path: Path) -> None:
    """It leaves the network, its modes and the random numbers as they were."""
    _, manifest, _ = stored(tmp_path / "unused", 3, 30)
    manifest = replace(manifest, splits=np.where(np.arange(30) % 5 == 4, 1, 0).astype(np.int8))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    data = DataSettings(image_size=16, cache=CacheSettings(str(tmp_path / "cache")))
    config = compose_train_config(
        ["data.image_size=16", "trainer.accelerator=cpu", "baselines=true", f"plots_dir={tmp_path}", "model.name=net"]
    )
    config = replace(config, data=data, model=replace(config.model, backbone={"pretrained": True}))
    torch.manual_seed(0)
    classifier = Classifier(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten()),
        nn.Linear(784, 3),
        [0.5] * 3,
        [0.2] * 3,
    )
    weights, numbers = {key: value.clone() for key, value in classifier.state_dict().items()}, torch.get_rng_state()
    cache = PixelCache(pixels, np.arange(30))
    inputs = TrainingInputs(config, manifest, cache, Hardware("32-true", False))
    run = RunDir("run", tmp_path, tmp_path, tmp_path / "run")
    found = baselines_of_run(inputs, classifier, run)
    assert [baseline.name for baseline in found] == ["most_frequent", "logistic"]
    assert "784 features of net (pretrained) at 16 px" in found[1].about
    assert torch.equal(torch.get_rng_state(), numbers) and all(module.training for module in classifier.modules())
    assert all(torch.equal(value, weights[key]) for key, value in classifier.state_dict().items())
    inputs = replace(inputs, config=replace(config, run=replace(config.run, baselines=False)))
    later = baselines_of_run(inputs, classifier, replace(run, plots=tmp_path / "later"))
    assert later == found  # by the manifest


def test_a_baseline_needs_a_val_part(command: Command) -> None:
    answer = command("baseline", *LINE, "data.split.val=0")
    assert answer.code == 2 and "no val images" in answer.err
