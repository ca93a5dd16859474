"""model.safetensors: timm opens it where it can and answers alike, and `model.weights` starts from either form."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from timm.data import create_transform, resolve_data_config

from image_classifier.exporting.weights_file import write_weights_file
from image_classifier.images import Preprocess
from image_classifier.instantiate import instantiate
from image_classifier.modeling.classifier import Classifier, build_classifier
from image_classifier.modeling.weights import load_weights, read_weights

SIZE = 64
NORMALISE = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
CLASSES = ["ant", "bee", "über"]
RESNET = {"_target_": "timm.create_model", "model_name": "test_resnet", "pretrained": True, "num_classes": 0}
VIT = {"_target_": "timm.create_model", "model_name": "test_vit", "num_classes": 0, "img_size": SIZE}
DISTILLED = {"_target_": "timm.create_model", "model_name": "deit_tiny_distilled_patch16_224", "num_classes": 0}
CONVNET = {"_target_": "image_classifier.modeling.convnet.ConvNet", "image_size": SIZE, "channels": [4]}


def made(node: dict[str, Any], seed: int = 0, dropout: float = 0.1) -> Classifier:
    torch.manual_seed(seed)
    small = {"depth": 1} if node is DISTILLED else {}
    backbone = instantiate({**node, **small, **({"pretrained": False} if node is RESNET else {})})
    size = 224 if node is DISTILLED else SIZE
    return build_classifier(backbone, len(CLASSES), size, **NORMALISE, dropout=dropout).eval()


def written(classifier: Classifier, node: dict[str, Any], folder: Path, mode: str = "crop") -> np.ndarray:
    """Write the file, and return the pixels with which it was compared."""
    size = 224 if node is DISTILLED else SIZE
    blueprint = {
        "classes": CLASSES,
        "preprocess": Preprocess(size, mode).as_dict(),
        "normalise": NORMALISE,
        "temperature": 1.5,
        "backbone": node,
        "initial_weights": {"origin": "timm", "name": "x", "licence": "cc-by-nc-4.0"},
    }
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, size, size), dtype=np.uint8)
    write_weights_file(classifier, blueprint, pixels, folder)
    return pixels


@pytest.mark.parametrize("node", [RESNET, VIT], ids=["resnet", "vit"])
@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_timm_opens_the_folder_and_answers_alike_with_its_own_transforms(
    tmp_path: Path, node: dict[str, Any], mode: str
) -> None:
    classifier = made(node)
    written(classifier, node, tmp_path, mode)
    opened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert opened.num_classes == 3 and opened.pretrained_cfg["license"] == "cc-by-nc-4.0"
    assert list(opened.pretrained_cfg["label_names"]) == CLASSES
    # A square is cropped and padded alike to the bit; squashing is the same operation for any image.
    shape = (70, 90, 3) if mode == "squash" else (80, 80, 3)
    image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    transform: Any = create_transform(**resolve_data_config({}, model=opened))
    pixels = torch.from_numpy(Preprocess(SIZE, mode)(image)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        actual, expected = opened(transform(Image.fromarray(image))[None]), classifier(pixels)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_timm_starts_a_network_for_other_classes_from_the_folder(tmp_path: Path) -> None:
    classifier = made(RESNET)
    written(classifier, RESNET, tmp_path)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    assert torch.equal(other.state_dict()["conv1.0.weight"], classifier.backbone.state_dict()["conv1.0.weight"])


@pytest.mark.parametrize(
    ("node", "says"), [(CONVNET, ""), (DISTILLED, "timm cannot open the bundle")], ids=["convnet", "distilled"]
)
def test_other_networks_keep_their_own_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, node: dict[str, Any], says: str
) -> None:
    caplog.set_level(logging.INFO, "image_classifier")
    classifier = made(node)
    written(classifier, node, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"] and says in caplog.text
    tensors, expected = read_weights(tmp_path / "model.safetensors"), classifier.state_dict()
    assert tensors.keys() == expected.keys() and {"scale", "shift"} < tensors.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("node", [RESNET, CONVNET], ids=["timm", "own"])
def test_a_training_can_start_from_either_form(tmp_path: Path, node: dict[str, Any]) -> None:
    classifier, fresh = made(node), made(node, seed=1, dropout=0)
    pixels = torch.from_numpy(written(classifier, node, tmp_path))
    load_weights(fresh, read_weights(tmp_path / "model.safetensors"), "model.safetensors")
    torch.testing.assert_close(fresh(pixels), classifier(pixels))
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        header = file.metadata()
    assert header["format"] == "pt" and header["license"] == "cc-by-nc-4.0"
    assert json.loads(header["classes"]) == CLASSES and json.loads(header["normalise"]) == NORMALISE


def test_writing_leaves_the_network_and_the_random_numbers_as_they_are(tmp_path: Path) -> None:
    classifier = made(RESNET)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    state = torch.get_rng_state()
    written(classifier, RESNET, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    after = classifier.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
