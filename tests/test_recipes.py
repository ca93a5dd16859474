"""The five systems that this project replaces, each as one recipe: it asks for what the system was, and it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from image_classifier.errors import ConfigError
from image_classifier.modeling.backbones import torchvision_backbone
from tests.conftest import QUICK, Command, MakeTree

CONF = Path(__file__).resolve().parents[1] / "conf"

# What each system was, as keys of the composed configuration; a tuple allows several values.
SYSTEMS: dict[str, dict[str, Any]] = {
    "simpsons_cnn": {
        "data.name": "simpsons",
        "data.image_size": 224,
        "data.batch_size": 128,
        "data.balance": "sampler",
        "model.backbone.channels": [8, 16, 32, 64, 96, 128],
        "model.backbone.order": ["conv", "activation", "pool", "norm"],
        "model.backbone.dropout": [0.2, 0.2, 0.2, 0.2, 0.0, 0.0],
        "model.backbone.activation": "relu",
        "model.backbone.hidden": [4096, 4096],
        "model.normalise": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "loss._target_": "image_classifier.modeling.losses.CrossEntropy",
        "optimizer._target_": "torch.optim.Adam",
        "scheduler.build._target_": "torch.optim.lr_scheduler.ExponentialLR",
        "scheduler.build.gamma": 0.5,
        "scheduler.interval": "epoch",
        "augment.rotation": 45.0,
        "augment.perspective": 0.7,
        "augment.flip": True,
        "trainer.max_epochs": 15,
    },
    "simpsons_focal": {
        "data.name": "simpsons",
        "data.batch_size": 64,
        "data.balance": "none",
        "model.backbone.channels": [16, 32, 64, 128, 256, 512],
        "model.backbone.order": ["conv", "activation", "pool", "norm"],
        "model.backbone.hidden": [120, 84],
        "model.backbone.hidden_dropout": [0.0, 0.1],
        "loss._target_": "image_classifier.modeling.losses.FocalLoss",
        "optimizer._target_": "torch.optim.Adam",
        "optimizer.lr": 2e-3,
        "optimizer.weight_decay": 1e-4,
        "scheduler.build": None,
        "trainer.max_epochs": 150,
        "callbacks.early_stopping": None,
    },
    "flowers_rexnet": {
        "data.name": "flowers",
        "data.image_size": 224,
        "data.split.test": 0.05,
        "data.split.val": 0.05,
        "data.split.seed": 2024,
        "model.backbone._target_": "timm.create_model",
        "model.backbone.model_name": "rexnet_150.nav_in1k",
        "model.backbone.pretrained": True,
        "model.normalise": "auto",
        "loss._target_": "image_classifier.modeling.losses.SupervisedContrastive",
        "loss.joint": True,
        "optimizer._target_": "torch.optim.Adam",
        "trainer.check_val_every_n_epoch": 5,
        "callbacks.early_stopping._target_": "pytorch_lightning.callbacks.EarlyStopping",
    },
    "cifar10_resnet": {
        "data.name": "cifar10",
        "data.image_size": 32,
        "model.backbone.name": "resnet18",
        "model.normalise": "auto",
        "loss._target_": "image_classifier.modeling.losses.CrossEntropy",
        "augment.flip": True,
    },
    "cat_breeds_vit": {
        "data.name": "cats",
        "data.image_size": 224,
        "data.batch_size": 128,
        "data.classes.top": 50,
        "data.split.test": 0.2,
        "data.split.val": 0.16,
        "data.split.seed": 83,
        "model.backbone.model_name": "vit_base_patch16_224.augreg_in21k",
        "model.backbone.pretrained": True,
        "loss._target_": "image_classifier.modeling.losses.CrossEntropy",
        "optimizer._target_": "torch.optim.AdamW",
        "optimizer.lr": 1e-4,
        "optimizer.weight_decay": 1e-3,
        "scheduler.warmup": 0.1,
        "trainer.max_epochs": 6,
        "baselines": True,
    },
}

# The same recipe made small enough for a test: the network's shape stays, only its width shrinks.
SMALL: dict[str, list[str]] = {
    "simpsons_cnn": ["data.image_size=64", "model.backbone.hidden=[16,16]"],
    "simpsons_focal": ["model.backbone.channels=[4,4,8,8,8,8]"],
    "flowers_rexnet": ["data.image_size=32", "model.backbone.pretrained=false", "trainer.check_val_every_n_epoch=1"],
    "cifar10_resnet": [],
    "cat_breeds_vit": ["data.image_size=32", "model.backbone.pretrained=false"]
    + [
        f"+model.backbone.{key}={value}"
        for key, value in (("img_size", 32), ("depth", 1), ("embed_dim", 24), ("num_heads", 2))
    ],
}


def composed(name: str) -> Any:
    from hydra import compose, initialize_config_dir

    import image_classifier.cli.hydra_app  # noqa: F401  (registers what the files may refer to)

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [f"experiment={name}"])


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recipe_asks_for_what_the_system_was(name: str) -> None:
    from omegaconf import OmegaConf

    config = composed(name)
    assert {key: OmegaConf.select(config, key) for key in SYSTEMS[name]} == SYSTEMS[name]


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recipe_opens_with_its_command_its_source_and_its_result(name: str) -> None:
    head = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").partition("defaults:")[0]
    assert head.startswith("# @package _global_\n# ")
    assert f"python commands.py train experiment={name}" in head
    assert "\n# Source: " in head
    result = head.partition("\n# Result: ")[2]
    assert "accuracy" in result and "px" in result and "2026-" in result


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recipe_trains_from_images_to_a_bundle(
    name: str, command: Command, make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = make_tree(a=12, b=12, c=12)
    monkeypatch.chdir(tree.parent)
    split = ["data.split.test=0.2", "data.split.val=0.2"]
    line = [f"experiment={name}", "data=folder", "data.dir=tree", "data.batch_size=8", *split, *SMALL[name]]
    answer = command("train", *line, "trainer.max_epochs=1", *QUICK, "name=x")
    assert answer.code == 0, answer.err
    bundle = json.loads(Path("models/x/bundle.json").read_text())
    assert bundle["classes"] == ["a", "b", "c"]
    assert set(bundle["metrics"]) == {"val", "test"}
    kept = bundle["provenance"]["baselines"]
    assert set(kept) == ({"most_frequent", "logistic"} if name == "cat_breeds_vit" else {"most_frequent"})


def test_a_resnet_for_small_images_does_not_shrink_them_at_once() -> None:
    network = torchvision_backbone("resnet18", small_images=True)
    sizes: list[tuple[int, ...]] = []
    network.layer1.register_forward_hook(lambda _module, _inputs, output: sizes.append(tuple(output.shape)))
    assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    assert sizes == [(2, 64, 32, 32)]
    with pytest.raises(ConfigError, match="small_images is for ResNets, not for mobilenet_v2"):
        torchvision_backbone("mobilenet_v2", small_images=True)
