"""What is measured of a backend: the calls after the first ones, for as long as was allowed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from image_classifier.bundle import read_bundle
from image_classifier.errors import CheckpointError
from image_classifier.inference.backends import fitting
from image_classifier.inference.latency import (
    _MIN_CALLS,
    _WARM_UP,
    Latency,
    hardware,
    measure_backend,
    measure_latency,
    timed,
)
from tests.conftest import Command


class Sleeper:
    """Takes two milliseconds an image, and half a second the first time."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        time.sleep(0.5 if not self.shapes else 0.002 * len(pixels))
        self.shapes.append(pixels.shape)
        return np.zeros((len(pixels), 2), np.float32)


@pytest.mark.slow
def test_the_first_calls_do_not_count_and_times_are_what_they_are() -> None:
    sleeper = Sleeper()
    found = measure_backend(sleeper, 8, 4)
    assert 2 <= found["p50_ms"] <= found["p95_ms"]
    assert found["p50_ms"] < 250  # half a second was the first call's alone
    assert found["images_per_s"] <= 500
    assert set(sleeper.shapes) == {(1, 3, 8, 8), (4, 3, 8, 8)}


def test_a_slow_model_is_called_a_few_times_only() -> None:
    calls: list[int] = []
    spent = timed(lambda: (calls.append(1), time.sleep(0.01)), seconds=0.0)
    assert len(spent) == _MIN_CALLS and len(calls) == _MIN_CALLS + _WARM_UP
    assert len(timed(lambda: None, seconds=60, max_calls=25)) == 25


def test_what_fails_in_the_other_process_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="latency of the backend onnx") as caught:
        measure_latency(tmp_path / "model.onnx")
    assert "\n" not in str(caught.value) and "model.onnx" in str(caught.value)


def test_the_lines_name_the_machine() -> None:
    row = {"p50_ms": 1.25, "p95_ms": 2.5, "images_per_s": 800.0, "batch_size": 64, "megabytes": 0.4}
    lines = list(Latency({"onnx": row}, hardware()).lines())
    assert lines[0] == "latency onnx: p50 1.2 ms, p95 2.5 ms, 800 images/s at 64, 0.4 MB"
    assert "cores" in lines[1]


@pytest.mark.slow
def test_every_backend_of_a_bundle_is_measured(
    command: Command, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    answer = command(
        "test", "--checkpoint_name", "digits", "--plots_dir", str(tmp_path), "--format", "json", "--latency"
    )
    assert answer.code == 0, answer.err
    latency = json.loads((tmp_path / "digits/latency.json").read_text())
    installed = set(fitting(read_bundle(trained / "models/digits")))
    assert json.loads(answer.out)["latency"] == latency and set(latency["backends"]) == installed >= {
        "onnx",
        "checkpoint",
    }
    for name, row in latency["backends"].items():
        assert 0 < row["p50_ms"] <= row["p95_ms"] and row["images_per_s"] > 0
        assert row["megabytes"] == (trained / "models/digits" / row["file"]).stat().st_size / 1e6, name
    assert latency["hardware"]["cores"] >= 1 and latency["hardware"]["processor"]
