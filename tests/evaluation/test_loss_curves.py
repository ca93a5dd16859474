"""The loss of a long run, in parts that can be read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from image_classifier.evaluation.plots.learning_curves import plot_curves_in_parts, plot_loss_in_parts
from tests.evaluation.test_plots import assert_legible, assert_png, curve, drawn

__all__ = ["drawn"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_epochs", [40, pytest.param(150, marks=pytest.mark.slow), pytest.param(2000, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("each", [1, 5])
def test_every_epoch_of_a_long_run_is_in_a_part(
    num_epochs: int, each: int, tmp_path: Path, drawn: list[Figure]
) -> None:
    history = {"train/loss": curve(num_epochs, 2.3, 1e-5), "val/loss": curve(num_epochs, 2.3, 0.2)[each - 1 :: each]}
    history["train/loss"][7] = (7, float("nan"))
    (path,) = plot_loss_in_parts(history, tmp_path)
    assert_png(path, drawn[0])
    assert_legible(drawn[0])
    ends = [axes.get_xlim() for axes in drawn[0].axes]
    assert ends[0][0] <= 0 and ends[-1][1] >= num_epochs - 1
    assert all(left[1] + 1 >= right[0] for left, right in pairwise(ends))
    assert drawn[0].axes[-1].get_ylim()[1] < drawn[0].axes[0].get_ylim()[1] / 2  # a scale of its own


def test_a_short_run_needs_none(tmp_path: Path) -> None:
    assert plot_loss_in_parts({"train/loss": curve(39, 1, 0), "val/loss": curve(20, 1, 0)}, tmp_path) == []
    assert plot_loss_in_parts({}, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        1,
        3,
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(5, marks=pytest.mark.slow),
        pytest.param(12, marks=pytest.mark.slow),
    ],
)
def test_curves_are_split_into_as_many_parts_as_asked(parts: int, tmp_path: Path, drawn: list[Figure]) -> None:
    history = {
        "train/loss": curve(30, 2, 0.5),
        "val/loss": curve(30, 2, 0.6),
        "val/accuracy": curve(30, 0.1, 0.9),
        "val/f1_macro": curve(1, 0, 0),
    }
    written = plot_curves_in_parts(history, tmp_path, parts)
    assert [path.name for path in written] == ["loss_parts.png", "accuracy_parts.png"]
    for figure in drawn:
        assert len(figure.axes) == parts
        assert_legible(figure)


def test_there_are_never_more_parts_than_steps(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_curves_in_parts({"val/loss": curve(4, 2, 1)}, tmp_path, 12)
    assert len(drawn[0].axes) == 3
