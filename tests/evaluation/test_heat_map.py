"""The figure of an explanation: colour where there is heat, none elsewhere."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_classifier.evaluation.plots.heat_map import overlay, plot_explanation

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def test_without_heat_there_is_no_colour() -> None:
    laid = overlay(PICTURE, np.zeros((40, 60), np.float32))
    assert laid.dtype == np.uint8 and laid.shape == PICTURE.shape
    assert np.ptp(laid, axis=2).max() == 0


def test_more_heat_is_lighter_and_what_was_not_seen_is_pale() -> None:
    grey = np.full((1, 3, 3), 100, np.uint8)
    cold, hot, unseen = overlay(grey, np.array([[0.1, 1.0, np.nan]], np.float32))[0].astype(int)
    assert hot.sum() > cold.sum() + 200
    assert unseen.min() > 190 and np.ptp(unseen) == 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (200, 4), (4, 200), (1, 1)])
@pytest.mark.parametrize("cut", [False, True])
def test_a_figure_of_any_shape_is_drawn(tmp_path: Path, shape: tuple[int, int], cut: bool) -> None:
    heat = np.linspace(0, 1, shape[0] * shape[1], dtype=np.float32).reshape(shape)
    if cut:
        heat[: shape[0] // 3] = np.nan
    picture = np.full((*shape, 3), 90, np.uint8)
    path = plot_explanation(
        picture,
        heat,
        "a class of a very long name, 日本語, $x_1$ 99.9%",
        "Grad-CAM",
        tmp_path / "heat.png",
        "title " * 30,
    )
    with Image.open(path) as figure:
        assert 300 < figure.width < 1300 and 150 < figure.height < 700
