"""The exported file answers as the classifier does, for every batch size, and the gate sees what does not."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from image_classifier.errors import ParityError
from image_classifier.exporting import onnx as exporter
from image_classifier.exporting.onnx import export_onnx
from image_classifier.exporting.parity import check_parity
from image_classifier.inference.checkpoint import CheckpointBackend
from image_classifier.inference.onnx_runtime import OnnxBackend
from image_classifier.modeling.classifier import TTA, build_classifier
from image_classifier.modeling.convnet import ConvNet


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[CheckpointBackend, OnnxBackend, Path]:
    torch.manual_seed(0)
    classifier = build_classifier(ConvNet(16, [8, 16]), 4, 16, [0.5] * 3, [0.2] * 3).eval()
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(classifier, 16, {"classes": ["a", "кот", "c", "d"], "preprocess": {"size": 16}}, path)
    return CheckpointBackend(classifier), OnnxBackend(path), path


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_same_logits_for_any_batch(exported: tuple[CheckpointBackend, OnnxBackend, Path], count: int) -> None:
    torch_backend, onnx_backend, _ = exported
    pixels = np.random.default_rng(count).integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)
    expected, actual = torch_backend.logits(pixels), onnx_backend.logits(pixels)
    assert actual.shape == (count, 4) and actual.dtype == np.float32
    assert check_parity(expected, actual, [str(row) for row in range(count)], "onnx") < 1e-5


def test_the_file_is_whole_and_says_what_it_is(exported: tuple[CheckpointBackend, OnnxBackend, Path]) -> None:
    _, backend, path = exported
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert backend.metadata() == {"classes": ["a", "кот", "c", "d"], "preprocess": {"size": 16}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "tta", [pytest.param(name, marks=[] if name == "flip_shift" else pytest.mark.slow) for name in TTA]
)
def test_pixels_become_floats_before_all_else(tta: str, tmp_path: Path) -> None:
    """TensorRT takes integers of 8 bits as an input, to be cast and for nothing more; the answers are those of the
    classifier.
    """
    torch.manual_seed(0)
    classifier = build_classifier(ConvNet(16, [8, 16]), 4, 16, [0.5] * 3, [0.2] * 3, tta=tta).eval()
    export_onnx(classifier, 16, {}, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    shapes = {"Shape"}  # of the input, which is no arithmetic
    assert {node.op_type for node in graph.node if "pixels" in node.input} - shapes == {"Cast"}
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)
    np.testing.assert_allclose(
        OnnxBackend(tmp_path / "model.onnx").logits(pixels), CheckpointBackend(classifier).logits(pixels), atol=1e-5
    )


class PoolsByShape(nn.Module):
    """A network that the TorchScript exporter refuses, as the size of its pooling is computed: images to embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.convolution(images)
        return functional.max_pool2d(features, features.shape[2:]).flatten(1)


def test_what_one_exporter_refuses_the_other_writes_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    classifier = build_classifier(PoolsByShape(), 4, 16, [0.5] * 3, [0.2] * 3).eval()
    assert not exporter._traced(classifier, 16, tmp_path / "refused.onnx")
    export_onnx(classifier, 16, {}, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)
    np.testing.assert_allclose(
        OnnxBackend(tmp_path / "model.onnx").logits(pixels), CheckpointBackend(classifier).logits(pixels), atol=1e-5
    )


def test_the_gate_names_the_image_that_differs() -> None:
    expected = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    paths = [f"cat/{row}.png" for row in range(5)]
    assert check_parity(expected, expected + 1e-7, paths, "onnx") < 1e-6
    shifted = expected.copy()
    shifted[3, 0] += 0.01
    with pytest.raises(ParityError, match=r"cat/3\.png"):
        check_parity(expected, shifted, paths, "onnx")
    flipped = expected.copy()
    flipped[2] = -flipped[2]
    with pytest.raises(ParityError, match=r"another class on 1 of 5 images, worst on 'cat/2\.png'"):
        check_parity(expected, flipped, paths, "onnx")
    broken = expected.copy()
    broken[1] = np.nan
    with pytest.raises(ParityError):
        check_parity(expected, broken, paths, "onnx")
