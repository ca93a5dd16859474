"""Test-time augmentation: what is averaged, when, and that a bundle answers so everywhere."""

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from image_classifier.errors import ConfigError
from image_classifier.exporting.onnx import export_onnx
from image_classifier.exporting.parity import check_parity
from image_classifier.inference.checkpoint import CheckpointBackend, load_classifier
from image_classifier.inference.onnx_runtime import OnnxBackend
from image_classifier.modeling.classifier import TTA, Classifier, build_classifier, tta_views
from image_classifier.modeling.convnet import ConvNet

SIZE = 16
SEEDS = st.integers(0, 2**32 - 1)


@cache
def classifier_with(tta: str) -> Classifier:
    torch.manual_seed(0)
    return build_classifier(ConvNet(SIZE, [8, 16], global_pool=False), 4, SIZE, [0.5] * 3, [0.2] * 3, tta=tta).eval()


def images(seed: int, count: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8))


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_a_mirrored_image_gets_the_same_answer_with_flip(seed: int) -> None:
    classifier, pixels = classifier_with("flip"), images(seed)
    with torch.inference_mode():
        assert torch.equal(classifier(pixels), classifier(pixels.flip(3)))
        plain = classifier_with("none")
        assert not torch.allclose(plain(pixels), plain(pixels.flip(3)), atol=1e-3)


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_flip_shift_is_the_weighted_mean_over_reflect_padded_crops(seed: int) -> None:
    pixels = images(seed).float()
    with torch.inference_mode():
        plain = classifier_with("none")
        padded = functional.pad(pixels, (1, 1, 1, 1), "reflect")
        views = [(pixels, 0.5), (padded[:, :, :SIZE, :SIZE], 0.25), (padded[:, :, 2:, 2:], 0.25)]
        expected = sum(weight / 2 * (plain(view) + plain(view.flip(3))) for view, weight in views)
        torch.testing.assert_close(classifier_with("flip_shift")(pixels), expected, rtol=1e-4, atol=1e-5)
        unmirrored = sum(weight * plain(view) for view, weight in views)
        torch.testing.assert_close(classifier_with("shift")(pixels), unmirrored, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tta", TTA)
def test_weights_sum_to_one_and_views_keep_their_kind(tta: str) -> None:
    pixels = images(1).contiguous(memory_format=torch.channels_last)
    views = tta_views(pixels, tta)
    assert sum(weight for _, weight in views) == 1
    assert len(views) == classifier_with(tta).num_views
    assert {(view.shape, view.dtype) for view, _ in views} == {(pixels.shape, pixels.dtype)}


def test_training_sees_each_image_once() -> None:
    classifier, pixels = copy.deepcopy(classifier_with("flip_shift")).train(), images(2)
    with torch.inference_mode():
        assert torch.equal(classifier(pixels), classifier.classify(classifier.embed(pixels)))


@pytest.mark.slow
@pytest.mark.parametrize("tta", ["flip", "shift", "flip_shift"])
def test_torch_onnx_and_a_reloaded_checkpoint_agree(tta: str, tmp_path: Path) -> None:
    classifier = classifier_with(tta)
    export_onnx(classifier, SIZE, {}, tmp_path / "model.onnx")
    backbone = {
        "_target_": "image_classifier.modeling.convnet.ConvNet",
        "image_size": SIZE,
        "channels": [8, 16],
        "global_pool": False,
    }
    normalise = {"mean": [0.5] * 3, "std": [0.2] * 3}
    blueprint = {
        "classes": list("abcd"),
        "preprocess": {"size": SIZE},
        "normalise": normalise,
        "backbone": backbone,
        "head_dropout": 0.0,
        "tta": tta,
    }
    state = {f"classifier.{key}": value for key, value in classifier.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"blueprint": blueprint}}, tmp_path / "model.ckpt")
    reloaded, _ = load_classifier(tmp_path / "model.ckpt")
    for count in (1, 2, 5):
        pixels = images(count, count).numpy()
        expected = CheckpointBackend(classifier).logits(pixels)
        assert expected.shape == (count, 4)
        assert check_parity(expected, OnnxBackend(tmp_path / "model.onnx").logits(pixels), [""] * count, "onnx") < 1e-5
        assert np.array_equal(CheckpointBackend(reloaded).logits(pixels), expected)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="model.tta=rotate"):
        classifier_with("rotate")
