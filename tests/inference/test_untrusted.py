"""Bundles, checkpoints and ONNX files from anywhere: an answer or one clear error, nothing run, nothing read beyond
their folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import image_classifier.bundle
from image_classifier.bundle import read_bundle
from image_classifier.errors import ClassifierError
from image_classifier.exporting.parity_data import ParitySet
from image_classifier.images import DEFAULT_LIMITS
from image_classifier.inference import backend_selection
from image_classifier.inference.backends import fitting
from image_classifier.inference.checkpoint import load_classifier, network_of
from image_classifier.inference.golden import Golden
from image_classifier.inference.load import load_predictor
from image_classifier.inference.verify import checkable, verify_backend
from tests.conftest import Command

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
QUICK = hypothesis_settings(
    max_examples=40, phases=(Phase.generate,), suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def bundle(digits_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(digits_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def image(digits_bundle: Path) -> Path:
    return next((digits_bundle.parents[1] / "data/digits/test/3").iterdir())


def resealed(folder: Path, name: str, content: bytes) -> None:
    """A file replaced together with its hash, as whoever hands the bundle on can do."""
    (folder / name).write_bytes(content)
    info = json.loads((folder / "bundle.json").read_text())
    info["files"][name] = hashlib.sha256(content).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(info))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("name", ["torch.ckpt", "plain.ckpt", "plain.onnx"])
def test_a_pickle_is_never_run(command: Command, digits_bundle: Path, tmp_path: Path, name: str) -> None:
    bomb, path = Bomb(tmp_path / "run"), tmp_path / name
    torch.save(bomb, path) if name.startswith("torch") else path.write_bytes(pickle.dumps(bomb))
    answer = command("infer", "--checkpoint_name", str(path), "--images", str(image(digits_bundle)))
    assert answer.code == 2 and len(answer.err.strip().splitlines()) == 1 and answer.out == ""
    assert not (tmp_path / "run").exists()


TIMM, TORCHVISION = "timm.create_model", "image_classifier.modeling.backbones.torchvision_backbone"


@pytest.mark.parametrize(
    "backbone",
    [
        {"_target_": TIMM, "_args_": ["resnet18", False, None, None, "extra.pth"]},
        {"_target_": TIMM, "model_name": "resnet18", "drop": {"_args_": []}},
        {"_target_": "torchvision.models.resnet18", "_args_": [{"a": 1}]},
        {"_target_": "torchvision.models.segmentation.fcn_resnet50"},
        {"_target_": "torchvision.models.get_model", "name": "fcn_resnet50"},
        {"_target_": TORCHVISION, "name": "fcn_resnet50"},
        {"_target_": TIMM, "model_name": "hf-hub:evil/model"},
        {"_target_": TIMM, "model_name": "local-dir:/etc"},
        {"_target_": TIMM, "model_name": ["resnet18"]},
        {"_target_": TIMM, "model_name": "${oc.env:HOME}"},
        {"_target_": TIMM, "model_name": "test_resnet", "block_args": 3},
        {"_target_": "image_classifier.modeling.convnet.ConvNet", "image_size": 32, "channels": "wide"},
        "timm.create_model",
    ],
    ids=str,
)
def test_a_checkpoint_asks_for_no_other_file_nor_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: Any
) -> None:
    def reached(*_: object, **__: object) -> None:
        pytest.fail("reached")  # which nothing takes for a network that cannot be built

    for name in (
        "socket.create_connection",
        "socket.getaddrinfo",
        "timm.models._builder.load_pretrained",
        "timm.models._factory.load_checkpoint",
    ):
        monkeypatch.setattr(name, reached)
    blueprint = {
        "backbone": backbone,
        "classes": ["a", "b"],
        "preprocess": {"size": 32},
        "normalise": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    torch.save(
        {"state_dict": {}, "hyper_parameters": {"blueprint": {**blueprint, "head_dropout": 0.0}}},
        tmp_path / "evil.ckpt",
    )
    with pytest.raises(ClassifierError) as caught:
        load_classifier(tmp_path / "evil.ckpt")
    assert "\n" not in str(caught.value)


def test_what_fetches_is_turned_off_rather_than_left_to_chance() -> None:
    asked = {
        "pretrained": True,
        "weights": "DEFAULT",
        "checkpoint_path": "a.pth",
        "pretrained_cfg": {"file": "a.pth"},
        "drop_rate": 0.1,
    }
    node = network_of({"backbone": {"_target_": TIMM, "model_name": "vit_tiny", "inner": [asked]}})
    assert node == {
        "_target_": TIMM,
        "model_name": "vit_tiny",
        "pretrained": False,
        "inner": [{"pretrained": False, "weights": None, "drop_rate": 0.1}],
    }


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/../../outside", "c:/outside", "..\\outside"])
def test_a_bundle_names_no_file_outside_its_folder(bundle: Path, command: Command, name: str) -> None:
    info = json.loads((bundle / "bundle.json").read_text())
    info["files"][name] = "0" * 64
    (bundle / "bundle.json").write_text(json.dumps(info))
    answer = command("verify", str(bundle))
    assert answer.code == 2 and "invalid file entry" in answer.err and len(answer.err.strip().splitlines()) == 1


EXPORTS = {
    "int8": {"files": [], "tolerance": 1.0, "agreement": 1.0, "largest_difference": 0.1},
    "openvino": {"bf16": {"agreement": 1.0}},
}


def changed(data: st.DataObject, value: Any, depth: int = 3) -> Any:
    """The value with something else in its place, or in that of something inside it."""
    if depth and isinstance(value, dict) and value and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(value)))
        return {**value, key: changed(data, value[key], depth - 1)}
    return data.draw(JSON)


@given(data=st.data())
@QUICK
def test_any_bundle_json_gives_a_predictor_or_a_clear_error(
    digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.setattr(
        backend_selection, "fitting", lambda bundle: [name for name in fitting(bundle) if name in ("onnx", "int8")]
    )
    folder = tmp_path / "bundle"
    if not folder.exists():
        shutil.copytree(digits_bundle, folder)
    info = {**json.loads((digits_bundle / "bundle.json").read_text()), "exports": EXPORTS}
    for key in data.draw(st.lists(st.sampled_from(sorted(info)), min_size=1, max_size=2, unique=True)):
        info[key] = changed(data, info[key])
    (folder / "bundle.json").write_text(json.dumps(info))
    for backend in ("onnx", "auto"):
        with suppress(ClassifierError):
            (answer,) = load_predictor(folder, backend).predict([image(digits_bundle)])
            assert answer.error or answer.label in read_bundle(folder).info.classes
    with suppress(ClassifierError):
        bundle = read_bundle(folder)
        bundle.verify()
        assert [verify_backend(bundle, name).agreement for name in checkable(bundle) if name == "onnx"] in ([], [1.0])


@pytest.mark.parametrize(
    "change",
    [
        {"exports": {"int8": 5}},
        {"exports": {"onnx": {"tolerance": "abc"}}},
        {"exports": {"onnx": {"tolerance": float("nan")}}},
        {"exports": {"int8": {"files": 3}}},
        {"exports": {"int8": {"largest_difference": None}}},
        {"exports": {"openvino": {"bf16": []}}},
        {"metrics": {"val": 3}},
        {"metrics": {"val": {"accuracy": "high"}}},
        {"intervals": {"val": []}},
        {"temperature": 10**400},
    ],
    ids=lambda change: str(change)[:60],
)
def test_figures_that_cannot_be_are_refused(bundle: Path, command: Command, change: dict[str, Any]) -> None:
    info = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**info, **change}))
    answer = command("verify", str(bundle))
    assert answer.code == 2 and "is not a bundle" in answer.err and len(answer.err.strip().splitlines()) == 1


@given(data=st.data())
@QUICK
def test_a_mutated_onnx_file_gives_answers_or_a_clear_error(
    digits_bundle: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray((digits_bundle / "model.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "evil.onnx").write_bytes(
        content[: data.draw(st.integers(1, len(content)))] if data.draw(st.booleans()) else content
    )
    with suppress(ClassifierError):
        (answer,) = load_predictor(tmp_path / "evil.onnx").predict([image(digits_bundle)])
        assert answer.error or answer.label


def test_an_onnx_file_reads_no_other_file(bundle: Path, command: Command, digits_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 4096)
    model = onnx.load(bundle / "model.onnx")
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../secret"), ("offset", "0"), ("length", "4")):
        weight.external_data.add(key=key, value=value)
    resealed(bundle, "model.onnx", model.SerializeToString())
    answer = command("infer", "--checkpoint_name", str(bundle), "--images", str(image(digits_bundle)))
    assert answer.code == 2 and answer.out == "" and len(answer.err.strip().splitlines()) == 1
    with pytest.raises(ClassifierError, match="its weights are in another file"):
        ParitySet.of(read_bundle(bundle), None, 5, (), DEFAULT_LIMITS)  # what every export begins with


def test_a_model_for_other_squares_or_classes_is_refused(bundle: Path, command: Command, digits_bundle: Path) -> None:
    info = json.loads((bundle / "bundle.json").read_text())
    for change, says in (
        ({"classes": ["a", "b"]}, "logits of"),
        ({"preprocess": {**info["preprocess"], "size": 9}}, "pixels of"),
    ):
        (bundle / "bundle.json").write_text(json.dumps({**info, **change}))
        answer = command("infer", "--checkpoint_name", str(bundle), "--images", str(image(digits_bundle)))
        assert answer.code == 2 and says in answer.err and "Traceback" not in answer.err


def npz(folder: Path, **arrays: np.ndarray) -> bytes:
    with (folder / "made.npz").open("wb") as file:
        np.savez_compressed(file, allow_pickle=True, **arrays)
    content = (folder / "made.npz").read_bytes()
    (folder / "made.npz").unlink()
    return content


@pytest.mark.parametrize("name", ["golden.npz", "ood.npz"])
def test_arrays_that_would_fill_the_memory_are_not_unpacked(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    resealed(bundle, name, npz(tmp_path, **dict(np.load(bundle / name)), more=np.zeros(9 * 2**20, np.uint8)))

    def read() -> object:
        return Golden.of(read_bundle(bundle)) if name == "golden.npz" else load_predictor(bundle)

    read()
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("unpacked"))
    monkeypatch.setattr(image_classifier.bundle, "_MAX_ARRAY_BYTES", 2**23)
    with pytest.raises(ClassifierError, match=rf"{name}.* the limit is 8388608"):
        read()


@pytest.mark.parametrize("name", ["golden.npz", "ood.npz"])
def test_arrays_of_other_shapes_or_types_are_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    known = dict(np.load(bundle / name))
    lying = io.BytesIO()
    with zipfile.ZipFile(lying, "w") as archive:  # a header may claim any size
        for key in known:
            np.lib.format.write_array_header_1_0(
                header := io.BytesIO(), {"descr": "|u1", "fortran_order": False, "shape": (2**20, 2**20, 2**10)}
            )
            archive.writestr(f"{key}.npy", header.getvalue())
    changed = [
        npz(tmp_path, **{**known, key: odd})
        for key, value in known.items()
        for odd in (value[:0], value[None], value.astype(complex))
    ]
    changed += [
        npz(tmp_path, **{**known, key: np.repeat(value, 99, 0)})
        for key, value in known.items()
        if key not in ("means", "looks_mean")
    ]
    objects = npz(tmp_path, **{key: np.array([Bomb(tmp_path / "run")], dtype=object) for key in known})
    for content in (b"", b"other", lying.getvalue(), objects, *changed):
        resealed(bundle, name, content)
        with pytest.raises(ClassifierError, match=name.replace(".", r"\.")):
            Golden.of(read_bundle(bundle)) if name == "golden.npz" else load_predictor(bundle)
    assert not (tmp_path / "run").exists()


def test_a_detector_of_another_network_is_refused(bundle: Path, tmp_path: Path, digits_bundle: Path) -> None:
    known = dict(np.load(bundle / "ood.npz"))
    resealed(
        bundle,
        "ood.npz",
        npz(tmp_path, **{**known, "means": known["means"][:, :5], "whitening": known["whitening"][:5, :5]}),
    )
    with pytest.raises(ClassifierError, match="expects 5 features, but the model gives"):
        list(load_predictor(bundle).predict([image(digits_bundle)]))
