"""The sealed graph resizes as `images.Preprocess` does, for pictures of any shape, and answers with calibrated
probabilities.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from image_classifier.exporting.onnx import export_onnx
from image_classifier.exporting.sealed import sealed
from image_classifier.images import Preprocess
from image_classifier.inference.onnx_runtime import OnnxBackend
from image_classifier.inference.sealed import SealedModel
from image_classifier.modeling.classifier import build_classifier
from image_classifier.modeling.convnet import ConvNet
from image_classifier.predictions import softmax

SIDE, TEMPERATURE = 16, 1.7
WAYS = [
    (mode, kernel, fraction)
    for mode in ("crop", "squash", "pad")
    for kernel in ("bilinear", "bicubic")
    for fraction in (1.0, 0.875)
]


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str, float], tuple[Preprocess, SealedModel, OnnxBackend]]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sealed")
    classifier = build_classifier(ConvNet(16, [4, 8]), 3, SIDE, [0.5] * 3, [0.2] * 3).eval()
    export_onnx(classifier, SIDE, {"classes": ["a", "b", "c"]}, folder / "model.onnx")
    found = {}
    for mode, kernel, fraction in WAYS:
        preprocess = Preprocess(SIDE, mode, kernel, fraction)
        facts = {"classes": ["a", "b", "c"], "preprocess": preprocess.as_dict()}
        onnx.save(sealed(onnx.load(folder / "model.onnx"), preprocess, TEMPERATURE, facts), folder / "sealed.onnx")
        found[mode, kernel, fraction] = (
            preprocess,
            SealedModel(folder / "sealed.onnx"),
            OnnxBackend(folder / "model.onnx"),
        )
    return found


@given(way=st.sampled_from(WAYS), height=st.integers(1, 90), width=st.integers(1, 90), seed=st.integers(0, 99))
@hypothesis_settings(max_examples=150)
def test_a_picture_of_any_size_gets_the_answer_of_its_square(
    models: dict[tuple[str, str, float], tuple[Preprocess, SealedModel, OnnxBackend]],
    way: tuple[str, str, float],
    height: int,
    width: int,
    seed: int,
) -> None:
    preprocess, model, backend = models[way]
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    expected = softmax(backend.logits(preprocess(image).transpose(2, 0, 1)[None]), TEMPERATURE)[0]
    actual = model.probabilities(image)
    assert actual.shape == (3,) and actual.sum() == pytest.approx(1, abs=1e-5)
    assert np.abs(actual - expected).max() < 0.02


def pixels_of(model: SealedModel, image: np.ndarray) -> np.ndarray:
    """What the network of a sealed model was given but for a common addend, where that network gives its pixels as
    logits.
    """
    return np.asarray(
        np.log(model.probabilities(image).astype(np.float64)).reshape(3, SIDE, SIDE).transpose(1, 2, 0) * 64
    )


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_pictures_of_hard_edges_become_the_same_pixels(way: tuple[str, str, float], tmp_path: Path) -> None:
    """Black beside white, where kernels overshoot; tall, wide and square, which Pillow resizes in different orders."""
    pixels = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["batch", 3, SIDE, SIDE])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 3 * SIDE**2])
    nodes = [
        onnx.helper.make_node("Flatten", ["pixels"], ["row"]),
        onnx.helper.make_node("Cast", ["row"], ["logits"], to=onnx.TensorProto.FLOAT),
    ]
    network = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "pixels", [pixels], [logits]), opset_imports=[onnx.helper.make_opsetid("", 20)]
    )
    mode, kernel, fraction = way
    preprocess = Preprocess(SIDE, mode, kernel, fraction)
    facts = {"classes": [str(number) for number in range(3 * SIDE**2)], "preprocess": preprocess.as_dict()}
    onnx.save(sealed(network, preprocess, 64.0, facts), tmp_path / "sealed.onnx")
    model = SealedModel(tmp_path / "sealed.onnx")
    random = np.random.default_rng(0)
    for height, width in [
        (70, 50),
        (50, 70),
        (64, 64),
        (200, 31),
        (31, 200),
        (9, 9),
        (90, 12),
        (12, 90),
        (40, 17),
        (1, 30),
        (30, 1),
    ]:
        image = (random.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)
        difference = pixels_of(model, image) - preprocess(image)
        levels = np.abs(difference - np.median(difference))
        assert levels.max() < 2.01 and (levels > 1.01).mean() < 0.01, (
            height,
            width,
        )  # a level that was rounded otherwise between the passes


def test_the_file_says_what_it_is(
    models: dict[tuple[str, str, float], tuple[Preprocess, SealedModel, OnnxBackend]], tmp_path: Path
) -> None:
    preprocess, model, _ = models[WAYS[0]]
    found = {key: json.loads(value) for key, value in model.session.get_modelmeta().custom_metadata_map.items()}
    assert found == {"classes": ["a", "b", "c"], "preprocess": preprocess.as_dict()} and model.classes == (
        "a",
        "b",
        "c",
    )
    (given_in,), (given_out,) = model.session.get_inputs(), model.session.get_outputs()
    assert (given_in.name, given_in.shape, given_in.type) == ("image", ["height", "width", 3], "tensor(uint8)")
    assert (given_out.name, given_out.shape) == ("probabilities", [3])
