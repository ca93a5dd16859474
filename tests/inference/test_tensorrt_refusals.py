"""TensorRT: models, bundles, keys and machines that are refused in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest

from image_classifier.bundle import Bundle, read_bundle
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.inference.backend_selection import candidates
from image_classifier.inference.backends import fitting, open_backend, takes_minutes
from image_classifier.inference.onnx_runtime import OnnxBackend
from image_classifier.inference.tensorrt.backend import TensorRtBackend
from image_classifier.inference.tensorrt.cache import PLACE
from image_classifier.inference.tensorrt.engine import EngineSettings, build, is_installed, package
from tests.conftest import Command
from tests.inference.fake_tensorrt import TensorRt


def test_a_model_that_is_none_of_ours_is_refused(bundle: Bundle, trt: TensorRt, tmp_path: Path) -> None:
    model = onnx.load(bundle.path("model.onnx"))
    model.graph.input[0].name = "image"
    for node in model.graph.node:
        node.input[:] = ["image" if name == "pixels" else name for name in node.input]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(CheckpointError, match="does not take pixels uint8"):
        build(tmp_path / "other.onnx", EngineSettings())
    onnx.save(
        onnx.load(bundle.path("model.onnx")),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="weights",
        size_threshold=0,
    )
    with pytest.raises(CheckpointError, match="weights are in another file"):
        build(tmp_path / "m.onnx", EngineSettings())


@pytest.mark.parametrize(
    "facts", [{"precision": "int8"}, {"max_batch_size": 0}, {"max_batch_size": "64"}, {"precision": []}]
)
def test_a_bundle_that_describes_no_engine_is_refused(bundle: Bundle, trt: TensorRt, facts: dict[str, object]) -> None:
    content = json.loads((bundle.directory / "bundle.json").read_text())
    (bundle.directory / "bundle.json").write_text(json.dumps({**content, "exports": {"tensorrt": facts}}))
    with pytest.raises(CheckpointError, match="describes an invalid engine"):
        open_backend(read_bundle(bundle.directory), "tensorrt")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("--tensorrt.precision", "int8"), "tensorrt.precision='int8'"),
        (("--tensorrt.max_batch_size", "0"), "at least 1"),
    ],
)
def test_bad_keys_are_one_line(bundle: Bundle, command: Command, line: tuple[str, ...], says: str) -> None:
    answer = command("export", str(bundle.directory), "--to", "tensorrt", *line)
    assert answer.code == 2 and says in answer.err and len(answer.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("package", "the package tensorrt, which is not installed"),
        ("library", "cannot be loaded (libnvinfer.so.11: cannot open"),
        ("generation", "8.6.1 is not supported"),
        ("driver", "cudaErrorInsufficientDriver"),
        ("gpu", "cudaErrorNoDevice"),
    ],
)
def test_where_something_is_missing_both_verbs_say_it_in_one_line(
    bundle: Bundle, trt: TensorRt, command: Command, monkeypatch: pytest.MonkeyPatch, lacks: str, says: str
) -> None:
    if lacks == "package":
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        monkeypatch.setattr("image_classifier.inference.tensorrt.engine.is_installed", lambda: False)
    elif lacks == "library":
        monkeypatch.setattr("image_classifier.inference.tensorrt.engine.is_installed", lambda: True)
        monkeypatch.delitem(sys.modules, "tensorrt")
        monkeypatch.setattr("sys.meta_path", [Unloadable(), *sys.meta_path])
    elif lacks == "generation":
        trt.__version__ = "8.6.1"
    else:
        errors = trt.cuda.cudaError_t
        trt.cuda.error = errors.cudaErrorNoDevice if lacks == "gpu" else errors.cudaErrorInsufficientDriver
    before = {path: path.read_bytes() for path in bundle.directory.rglob("*") if path.is_file()}
    place = str(bundle.directory)
    for line in (
        ("export", place, "--to", "sealed", "tensorrt"),
        ("infer", "--checkpoint_name", place, "--backend", "tensorrt", "--images", "data/digits/test/3"),
    ):
        answer = command(*line)
        assert answer.code == 2 and answer.out == "" and says in answer.err, answer.err
        assert len(answer.err.strip().splitlines()) == 1 and "--backend onnx" in answer.err
    assert {path: path.read_bytes() for path in bundle.directory.rglob("*") if path.is_file()} == before
    assert not (Path.home() / PLACE).exists() and "tensorrt" not in fitting(bundle)


class Unloadable:
    """Finds `tensorrt`, whose libraries are not there, as where its bindings alone are installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "tensorrt":
            raise ImportError("libnvinfer.so.11: cannot open shared object file: No such file or directory")


def test_the_builder_itself_may_refuse_to_be(trt: TensorRt, bundle: Bundle) -> None:
    trt.refuses_to_start = True
    with pytest.raises(ConfigError, match=r"cannot be used here \(CUDA initialization failure"):
        build(bundle.path("model.onnx"), EngineSettings())


def test_without_a_driver_no_engine_is_handed_to_tensorrt_which_would_crash(
    trt: TensorRt, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt.cuda.error = trt.cuda.cudaError_t.cudaErrorInsufficientDriver
    monkeypatch.setattr(trt, "Runtime", lambda logger: pytest.fail("it was"))
    for failing in (lambda: TensorRtBackend(b"plan", 1), lambda: build(bundle.path("model.onnx"), EngineSettings())):
        with pytest.raises(ConfigError, match="cudaErrorInsufficientDriver"):
            failing()


def test_a_folder_called_tensorrt_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_installed():
        pytest.skip("tensorrt is installed")
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="not installed"):
        package()


def test_where_onnx_runtime_alone_has_tensorrt_it_is_used_and_said(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("image_classifier.inference.tensorrt.engine.is_installed", lambda: False)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CPUExecutionProvider"]
    )
    asked: list[object] = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path: str, options: object, providers: list[str], **kwargs: object) -> None:
            asked.append(providers)
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return ["TensorrtExecutionProvider", "CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    assert "tensorrt" in fitting(bundle) and takes_minutes(bundle, "tensorrt") and "tensorrt" not in candidates(bundle)
    with caplog.at_level("INFO"):
        backend = open_backend(bundle, "tensorrt")
    assert isinstance(backend, OnnxBackend) and asked == [["TensorrtExecutionProvider", "CPUExecutionProvider"]]
    assert "TensorRT through ONNX Runtime" in caplog.text
