"""Corruptions get worse step by step, and the figures depend on nothing but the images and the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from image_classifier.errors import UnreadableImage
from image_classifier.images import Preprocess
from image_classifier.inference.corruptions import CORRUPTIONS, SEVERITIES
from image_classifier.inference.predictor import Predictor
from image_classifier.inference.robustness import measure_robustness, stratified
from tests.conftest import Command

SIZE = 32


def picture(seed: int) -> np.ndarray:
    """A smooth picture with edges, uint8 [32, 32, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 216, (5, 5, 3), dtype=np.uint8)).resize(
        (SIZE, SIZE), Image.Resampling.BICUBIC
    )
    pixels = np.array(coarse)
    pixels[8:14, 10:24] = rng.integers(0, 256, 3)
    return pixels


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_step_is_further_from_the_picture(name: str) -> None:
    distances = np.zeros(len(SEVERITIES))
    for seed in range(20):
        pixels = picture(seed)
        before = pixels.copy()
        for place, severity in enumerate(SEVERITIES):
            step = CORRUPTIONS[name](pixels, severity, np.random.default_rng(seed))
            assert step.dtype == np.uint8 and step.shape == pixels.shape
            assert np.array_equal(step, CORRUPTIONS[name](pixels, severity, np.random.default_rng(seed)))
            distances[place] += np.abs(step.astype(int) - pixels).mean() / 20
        assert np.array_equal(pixels, before)
    assert distances.tolist() == sorted(distances) and distances[0] > 0.1 and distances[-1] > 2


class Redness:
    """Class 1 where red outweighs blue."""

    calls = 0

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        self.calls += 1
        difference = (pixels[:, 0].astype(np.float32) - pixels[:, 2]).mean(axis=(1, 2))
        return np.stack([-difference, difference], axis=1)


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[list[Path], np.ndarray]:
    paths = []
    for number in range(30):
        paths.append(tmp_path / f"{number}.png")
        shade = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        shade[..., 0 if number % 3 else 2] |= 128
        Image.fromarray(shade).save(paths[-1])
    return paths, np.array([min(1, number % 3) for number in range(30)])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_model_of_colours_stands_what_keeps_them(pictures: tuple[list[Path], np.ndarray], batch_size: int) -> None:
    found = measure_robustness(
        Predictor(Redness(), ("blue", "red"), Preprocess(16), batch_size=batch_size), *pictures, limit=500
    )
    assert (found.images, found.of) == (30, 30) and found.clean == 1.0
    assert {name: list(row) for name, row in found.accuracy.items()} == {
        name: ["0", "1", "2", "3"] for name in CORRUPTIONS
    }
    for name in ("blur", "contrast", "rotation"):
        assert set(found.accuracy[name].values()) == {1.0}, name
    assert found == measure_robustness(
        Predictor(Redness(), ("blue", "red"), Preprocess(16), batch_size=4), *pictures, limit=500
    )


def test_the_files_say_what_they_rest_on(pictures: tuple[list[Path], np.ndarray], tmp_path: Path) -> None:
    found = measure_robustness(Predictor(Redness(), ("blue", "red"), Preprocess(16)), *pictures, limit=12)
    found.write(tmp_path / "out", "Robustness of a test")
    written = json.loads((tmp_path / "out/robustness.json").read_text())
    assert written.pop("about") == {"part": "", "images": 12, "of": 30, "seed": 0}
    assert written == found.accuracy
    with Image.open(tmp_path / "out/robustness.png") as figure:
        assert figure.width > 1000
    assert "12 of the 30 images" in list(found.lines("test"))[-1]


def test_an_unreadable_image_ends_it(pictures: tuple[list[Path], np.ndarray]) -> None:
    pictures[0][4].write_bytes(b"")
    with pytest.raises(UnreadableImage):
        measure_robustness(Predictor(Redness(), ("blue", "red"), Preprocess(16)), *pictures, limit=500)


@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=6), most=st.integers(1, 120))
def test_every_class_keeps_its_share(counts: list[int], most: int) -> None:
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    rows = stratified(targets, most)
    assert len(rows) == min(most, len(targets)) == len(set(rows.tolist()))
    assert rows.tolist() == sorted(rows.tolist()) == stratified(targets, most).tolist()
    taken = np.bincount(targets[rows], minlength=len(counts))
    assert np.abs(taken - np.array(counts) * len(rows) / len(targets)).max() <= 2


def report_of(command: Command, plots: Path, *line: str, page: str) -> str:
    answer = command("report", "digits", "--plots_dir", str(plots), *line)
    assert answer.code == 0, answer.err
    return (plots / page).read_text()


@pytest.mark.slow
def test_the_verb_writes_it_beside_the_figures(
    command: Command, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    line = ("test", "--checkpoint_name", "digits", "--plots_dir", str(tmp_path), "--format", "json")
    answer = command(*line, "--robustness", "--robustness_images", "60")
    assert answer.code == 0, answer.err
    said, written = json.loads(answer.out), json.loads((tmp_path / "digits/robustness.json").read_text())
    assert said["robustness"] == written and written["about"]["images"] == 60
    assert (tmp_path / "digits/robustness.png").is_file()
    assert written["about"]["part"] == "test"
    assert command(*line, "--split", "val", "--robustness", "--robustness_images", "20").code == 0
    assert json.loads((tmp_path / "digits/robustness.json").read_text())["about"]["part"] == "val"
    assert "of val after blurring, darkening, turning or compressing them" in report_of(
        command, tmp_path, "--split", "val", page="digits/val/report.html"
    )
    plain = command(*line)
    assert plain.code == 0 and not {"robustness", "latency"} & set(json.loads(plain.out))
    assert command(*line, "--robustness_images", "0").code == 2
