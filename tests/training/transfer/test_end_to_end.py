"""`train FOLDER model.weights=FILE` from pictures to verified bundles, of which none is worse than the probe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision import models

from image_classifier.bundle import read_bundle
from image_classifier.manifest import Manifest
from tests.conftest import QUICK, Command

COLOURS = {"blue": (40, 60, 200), "green": (60, 200, 60), "red": (200, 60, 40)}


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with a network's weights, beside a folder of wide pictures whose left and right edges show the class."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for label, colour in COLOURS.items():
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(0, 200, (64, 96, 3), dtype=np.uint8)
            pixels[:, np.r_[0:16, 80:96]] = pixels[:, np.r_[0:16, 80:96]] // 4 + 3 * np.array(colour, np.uint8) // 4
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number}.png")
    torch.manual_seed(0)
    torch.save(models.mobilenet_v2().state_dict(), "mobilenet_v2-0123abcd.pth")
    return "mobilenet_v2-0123abcd.pth"


def test_photographs_and_a_file_of_weights_make_a_model_that_is_no_worse_than_its_probe(
    command: Command, weights: str
) -> None:
    line = ("train", "photos", f"model.weights={weights}", "data.image_size=64", *QUICK)
    quick = command(*line, "effort=quick", "name=quick", "data.resize=auto")
    assert quick.code == 0, quick.err
    assert "images   48 training images of 3 classes, median 96 x 64 px" in quick.err
    assert "network  mobilenet_v2, pretrained (mobilenet_v2-0123abcd.pth)" in quick.err
    settled = yaml.safe_load(Path("runs/quick/config.yaml").read_text())["data"]
    assert settled["resize"] in ("squash", "pad", "crop") and settled["image_size"] == 64
    assert f"resize   {settled['resize']}, by 5-fold cross-validation on 48 training images" in quick.err

    normal = command(
        *line,
        "effort=normal",
        "trainer.max_epochs=2",
        "name=normal",
        f"data.resize={settled['resize']}",
    )
    assert normal.code == 0, normal.err
    assert "the delivered model was then fitted to these images too" in normal.out
    assert not list(Path("runs/normal").glob("activations*"))
    for name, tried in (("quick", ["probe"]), ("normal", ["probe", "50% of the way", "75% of the way", "fine-tuned"])):
        bundle = read_bundle(Path("models") / name)
        bundle.verify()
        rows = bundle.info.provenance["candidates"]
        assert [row["name"] for row in rows] == tried
        (chosen,) = (row for row in rows if row["delivered"])
        # Fitted again to train and val: the bundle lists no val image. A probe's val scores are out of fold, those of
        # a network are the ones it was chosen by.
        refit = {"refit_folds", "refit_epochs"} & set(bundle.info.provenance)
        assert refit == {"refit_folds" if chosen["name"] == "probe" else "refit_epochs"}
        assert not len(Manifest.read(bundle.path("manifest.csv"), Path()).indices("val"))
        if "refit_epochs" in refit:
            assert bundle.info.metrics["val"]["accuracy"] == pytest.approx(chosen["val_accuracy"])
        assert chosen["val_accuracy"] >= rows[0]["val_accuracy"]
        curve = bundle.info.provenance["learning_curve"]
        assert curve["points"][-1][0] == 48 and set(curve) == {"points", "gain", "error", "needy"}
        assert bundle.info.provenance["initial_weights"]["name"] == weights
    assert command("verify", "normal").code == 0


@pytest.mark.slow
def test_a_fine_tuning_that_found_its_rate_is_the_one_that_was_given_it(command: Command, weights: str) -> None:
    line = ("train", "photos", f"model.weights={weights}", "data.image_size=64", "trainer.max_epochs=2", *QUICK)
    found = command(*line, "optimizer.lr=auto", "name=found")
    assert found.code == 0 and "(found: the loss is lowest there; plots/found/learning_rate_finder.png)" in found.err
    rate = yaml.safe_load(Path("runs/found/config.yaml").read_text())["optimizer"]["lr"]
    assert 1e-6 <= rate <= 10
    given = command(*line, f"optimizer.lr={rate}", "name=given")
    assert given.code == 0, given.err
    first, second = (
        torch.load(f"models/{name}/model.ckpt", weights_only=True)["state_dict"] for name in ("found", "given")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_quick_has_no_rate_to_find(command: Command, weights: str) -> None:
    line = ("train", "photos", f"model.weights={weights}", "data.image_size=64", *QUICK)
    answer = command(*line, "effort=quick", "optimizer.lr=auto", "name=quick")
    assert answer.code == 0 and "found: the loss" not in answer.err


@pytest.mark.slow
def test_rate_batch_size_and_steps_of_a_fine_tuning_can_all_be_found(command: Command, weights: str) -> None:
    line = ("train", "photos", f"model.weights={weights}", "data.image_size=64", *QUICK)
    answer = command(
        *line,
        "optimizer.lr=auto",
        "data.batch_size=auto",
        "trainer.max_epochs=null",
        "trainer.max_time=00:00:00:06",
        "name=found",
    )
    assert answer.code == 0, answer.err
    for key in ("data.batch_size", "trainer.max_steps", "optimizer.lr"):
        assert f"{key}: " in answer.err
