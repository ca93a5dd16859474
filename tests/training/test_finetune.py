"""One checkpoint, many lives: runs that start from a bundle or a file, and losses whose neck the bundle leaves
behind.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from image_classifier.bundle import read_bundle, sha256_of
from image_classifier.cli.train_config import compose_train_config
from image_classifier.inference.checkpoint import load_classifier
from image_classifier.modeling.losses import BinaryCrossEntropy, CrossEntropy, FocalLoss
from image_classifier.modeling.weights import last_linear
from image_classifier.training.builders import build_criteria
from tests.conftest import QUICK, Answer, Command, MakeTree

SMALL = (
    "data=folder",
    "data.dir=tree",
    "data.image_size=32",
    "data.batch_size=4",
    "data.duplicates.threshold=1",
    "trainer.max_epochs=1",
    "+trainer.limit_train_batches=1",
    *QUICK,
    "name=child",
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_tree: MakeTree) -> None:
    monkeypatch.chdir(tmp_path)
    make_tree(**{"3": 8, "owl": 8, "7": 8})


def rewrite(bundle: Path, folder: Path, change: Any) -> Path:
    """A copy of a bundle's checkpoint with something changed."""
    content = torch.load(bundle / "model.ckpt", weights_only=True)
    change(content)
    path = folder / "changed.ckpt"
    torch.save(content, path)
    return path


def test_a_run_goes_on_from_a_bundle_with_other_classes(command: Command, digits_bundle: Path, tmp_path: Path) -> None:
    """A learning rate of nothing shows what the run started with."""
    shutil.copytree(digits_bundle, tmp_path / "models" / "digits")
    answer = command("train", *SMALL, "model=mlp", "model.from=digits", "optimizer.lr=1e-12", "model.freeze=backbone")
    assert answer.code == 0, answer.err
    for text in (
        "from: network, normalisation and weights of models/digits/model.ckpt (10 classes)",
        "head: classes kept: 3, 7; new: owl; removed: 0, 1, 2, 4, 5 and 3 more",
    ):
        assert text in answer.err
    (parent, old), (child, new) = (
        load_classifier(digits_bundle / "model.ckpt"),
        load_classifier(tmp_path / "models/child/model.ckpt"),
    )
    assert (
        new["backbone"] == old["backbone"]
        and new["normalise"] == old["normalise"]
        and new["classes"] == ["3", "7", "owl"]
    )
    torch.testing.assert_close(child.backbone[0][0].weight, parent.backbone[0][0].weight)
    torch.testing.assert_close(last_linear(child.head).weight[:2], last_linear(parent.head).weight[[3, 7]])
    assert not torch.allclose(last_linear(child.head).weight[2], last_linear(parent.head).weight[5], atol=1e-3)
    assert "ConvNet" in (tmp_path / "runs/child/config.yaml").read_text()
    origin = read_bundle(tmp_path / "models/child").info.provenance["initial_weights"]
    assert origin == {"origin": "scratch", "bundles": ["digits"]}


@pytest.mark.slow
def test_a_run_goes_on_from_a_run_checkpoint_at_another_size(command: Command, trained: Path, tmp_path: Path) -> None:
    path = trained / "runs/digits/checkpoints/best.ckpt"
    answer = command(
        "train", *SMALL, "data.image_size=24", f"model.from={path}", "model.normalise=dataset", "model.head_dropout=0.5"
    )
    assert answer.code == 0, answer.err
    assert "was trained at 32 px and this run is at 24" in answer.err
    _, blueprint = load_classifier(tmp_path / "models/child/model.ckpt")
    assert blueprint["preprocess"]["size"] == 24 and blueprint["head_dropout"] == 0.5
    assert blueprint["normalise"] != dict(read_bundle(trained / "models/digits").info.normalise)


def foreign(content: dict[str, Any]) -> None:
    content["hyper_parameters"]["blueprint"]["backbone"]["_target_"] = "my_networks.Net"


def loader(content: dict[str, Any]) -> None:
    content["hyper_parameters"]["blueprint"]["backbone"] = {"_target_": "torchvision.datasets.FakeData"}


