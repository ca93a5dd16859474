"""Weights from files: found under any wrapper and prefix, fitted by name and shape, told in the log; nothing in a
file is run.
"""

import contextlib
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from image_classifier.errors import CheckpointError, ClassifierError
from image_classifier.modeling.backbones import pretrained_normalise, torchvision_backbone
from image_classifier.modeling.classifier import Classifier, build_classifier
from image_classifier.modeling.convnet import ConvNet
from image_classifier.modeling.weights import inherit, last_linear, load_weights, read_weights

MEAN, STD = [0.5] * 3, [0.25] * 3
CLASSES = ("ant", "bee", "cow")


def network(seed: int, classes: int = 3, channels: tuple[int, ...] = (4, 6), dropout: float = 0.0) -> Classifier:
    torch.manual_seed(seed)
    return build_classifier(ConvNet(16, channels), classes, 16, MEAN, STD, dropout)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == name_ and torch.equal(value, value_) for (name, value), (name_, value_) in pairs)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO, "image_classifier")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


WRAPPERS: list[Callable[[dict[str, Any]], Any]] = [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
    lambda state: {"model": state, "args": {"lr": 0.1}},
    lambda state: {
        "state_dict": {name: torch.zeros_like(value) for name, value in state.items()},
        "state_dict_ema": state,
    },
    lambda state: {"ema": {"module": state, "decay": 0.99}},
    lambda state: {"epoch": torch.tensor(3), "model_state_dict": state},
]
PREFIXES = [
    "",
    "module.",
    "backbone.",
    "model.backbone.",
    "classifier.backbone.",
    "_orig_mod.",
    "module._orig_mod.",
    "net.encoder.",
]


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wrapper=st.sampled_from(WRAPPERS), prefix=st.sampled_from(PREFIXES))
def test_any_wrapper_and_prefix_is_seen_through(
    tmp_path: Path, wrapper: Callable[[dict[str, Any]], Any], prefix: str
) -> None:
    source, target = network(0), network(1)
    torch.save(
        wrapper({prefix + name: value for name, value in source.backbone.state_dict().items()}), tmp_path / "w.pth"
    )
    assert not same(source.backbone, target.backbone)
    load_weights(target, read_weights(tmp_path / "w.pth"), "w.pth")
    assert same(source.backbone, target.backbone)


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.safetensors", "w.ckpt"])
def test_every_kind_of_file_holds_the_same_weights(tmp_path: Path, name: str, said: Callable[[], str]) -> None:
    source, target = network(0), network(1)
    (save_file if name.endswith("safetensors") else torch.save)(source.state_dict(), tmp_path / name)
    load_weights(target, read_weights(tmp_path / name), name)
    assert same(source.backbone, target.backbone)
    assert f"weights: 12 of the backbone's 12 tensors from {name}" in said()
    assert "the head from head.weight of the file" in said()
    assert same(source.head, target.head)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    source, target = network(0), network(1)
    save_file({name: value.half() for name, value in source.backbone.state_dict().items()}, tmp_path / "w.safetensors")
    load_weights(target, read_weights(tmp_path / "w.safetensors"), "w")
    assert all(value.dtype == torch.float32 for value in target.backbone.parameters())
    torch.testing.assert_close(target.backbone[0][0].weight, source.backbone[0][0].weight, rtol=1e-3, atol=1e-3)


def test_a_head_and_a_stem_that_do_not_fit_start_anew_and_are_named(said: Callable[[], str]) -> None:
    source, target = network(0, classes=7), network(1)
    state = {name: value for name, value in source.state_dict().items() if name != "backbone.1.1.bias"}
    state["backbone.0.0.weight"] = torch.zeros(4, 1, 3, 3)  # for grey images
    stem, head = target.backbone[0][0].weight.clone(), last_linear(target.head).weight.clone()
    load_weights(target, state, "w.pth")
    assert torch.equal(target.backbone[0][0].weight, stem) and torch.equal(last_linear(target.head).weight, head)
    assert torch.equal(target.backbone[1][0].weight, source.backbone[1][0].weight)
    assert "10 of the backbone's 12 tensors" in said()
    assert "0.0.weight is new: its shape is [4, 3, 3, 3], in the file [4, 1, 3, 3]" in said()
    assert "not in the file, so new: 1.1.bias" in said()
    assert "the head is new: its shape is [3, 6], in the file [7, 6] (head.weight)" in said()


def test_a_file_of_another_network_is_refused_with_names_of_both_sides() -> None:
    with pytest.raises(CheckpointError) as refusal:
        load_weights(network(0), network(0, channels=(8, 12)).state_dict(), "other.pth")
    assert (
        "'other.pth'" in str(refusal.value)
        and "0.0.weight" in str(refusal.value)
        and "backbone.0.0.weight" in str(refusal.value)
    )
    assert "\n" not in str(refusal.value)
    with pytest.raises(CheckpointError, match="another network"):
        load_weights(network(0), {"step": torch.tensor(3)}, "x.pth")


