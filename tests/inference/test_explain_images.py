"""`infer --explain`: the heat lies over the picture where the network saw it, and each answer gets a figure."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from image_classifier.evaluation.plots.heat_map import explanation_name
from image_classifier.images import Preprocess
from image_classifier.predictions import PredictionTable
from tests.conftest import Command


@given(
    width=st.integers(16, 120),
    height=st.integers(16, 120),
    mode=st.sampled_from(["crop", "squash", "pad"]),
    fraction=st.sampled_from([1.0, 0.875]),
    scale=st.sampled_from([0.5, 1.0, 3.0]),
)
@hypothesis_settings(max_examples=40)
def test_what_was_found_in_the_square_comes_to_lie_where_it_was(
    width: int, height: int, mode: str, fraction: float, scale: float
) -> None:
    """A picture whose colours are its coordinates, through the square and back, still tells them."""
    ramps = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    picture = np.stack([*ramps, np.zeros((height, width))], axis=2).astype(np.uint8)
    preprocess = Preprocess(64, mode, crop_fraction=fraction)
    square, shape = preprocess(picture).astype(np.float32), (round(width * scale), round(height * scale))
    across, down = (preprocess.laid_back(square[..., channel], (width, height), shape) for channel in (0, 1))
    assert across.shape == shape[::-1] and across.dtype == np.float32
    seen = ~np.isnan(across)
    assert seen.all() or mode == "crop"
    expected = np.meshgrid(np.linspace(0, 255, shape[0]), np.linspace(0, 255, shape[1]))
    inside = (
        np.pad(seen, 1)[2:, 1:-1] & np.pad(seen, 1)[:-2, 1:-1] & np.pad(seen, 1)[1:-1, 2:] & np.pad(seen, 1)[1:-1, :-2]
    )
    for found, truth, side in ((across, expected[0], width), (down, expected[1], height)):
        assert np.abs(found - truth)[inside].max(initial=0) < 255 * 2.5 / min(side, 64) + 3
    if mode == "crop":
        assert seen.mean() == pytest.approx(
            min(width, height) ** 2 * fraction**2 / (width * height), abs=0.02 + 1 / shape[0] + 1 / shape[1]
        )


def test_equal_names_in_two_folders_are_two_files() -> None:
    assert explanation_name(Path("a/1.png")) != explanation_name(Path("b/1.png"))
    assert explanation_name(Path("a/1.png")) == explanation_name(Path("a/../a/1.png").absolute())
    assert len(explanation_name(Path("x" * 200 + ".png"))) < 100


@pytest.fixture(autouse=True)
def in_the_trained_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["digits", "runs/digits/checkpoints/best.ckpt"])
def test_each_answer_gets_a_figure_and_stays_the_same(
    command: Command, trained: Path, tmp_path: Path, source: str
) -> None:
    images = sorted((trained / "data/digits/test/3").iterdir())[:3]
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    line = ("infer", "--checkpoint_name", source, "--format", "jsonl", "--images", *map(str, images), str(bad))
    plain, drawn = command(*line), command(*line, "--explain", str(tmp_path / "heat maps"))
    assert (plain.code, drawn.code) == (2, 2) and plain.out == drawn.out  # the bad image's row says why
    assert "explanations of 3 images" in drawn.err
    files = sorted((tmp_path / "heat maps").iterdir())
    assert {path.name for path in files} == {explanation_name(path) for path in images}
    with Image.open(files[0]) as figure:
        assert figure.format == "PNG" and figure.width > figure.height > 300
        colours = np.asarray(figure.convert("RGB")).reshape(-1, 3).astype(int)
    assert (np.ptp(colours, axis=1) > 60).mean() > 0.02  # heat has colours; the digits and their frame have none


def test_figures_go_beside_the_others_of_the_model(command: Command, trained: Path, tmp_path: Path) -> None:
    image = next((trained / "data/digits/test/0").iterdir())
    answer = command(
        "infer", "--checkpoint_name", "digits", "--images", str(image), "--plots_dir", str(tmp_path), "--explain"
    )
    assert answer.code == 0, answer.err
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")] == [
        Path("digits/explain") / explanation_name(image)
    ]
    first = next(tmp_path.rglob("*.png")).read_bytes()
    command("infer", "--checkpoint_name", "digits", "--images", str(image), "--plots_dir", str(tmp_path), "--explain")
    assert next(tmp_path.rglob("*.png")).read_bytes() == first


@pytest.mark.slow
def test_the_report_shows_the_figures_of_images_however_their_paths_were_written(
    command: Command, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree("plots/digits/test", tmp_path / "digits/test")
    table = PredictionTable.read(tmp_path / "digits/test")
    files = [Path("data/digits") / table.paths[row] for row in table.surest_mistakes(3)]
    written = [str(files[0]), f"../{trained.name}/{files[1]}", str(files[2].resolve())]
    answer = command(
        "infer", "--checkpoint_name", "digits", "--images", *written, "--plots_dir", str(tmp_path), "--explain"
    )
    assert answer.code == 0, answer.err
    assert command("report", "digits", "--plots_dir", str(tmp_path)).code == 0
    assert (tmp_path / "digits/report.html").read_text().count('class="explanation"') == 3


def test_an_onnx_file_alone_cannot_be_explained(command: Command, trained: Path, tmp_path: Path) -> None:
    shutil.copy("models/digits/model.onnx", tmp_path / "alone.onnx")
    shutil.copytree("models/digits", tmp_path / "bundle")
    (tmp_path / "bundle/model.ckpt").unlink()
    for source, says in ((tmp_path / "alone.onnx", "has no gradients"), (tmp_path / "bundle", "no model.ckpt")):
        answer = command(
            "infer",
            "--checkpoint_name",
            str(source),
            "--images",
            "data/digits/test/0",
            "--explain",
            str(tmp_path / "out"),
        )
        assert answer.code == 2 and answer.out == "" and answer.err.count("\n") == 1
        assert says in answer.err and "--checkpoint_name" in answer.err
    assert not (tmp_path / "out").exists()


def test_a_number_is_no_folder(command: Command) -> None:
    answer = command("infer", "--checkpoint_name", "digits", "explain=3", "--images", "data/digits/test/0")
    assert answer.code == 2 and "explain must be" in answer.err
