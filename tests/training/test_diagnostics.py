"""What a training measures of its finished model for the report: as much as was asked for, and nothing else."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from image_classifier.dataset.settings import DataSettings
from image_classifier.errors import ConfigError
from image_classifier.inference.checkpoint import CheckpointBackend
from image_classifier.manifest import Manifest
from image_classifier.modeling.classifier import build_classifier
from image_classifier.predictions import PredictionTable
from image_classifier.training.diagnostics import DiagnosticsSettings, run_diagnostics
from tests.conftest import QUICK, Command, MakeTree, listed


@given(st.integers(0, 10**9))
def test_the_longer_a_training_the_more_images_tell_its_robustness(seen: int) -> None:
    most = DiagnosticsSettings().max_images(seen)
    assert 50 <= most <= 500 and most <= DiagnosticsSettings().max_images(seen + 10_000)
    assert most in (50, 500) or 19 * most == pytest.approx(seen / 10, rel=0.02)
    assert DiagnosticsSettings(robustness_images=7).max_images(seen) == 7


@pytest.mark.parametrize(
    "wrong",
    [{"explanations": -1}, {"robustness_images": -1}, {"robustness_images": True}, {"robustness_images": "all"}],
)
def test_wrong_numbers_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DiagnosticsSettings(**wrong)  # type: ignore[arg-type]


class Overwriting(nn.Module):
    """A backbone that overwrites what its gradient would need."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.sigmoid().mul_(2).mean(dim=(2, 3))


def test_a_network_without_gradients_is_delivered_all_the_same(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part: Manifest = listed(tree)
    classifier = build_classifier(Overwriting(), 2, 12, [0.5] * 3, [0.25] * 3).eval()
    table = PredictionTable(
        part.paths, np.zeros(len(part), np.int64), np.tile(np.float32([[0, 1]]), (len(part), 1)), part.classes
    )
    run, data = SimpleNamespace(plots=tmp_path / "plots", name="run"), DataSettings(image_size=12)
    with caplog.at_level(logging.WARNING):
        run_diagnostics(
            classifier,
            lambda: CheckpointBackend(classifier),
            table,
            part,
            run,
            data,
            DiagnosticsSettings(explanations=2, robustness_images=4),
            0,
        )  # type: ignore[arg-type]
    assert "no explanations" in caplog.text
    assert json.loads((tmp_path / "plots/robustness.json").read_text())["about"]["images"] == 4


def test_an_image_that_is_gone_ends_no_training(tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    part: Manifest = listed(tree)
    classifier = build_classifier(Overwriting(), 2, 12, [0.5] * 3, [0.25] * 3).eval()
    table = PredictionTable(
        part.paths, np.zeros(len(part), np.int64), np.tile(np.float32([[0, 1]]), (len(part), 1)), part.classes
    )
    for record in part:
        part.file(record).unlink()
    run, data = SimpleNamespace(plots=tmp_path / "plots", name="run"), DataSettings(image_size=12)
    backend, settings = CheckpointBackend(classifier), DiagnosticsSettings()
    run_diagnostics(classifier, lambda: backend, table, part, run, data, settings, 0)  # type: ignore[arg-type]
    assert (
        "no explanations: cannot read the image" in caplog.text
        and "no robustness: cannot read the image" in caplog.text
    )


@pytest.mark.slow
def test_the_report_of_a_training_holds_them_or_not(
    command: Command, make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_tree(cat=12, dog=12)
    line = (
        "train",
        "data=folder",
        "data.dir=tree",
        "data.image_size=16",
        "data.batch_size=4",
        "model.backbone.channels=[4,8]",
        "trainer.max_epochs=1",
    )
    damaged = Path("data/audit/other/audit.json")
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    os.utime(damaged, (4e9, 4e9))  # the newest is read first
    answer = command(*line, "name=bare", *QUICK)
    assert answer.code == 0 and f"skipped: cannot read '{damaged}'" in answer.err, answer.err
    bare = {path.relative_to("plots/bare").as_posix() for path in Path("plots/bare").rglob("*") if path.is_file()}
    assert bare == {
        "metrics.json",
        *(
            f"val/{name}"
            for name in ("predictions.csv", "predictions.json", "logits.npy", "metrics.json", "calibration.json")
        ),
    }
    page = Path("models/bare/report.html").read_text()
    assert all(word in page for word in ("no robustness.json", "no latency.json", "--explain"))

    for name in ("robustness", "latency"):
        Path(f"plots/bare/{name}.json").write_text('{"blur": 0.3, "backends": 3}')
    answer = command(*line, "name=bare", "overwrite=true", *QUICK)
    assert answer.code == 0 and Path("models/bare/report.html").is_file(), answer.err
    assert not any(Path(f"plots/bare/{name}.json").exists() for name in ("robustness", "latency"))  # another model's

    answer = command(*line, "name=whole", *QUICK[:2], "diagnostics.explanations=2", "diagnostics.robustness_images=5")
    assert answer.code == 0, answer.err
    robustness, latency = (
        json.loads(Path(f"plots/whole/{name}.json").read_text()) for name in ("robustness", "latency")
    )
    assert robustness["about"]["images"] == min(5, robustness["about"]["of"]) and set(latency["backends"]) == {
        "onnx",
        "checkpoint",
    }
    page = Path("models/whole/report.html").read_text()
    assert not any(word in page for word in ("no robustness.json", "no latency.json", "--explain"))
    wrong = command(*line, "name=wrong", "diagnostics.robustness_images=some")
    assert wrong.code == 2 and "robustness_images" in wrong.err and not Path("runs/wrong").exists()