class Runs:
    """Pickled code that would leave a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "folder",
        "empty",
        "text",
        "cut",
        "cut.safetensors",
        "text.safetensors",
        "no weights",
        "header.safetensors",
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / (kind if kind.endswith("safetensors") else f"{kind}.pth")
    if kind == "folder":
        path.mkdir()
    elif kind.startswith("cut"):
        (save_file if path.suffix == ".safetensors" else torch.save)(network(0).state_dict(), path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "no weights":
        torch.save({"epoch": 3}, path)
    elif kind != "missing":
        path.write_bytes(
            {"empty": b"", "text": b"hello", "text.safetensors": b"hello there", "header.safetensors": b"\xff" * 16}[
                kind
            ]
        )
    with pytest.raises(CheckpointError) as refusal:
        read_weights(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from([".pth", ".safetensors"]))
def test_a_damaged_byte_never_ends_in_a_traceback(tmp_path: Path, data: st.DataObject, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network(0).state_dict(), path)
    content = bytearray(path.read_bytes())
    for _ in range(3):
        content[data.draw(st.integers(0, min(len(content), 3000) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    with contextlib.suppress(ClassifierError):
        load_weights(network(1), read_weights(path), path.name)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": network(0).state_dict(), "run": Runs(tmp_path / "trace")}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="has more than weights in it"):
        read_weights(tmp_path / "w.pth")
    torch.save(network(0), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"Classifier.*state_dict\(\) alone"):
        read_weights(tmp_path / "whole.pth")
    assert not (tmp_path / "trace").exists()


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    known=st.lists(st.sampled_from("abcdef"), min_size=1, unique=True),
    classes=st.lists(st.sampled_from("abcdef"), min_size=1, unique=True),
    dropout=st.sampled_from([0.0, 0.2]),
)
def test_a_class_of_both_keeps_its_row(known: list[str], classes: list[str], dropout: float) -> None:
    source, target = network(0, len(known)), network(1, len(classes), dropout=dropout)
    before = last_linear(target.head).weight.clone()
    inherit(target, source, classes, known)
    assert same(source.backbone, target.backbone)
    for row, name in enumerate(classes):
        expected = last_linear(source.head).weight[known.index(name)] if name in known else before[row]
        assert torch.equal(last_linear(target.head).weight[row], expected)


def test_the_log_names_the_classes(said: Callable[[], str]) -> None:
    inherit(network(0), network(1), CLASSES, ("cow", "dog", "ant"))
    assert said() == "head: classes kept: ant, cow; new: bee; removed: dog"


def test_normalisation_is_known_of_weights_from_a_file() -> None:
    backbone = torchvision_backbone("mobilenet_v3_small")
    assert pretrained_normalise(backbone, {"pretrained": None, "weights": None}) is None
    assert pretrained_normalise(backbone, {"pretrained": "w.pth"}) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_unknown_pretrained_weights_name_the_known_ones() -> None:
    with pytest.raises(ClassifierError, match=r"IMAGENET1K_V1.*model\.weights=PATH"):
        torchvision_backbone("mobilenet_v3_small", weights="NONSENSE")


def test_pretrained_weights_that_cannot_be_downloaded_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(*arguments: Any, **options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(
        CheckpointError, match=r"cannot download the pretrained weights of mobilenet_v3_small.*model\.weights=PATH"
    ):
        torchvision_backbone("mobilenet_v3_small", weights="DEFAULT")


@pytest.fixture(scope="session")
def imagenet(shared_data: Path) -> Path:
    path = shared_data.parent / "weights" / "mobilenet_v2-imagenet.pth"
    if not path.is_file():
        pytest.skip("../shared/weights is not here: no pretrained weights to test on")
    return path


def photographs(archive: Path, count: int) -> torch.Tensor:
    """So many images of each class, uint8 [C, count, 3, 160, 160]."""
    by_class: dict[str, list[np.ndarray]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            found = by_class.setdefault(Path(member.name).parent.name, [])
            if member.name.lower().endswith(".jpg") and len(found) < count:
                with Image.open(tar.extractfile(member)) as image:  # type: ignore[arg-type]
                    found.append(np.asarray(image.convert("RGB").resize((160, 160))).transpose(2, 0, 1))
    return torch.from_numpy(np.stack([np.stack(images) for images in by_class.values() if images]))


@pytest.mark.slow
def test_imagenet_weights_tell_flowers_apart(imagenet: Path, shared_data: Path, said: Callable[[], str]) -> None:
    """The class whose mean embedding is nearest is the right one far more often than by chance (1 in 5)."""
    pixels = photographs(shared_data / "flowers-native.tar", 20)
    backbone = torchvision_backbone("mobilenet_v2")
    mean, std = pretrained_normalise(backbone, {"pretrained": True}) or ([], [])
    classifier = build_classifier(backbone, len(pixels), 160, mean, std).eval()
    load_weights(classifier, read_weights(imagenet), imagenet.name)
    assert "weights: 312 of the backbone's 312 tensors" in said()
    assert "the head is new: its shape is [5, 1280], in the file [1000, 1280] (classifier.1.weight)" in said()
    with torch.inference_mode():
        embeddings = nn.functional.normalize(classifier.embed(pixels.flatten(0, 1)), dim=1).unflatten(
            0, pixels.shape[:2]
        )
    means, judged = nn.functional.normalize(embeddings[:, :10].mean(dim=1), dim=1), embeddings[:, 10:]
    right = (judged @ means.T).argmax(dim=2) == torch.arange(len(pixels)).unsqueeze(1)
    assert right.float().mean() > 0.65
