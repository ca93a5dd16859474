"""The loss of a long run, in parts that can be read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from image_classifier.evaluation import plots
from tests.evaluation.test_plots import assert_legible, assert_png, curve, drawn

__all__ = ["drawn"]


@pytest.mark.parametrize("num_epochs", [40, 150, 2000])
@pytest.mark.parametrize("each", [1, 5])
def test_every_epoch_of_a_long_run_is_in_a_part(num_epochs: int, each: int, tmp_path: Path, drawn: list[Figure]) -> None:
    history = {"train/loss": curve(num_epochs, 2.3, 1e-5), "val/loss": curve(num_epochs, 2.3, 0.2)[each - 1 :: each]}
    history["train/loss"][7] = (7, float("nan"))
    (path,) = plots.plot_loss_in_parts(history, tmp_path)
    assert_png(path, drawn[0])
    assert_legible(drawn[0])
    ends = [axes.get_xlim() for axes in drawn[0].axes]
    assert ends[0][0] <= 0 and ends[-1][1] >= num_epochs - 1
    assert all(left[1] + 1 >= right[0] for left, right in pairwise(ends))
    assert drawn[0].axes[-1].get_ylim()[1] < drawn[0].axes[0].get_ylim()[1] / 2  # a scale of its own


def test_a_short_run_needs_none(tmp_path: Path) -> None:
    assert plots.plot_loss_in_parts({"train/loss": curve(39, 1, 0), "val/loss": curve(20, 1, 0)}, tmp_path) == []
    assert plots.plot_loss_in_parts({}, tmp_path) == []