def other_weights(content: dict[str, Any]) -> None:
    content["state_dict"]["classifier.backbone.0.0.weight"] = torch.zeros(1)


def no_blueprint(content: dict[str, Any]) -> None:
    content["hyper_parameters"] = {}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (foreign, "trusted_packages=[my_networks]"),
        (loader, "is not on the list"),
        (other_weights, "do not fit its network"),
        (no_blueprint, "not a checkpoint of this package"),
    ],
)
def test_a_checkpoint_that_cannot_be_gone_on_from_is_refused(
    command: Command, digits_bundle: Path, tmp_path: Path, change: Any, says: str
) -> None:
    assert_refused(command, tmp_path, (f"model.from={rewrite(digits_bundle, tmp_path, change)}",), says)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("model.from=nothing",), "no checkpoint 'nothing'"),
        (("model.from=model.onnx",), "takes a bundle or a .ckpt"),
        (("model.weights=nothing.pth",), "no file 'nothing.pth'"),
        (("model.weights=a.pth", "model.from=b"), "both give the initial weights"),
        (("model.weights=other.pth",), "cannot tell which network the weights in 'other.pth' belong to"),
        (("model.weights=other.pth", "model=convnet"), "from another network"),
        (("model=base",), "no model.backbone"),
        (("model.from=flat.ckpt", "data.image_size=16", "model=base"), "cannot take images of 16 px"),
    ],
)
def test_a_start_that_cannot_be_is_refused_before_the_data_is_touched(
    command: Command, digits_bundle: Path, tmp_path: Path, line: tuple[str, ...], says: str
) -> None:
    shutil.copy(digits_bundle / "model.onnx", tmp_path / "model.onnx")
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pth")
    content = torch.load(digits_bundle / "model.ckpt", weights_only=True)
    node = content["hyper_parameters"]["blueprint"]
    node["backbone"] = {"_target_": "image_classifier.modeling.convnet.MLP", "image_size": 32, "hidden": [4]}
    shapes = {"backbone.1.weight": (4, 3072), "backbone.1.bias": (4,), "head.weight": (10, 4), "head.bias": (10,)}
    kept = {name: content["state_dict"][name] for name in ("classifier.scale", "classifier.shift")}
    content["state_dict"] = kept | {f"classifier.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    torch.save(content, tmp_path / "flat.ckpt")
    assert_refused(command, tmp_path, line, says)


def assert_refused(command: Command, folder: Path, line: tuple[str, ...], says: str) -> Answer:
    answer = command("train", *SMALL, *line)
    assert answer.code == 2, answer.err
    assert answer.err.splitlines()[-1].startswith("error: ") and says in answer.err.splitlines()[-1], answer.err
    assert "Traceback" not in answer.err
    assert not (folder / "data").exists() and not (folder / "runs").exists()
    return answer


def test_pretrained_weights_without_a_network_name_the_way_out(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = ("model=timm", "model.backbone.model_name=resnet18", "model.backbone.pretrained=true")
    answer = assert_refused(command, tmp_path, line, "cannot download the pretrained weights of resnet18")
    assert "model.weights=PATH" in answer.err


def test_a_run_from_the_weights_of_a_file_downloads_nothing_and_says_what_their_licence_restricts(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_file(timm.create_model("test_resnet").state_dict(), "weights.safetensors", {"license": "cc-by-nc-4.0"})
    network = ("model=timm", "model.backbone.model_name=test_resnet", "model.backbone.pretrained=true")
    answer = command("train", *SMALL, *network, "model.weights=weights.safetensors")
    assert answer.code == 0, answer.err
    said = "The training started from the file weights.safetensors (licence cc-by-nc-4.0)."
    assert answer.err.count("The licence cc-by-nc-4.0 forbids commercial use") == 1 and said in answer.err
    bundle = read_bundle(Path("models/child"))
    bundle.verify()
    # Mean and std are known by the weights.
    assert bundle.info.normalise["mean"] == list(timm.get_pretrained_cfg("test_resnet").mean)
    assert bundle.info.provenance["initial_weights"] == {
        "origin": "file",
        "name": "weights.safetensors",
        "licence": "cc-by-nc-4.0",
        "sha256": sha256_of(Path("weights.safetensors")),
    }
    card, page = bundle.path("MODEL_CARD.md").read_text(), bundle.path("report.html").read_text()
    assert "forbids commercial use" in card and said in page and "forbids commercial use" in page
    assert timm.create_model("local-dir:models/child", pretrained=True).num_classes == 3
    # A run that starts from this one inherits the restriction.
    answer = command("train", *SMALL, "name=grandchild", "model=base", "model.from=child")
    assert answer.code == 0 and "by way of the model child (licence cc-by-nc-4.0)" in answer.err, answer.err
    inherited = read_bundle(Path("models/grandchild")).info.provenance["initial_weights"]
    assert inherited == {**bundle.info.provenance["initial_weights"], "bundles": ["child"]}


@pytest.mark.slow
def test_from_weights_of_a_file_a_neck_learns_that_checkpoints_keep_and_the_bundle_leaves(
    command: Command, digits_bundle: Path, tmp_path: Path
) -> None:
    answer = command(
        "train",
        *SMALL,
        "model=convnet",
        "loss=supcon",
        "data.balance=weights",
        f"model.weights={digits_bundle / 'model.ckpt'}",
    )
    assert answer.code == 0, answer.err
    assert "weights: 18 of the backbone's 18 tensors" in answer.err
    assert "the head is new: its shape is [3, 128], in the file [10, 128] (classifier.head.weight)" in answer.err
    kept = torch.load(tmp_path / "runs/child/checkpoints/best.ckpt", weights_only=True)
    necks = [value for name, value in kept["state_dict"].items() if name.startswith("criterion.neck.")]
    assert (
        len(necks) == 4 and sum(len(group["params"]) for group in kept["optimizer_states"][0]["param_groups"]) >= 4 + 8
    )
    from_run, _ = load_classifier(tmp_path / "runs/child/checkpoints/best.ckpt")
    from_bundle, _ = load_classifier(tmp_path / "models/child/model.ckpt")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(from_run(pixels), from_bundle(pixels))
    content = torch.load(tmp_path / "models/child/model.ckpt", weights_only=True)
    assert all(name.startswith("classifier.") for name in content["state_dict"])
    assert json.loads((tmp_path / "models/child/bundle.json").read_text())["classes"] == ["3", "7", "owl"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("loss=supcon", "augment=mix"), "augment.mix gives shares of several"),
        (("loss=supcon", "augment=none"), "loss.views=2"),
        (("loss=focal", "loss.weight=[1,2]"), "loss.weight has 2 numbers for 3 classes"),
        (("loss=bce", "loss.label_smoothing=2"), "loss.label_smoothing must be from 0 to 1"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(command: Command, line: tuple[str, ...], says: str) -> None:
    answer = command("train", *SMALL, *line)
    assert answer.code == 2 and says in answer.err.splitlines()[-1], answer.err


@pytest.mark.parametrize(
    ("loss", "criterion"), [("focal", FocalLoss), ("bce", BinaryCrossEntropy), ("cross_entropy", CrossEntropy)]
)
def test_these_losses_take_mixed_images_and_class_weights(loss: str, criterion: type[torch.nn.Module]) -> None:
    config = compose_train_config([f"loss={loss}", "augment=mix"])
    built, validation = build_criteria(config.loss, np.array([0, 0, 1]), 2, balance="weights", is_mixed=True)
    assert (
        isinstance(built, criterion)
        and torch.allclose(built.weight, torch.tensor([0.75, 1.5]))
        and validation.weight is None
    )
    assert torch.isfinite(built(torch.zeros(2, 2), torch.full((2, 2), 0.5)))
    weighted = config.with_values({"loss.weight": [1.0, 3.0]})
    built, validation = build_criteria(weighted.loss, np.array([0, 0, 1]), 2)
    assert built.weight.tolist() == [1.0, 3.0] and validation.weight is None  # val/loss compares runs
