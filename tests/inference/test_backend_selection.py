"""`backend=auto`, and what ONNX Runtime runs a model on."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from image_classifier.bundle import Bundle, read_bundle
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.inference import backend_selection
from image_classifier.inference.backend_selection import candidates, fastest_backend
from image_classifier.inference.golden import Golden
from image_classifier.inference.onnx_runtime import OnnxBackend, providers
from image_classifier.inference.predictor import Backend
from tests.conftest import Command, run_apart


class Fake:
    """Answers the golden images as they were answered, but for `off`, and takes its time."""

    def __init__(self, logits: np.ndarray, seconds: float, off: float = 0.0) -> None:
        self.answer, self.seconds = (
            logits + np.where(np.arange(logits.shape[1]) == 0, off, 0).astype(np.float32),
            seconds,
        )

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        time.sleep(self.seconds)
        return self.answer


def choose(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, **made: tuple[float, float]) -> tuple[str, Backend]:
    logits = Golden.of(bundle).logits
    monkeypatch.setattr(backend_selection, "candidates", lambda _: list(made))
    monkeypatch.setattr(backend_selection, "open_backend", lambda _, name, __: Fake(logits, *made[name]))
    return fastest_backend(bundle)


def test_the_fastest_that_agrees_is_taken(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = read_bundle(digits_bundle)
    with caplog.at_level("INFO"):
        assert choose(bundle, monkeypatch, onnx=(0.02, 0.0), int8=(0.001, 0.01), wrong=(0.0, 9.0))[0] == "int8"
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("backend ")]
    assert (
        line.startswith("backend int8: onnx ")
        and "int8 " in line
        and "ms an image" in line
        and "wrong differs by up to" in line
    )
    assert choose(bundle, monkeypatch, onnx=(0.001, 0.0), int8=(0.02, 0.01))[0] == "onnx"
    with pytest.raises(CheckpointError, match="no backend answers"):
        choose(bundle, monkeypatch, onnx=(0.0, 9.0))
    with pytest.raises(CheckpointError, match="none is installed"):
        choose(bundle, monkeypatch)


def test_a_backend_that_cannot_be_opened_is_passed_over(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(digits_bundle)
    logits = Golden.of(bundle).logits

    def opened(_: Bundle, name: str, trusted: object) -> Backend:
        if name == "openvino":
            raise ConfigError("not installed")
        return Fake(logits, 0.0)

    monkeypatch.setattr(backend_selection, "candidates", lambda _: ["openvino", "onnx"])
    monkeypatch.setattr(backend_selection, "open_backend", opened)
    assert fastest_backend(bundle)[0] == "onnx"


def test_torch_is_loaded_only_where_nothing_else_is_there(digits_bundle: Path) -> None:
    bundle = read_bundle(digits_bundle)
    found = candidates(bundle)
    assert "onnx" in found and not {"checkpoint", "tensorrt", "int8"} & set(found)
    only = Bundle(
        digits_bundle,
        type(bundle.info)(**{**vars(bundle.info), "files": {"model.ckpt": bundle.info.files["model.ckpt"]}}),
    )
    assert candidates(only) == ["checkpoint"]


@pytest.mark.parametrize(
    ("exports", "expected"),
    [
        ({}, "onnx openvino openvino-bf16"),
        ({"int8": {"refused": "too slow", "files": []}}, "onnx openvino openvino-bf16"),
        (
            {"int8": {"files": ["model.int8.onnx"], "agreement": 1.0, "largest_difference": 0.1}},
            "onnx openvino openvino-bf16",
        ),
        (
            {"int8": {"files": ["model.int8.onnx"], "agreement": 0.995, "largest_difference": 0.01}},
            "onnx openvino openvino-bf16",
        ),
        ({"int8": {"agreement": 1.0, "largest_difference": 0.02}}, "onnx openvino openvino-bf16 int8"),
        (
            {
                "openvino": {
                    "agreement": 1.0,
                    "largest_difference": 1e-6,
                    "bf16": {"agreement": 1.0, "largest_difference": 0.06},
                }
            },
            "onnx openvino",
        ),
        ({"openvino": {"bf16": {"agreement": 1.0, "largest_difference": 0.01}}}, "onnx openvino openvino-bf16"),
    ],
    ids=str,
)
def test_what_an_export_found_counts_more_than_eight_golden_images(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch, exports: dict[str, object], expected: str
) -> None:
    monkeypatch.setattr(backend_selection, "fitting", lambda _: ["onnx", "openvino", "openvino-bf16", "int8"])
    known = read_bundle(digits_bundle)
    assert set(candidates(Bundle(digits_bundle, replace(known.info, exports=exports)))) == set(expected.split())


@pytest.mark.slow
def test_auto_answers_as_the_backend_that_it_takes(
    digits_bundle: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(digits_bundle.parents[1])
    answer = run_apart(
        "infer",
        "--checkpoint_name",
        "digits",
        "--backend",
        "auto",
        "--images",
        "data/digits/test/0",
        "--format",
        "json",
    )
    assert answer.code == 0 and answer.err.splitlines()[0].startswith("backend ")
    plain = json.loads(
        command("infer", "--checkpoint_name", "digits", "--images", "data/digits/test/0", "--format", "json").out
    )
    for row, exact in zip(json.loads(answer.out), plain, strict=True):
        assert row["all_predictions"] == pytest.approx(exact["all_predictions"], abs=0.02)


@pytest.mark.parametrize(
    ("available", "tensorrt", "expected"),
    [
        (["CPU"], False, ["CPU"]),
        (["Azure", "CPU"], False, ["CPU"]),
        (["Tensorrt", "CUDA", "CPU"], False, ["CUDA", "CPU"]),
        (["CPU", "CUDA", "Tensorrt"], True, ["Tensorrt", "CUDA", "CPU"]),
        (["Tensorrt", "CPU"], True, ["Tensorrt", "CPU"]),
    ],
)
def test_a_model_runs_on_the_best_there_is(
    available: list[str], tensorrt: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: [f"{name}ExecutionProvider" for name in available]
    )
    assert providers(tensorrt) == [f"{name}ExecutionProvider" for name in expected]


def test_tensorrt_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(ConfigError, match="no TensorRT"):
        providers(tensorrt=True)


def test_a_gpu_that_does_not_load_is_said_and_never_replaced_where_it_was_asked_for(
    digits_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on a machine without a driver: CUDA raises or is left out, TensorRT too."""
    asked: list[tuple[list[str], list[dict[str, str]]]] = []
    raises = True

    class Session(onnxruntime.InferenceSession):
        def __init__(
            self,
            path: str,
            options: object,
            providers: list[str],
            provider_options: list[dict[str, str]],
            enable_fallback: int,
        ) -> None:
            asked.append((providers, provider_options))
            assert enable_fallback == 0
            if raises and len(providers) > 1:
                raise RuntimeError("CUDA failure 35:\n CUDA driver version is insufficient")
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: [f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU")],
    )
    golden, model = Golden.of(read_bundle(digits_bundle)), digits_bundle / "model.onnx"
    for raises in (True, False):
        caplog.clear()
        np.testing.assert_allclose(OnnxBackend(model).logits(golden.pixels), golden.logits, atol=1e-4)
        assert [record.getMessage() for record in caplog.records] == [
            "ONNX Runtime has CUDA built in, but its libraries cannot be loaded: the CPU is used"
        ]
        with pytest.raises(ConfigError, match="insufficient" if raises else "cannot be loaded") as caught:
            OnnxBackend(model, tensorrt=True)
        assert "\n" not in str(caught.value)
    assert asked[0] == (["CUDAExecutionProvider", "CPUExecutionProvider"], [{"use_tf32": "0"}, {}])
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="not an ONNX model"):
        OnnxBackend(tmp_path / "broken.onnx")
    assert capfd.readouterr().out == ""
