"""Fixtures of the TensorRT tests: a bundle, and a machine that seems to have a GPU and TensorRT."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from image_classifier.bundle import Bundle, read_bundle
from image_classifier.inference.tensorrt import cuda
from tests.inference.fake_tensorrt import Cuda, TensorRt


@pytest.fixture
def bundle(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle of one's own, and a home without engines; the training data lies where it was made."""
    monkeypatch.chdir(trained)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(trained / "models/digits", tmp_path / "models/mine")
    return read_bundle(tmp_path / "models/mine")


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> TensorRt:
    """A machine with a GPU and TensorRT, as it seems."""
    fake = TensorRt(Cuda())
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(cuda, "_runtime", lambda: fake.cuda)
    return fake
