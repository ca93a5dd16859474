"""Every picture is a PNG whose texts neither overlap nor leave the figure, at 2 to 1 000 classes and with odd names."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from image_classifier.errors import DataError, StorageError
from image_classifier.evaluation.metrics.compute import ClassScore
from image_classifier.evaluation.plots import figure, learning_curves
from image_classifier.evaluation.plots.class_scores import plot_class_scores
from image_classifier.evaluation.plots.confusion_matrix import plot_confusion_matrix
from image_classifier.evaluation.plots.learning_curves import plot_learning_curves, plot_learning_rate_finder
from image_classifier.evaluation.plots.samples import plot_samples

NUM_CLASSES = [
    2,
    10,
    pytest.param(60, marks=pytest.mark.slow),
    pytest.param(200, marks=pytest.mark.slow),
    pytest.param(1000, marks=pytest.mark.slow),
]
ODD = (
    "$x_1$",
    "a$b",
    "dog 🐶",
    "Гомер_Симпсон",
    "猫",
    "\udcff",
    "line\nbreak",
    "",
    r"\frac{1}{0}",
    "W" * 300,
    "i" * 5000,
    "\u202eevil",
    "^_{}",
)
NAMES = (
    "abraham_grampa_simpson",
    "n02085936-Maltese_dog_with_a_very_long_name",
    "cat",
    "Чёрный_терьер_длинное_имя_породы",
)


def names(num_classes: int) -> list[str]:
    return [f"{NAMES[i % len(NAMES)]}_{i:03d}" for i in range(num_classes)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were written, in order."""
    figures: list[Figure] = []

    class Spy(FigureCanvasAgg):
        def __init__(self, figure: Figure) -> None:
            super().__init__(figure)
            figures.append(figure)

    monkeypatch.setattr(figure, "FigureCanvasAgg", Spy)
    return figures


def assert_legible(figure: Figure) -> None:
    """No two texts share a pixel and none leaves the figure."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    hidden = {id(tick.label2) for axis in figure.findobj(Axis) for tick in axis.get_major_ticks()}  # the unused side
    outside = set()
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        outside |= {
            id(tick.label1) for tick in axis.get_major_ticks() if not low - 1e-9 <= tick.get_loc() <= high + 1e-9
        }
    texts = [
        t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in hidden | outside
    ]
    boxes = np.array([text.get_window_extent(renderer).extents for text in texts])  # [T, (x0, y0, x1, y1)]
    width, height = canvas.get_width_height()
    off = (boxes[:, :2] < 0).any(axis=1) | (boxes[:, 2] > width) | (boxes[:, 3] > height)
    assert not off.any(), f"outside the figure: {[texts[i].get_text() for i in np.flatnonzero(off)]}"
    low, high = boxes[:, :2], boxes[:, 2:]
    apart = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    clash = np.argwhere(np.triu((apart > 0.5).all(axis=2), k=1))
    assert not len(clash), f"overlapping: {[(texts[i].get_text(), texts[j].get_text()) for i, j in clash[:5]]}"


def assert_png(path: Path, figure: Figure) -> None:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert round(image.info["dpi"][0]) == 150
        assert all(200 <= side <= 3300 for side in image.size)
        assert image.size == figure.canvas.get_width_height()


def make_confusion(num_classes: int, scale: int = 1) -> np.ndarray:
    rng = np.random.default_rng(num_classes)
    confusion = rng.poisson(0.4, (num_classes, num_classes)) + np.diag(rng.integers(0, 60, num_classes))
    confusion[num_classes // 2] = 0
    return confusion.astype(np.int64) * scale


@pytest.mark.parametrize("num_classes", NUM_CLASSES)
def test_confusion_matrix_is_legible(num_classes: int, tmp_path: Path, drawn: list[Figure]) -> None:
    path = plot_confusion_matrix(
        make_confusion(num_classes), names(num_classes), tmp_path / "new" / "confusion.png", "run · test " * 30
    )
    assert path == tmp_path / "new" / "confusion.png"
    assert_png(path, drawn[0])
    assert_legible(drawn[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_classes", "scale"), [(2, 10_000_000), pytest.param(10, 1_000_000, marks=pytest.mark.slow), (34, 1000)]
)
def test_confusion_matrix_with_large_counts_is_legible(
    num_classes: int, scale: int, tmp_path: Path, drawn: list[Figure]
) -> None:
    plot_confusion_matrix(make_confusion(num_classes, scale), names(num_classes), tmp_path / "confusion.png")
    assert_legible(drawn[0])


@pytest.mark.slow
def test_confusion_matrix_lists_the_most_frequent_confusions(tmp_path: Path, drawn: list[Figure]) -> None:
    confusion = np.eye(60, dtype=np.int64) * 9
    confusion[3, 7], confusion[5, 1] = 4, 6
    plot_confusion_matrix(confusion, [f"c{i}" for i in range(60)], tmp_path / "confusion.png")
    texts = [text.get_text() for text in drawn[0].findobj(Text)]
    assert [text for text in texts if " → " in text][1:] == ["c5 → c1", "c3 → c7"]
    assert {"6 of 15", "4 of 13"} <= set(texts)


@pytest.mark.slow
def test_confusion_matrix_without_errors_says_so(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_confusion_matrix(np.eye(40, dtype=np.int64), names(40), tmp_path / "confusion.png")
    assert any("none: every prediction is right" in text.get_text() for text in drawn[0].findobj(Text))


@pytest.mark.parametrize("num_classes", NUM_CLASSES)
def test_class_scores_are_legible(num_classes: int, tmp_path: Path, drawn: list[Figure]) -> None:
    scores = [ClassScore(name, 0.5, 0.5, i / num_classes, i * 40_000) for i, name in enumerate(names(num_classes))]
    path = plot_class_scores(scores, tmp_path / "scores.png", "resnet18 · test")
    assert_png(path, drawn[0])
    assert_legible(drawn[0])


def test_class_scores_say_what_they_leave_out(tmp_path: Path, drawn: list[Figure]) -> None:
    scores = [ClassScore(f"c{i:03d}", 0.5, 0.5, i / 200, 5 if i else 0) for i in range(200)]
    plot_class_scores(scores, tmp_path / "scores.png")
    texts = [text.get_text() for text in drawn[0].findobj(Text)]
    assert "worst 30 and best 10 of 200 classes; 1 without images" in texts
    shown = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert shown[:30] + shown[31:] == [f"c{i:03d}" for i in (*range(1, 31), *range(190, 200))]


@pytest.mark.parametrize(("num_images", "size"), [(1, (8, 8)), (4, (28, 28)), (7, (64, 200)), (40, (400, 300))])
def test_samples_are_legible(num_images: int, size: tuple[int, int], tmp_path: Path, drawn: list[Figure]) -> None:
    images = [np.full((*size, 3), 5 * i, dtype=np.uint8) for i in range(num_images)]
    truths = (names(60) * 2)[:num_images]
    predictions = [truths[0], *truths[:-1]]
    path = plot_samples(images, truths, predictions, [1.0] * num_images, tmp_path / "samples.png", "resnet18 · test")
    assert_png(path, drawn[0])
    assert_legible(drawn[0])
    assert len(drawn[0].axes[0].images) == min(num_images, 24)


def test_samples_mark_right_and_wrong_without_colour_alone(tmp_path: Path, drawn: list[Figure]) -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    plot_samples([image, image], ["cat", "dog"], ["cat", "cat"], [0.9, 0.51], tmp_path / "samples.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["✓ cat 90%", "✗ cat 51%\ntrue: dog"]


def test_tiny_images_are_enlarged_crisply(tmp_path: Path) -> None:
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    image[0, 0], image[1, 1] = (10, 200, 30), (10, 200, 30)
    path = plot_samples([image], ["a"], ["a"], [1.0], tmp_path / "samples.png")
    inner = np.asarray(Image.open(path).convert("RGB"))[130:300, 60:280]
    assert {tuple(pixel) for pixel in inner.reshape(-1, 3).tolist()} == {(0, 0, 0), (10, 200, 30)}


def test_no_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image to draw"):
        plot_samples([], [], [], [], tmp_path / "samples.png")


@pytest.mark.slow
def test_odd_names_neither_crash_nor_warn_nor_overlap(tmp_path: Path, drawn: list[Figure]) -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    count = len(ODD)
    plot_confusion_matrix(make_confusion(count), ODD, tmp_path / "confusion.png", ODD[0] + ODD[2])
    plot_confusion_matrix(make_confusion(count * 3), ODD * 3, tmp_path / "many.png")
    plot_class_scores([ClassScore(name, 0, 0, 0, 0) for name in ODD], tmp_path / "scores.png", ODD[5])
    plot_samples([image] * count, ODD, ODD[::-1], [0.5] * count, tmp_path / "samples.png", ODD[9])
    for page in drawn:
        assert_legible(page)
    texts = {text.get_text() for text in drawn[2].findobj(Text)}
    assert {"$x_1$", "dog □", "Гомер_Симпсон", "line break", "□", "□evil"} <= texts


def curve(num_epochs: int, start: float, end: float) -> list[tuple[float, float]]:
    return [(epoch, end + (start - end) * float(np.exp(-epoch / 10))) for epoch in range(num_epochs)]


@pytest.mark.slow
@pytest.mark.parametrize("num_epochs", [1, 2, 30, 2000])
def test_learning_curves_are_legible(num_epochs: int, tmp_path: Path, drawn: list[Figure]) -> None:
    history = {
        "train/loss": curve(num_epochs, 2.3, 1e-5),
        "val/loss": curve(num_epochs, 2.3, 0.2),
        "learning_rate": curve(num_epochs, 1, 0),
    }
    history |= {
        "train/accuracy": curve(num_epochs, 0.1, 1),
        "val/accuracy": curve(num_epochs, 0.1, 0.98),
        "val/f1_macro": curve(num_epochs, 0, 1),
    }
    history["val/loss"][num_epochs // 2] = (num_epochs // 2, 1e-4)
    history["train/loss"].append((num_epochs, float("nan")))
    written = plot_learning_curves(history, tmp_path / "run")
    assert [path.name for path in written] == ["loss.png", "accuracy.png", "f1.png"]
    for path, page in zip(written, drawn, strict=True):
        assert_png(path, page)
        assert_legible(page)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_learning_curves_mark_the_best_epoch_of_val(tmp_path: Path, drawn: list[Figure]) -> None:
    history = {
        "train/loss": [(0, 1.0), (1, 0.1)],
        "val/loss": [(2, 0.7), (0, 1.5), (1, 0.5)],
        "train/f1_macro": [(0, 0.5), (1, 0.75)],
    }
    assert [path.name for path in plot_learning_curves(history, tmp_path)] == ["loss.png", "f1.png"]
    assert legend(drawn[0]) == ["train", "val", "best val 0.5000 (epoch 1)"]
    assert legend(drawn[1]) == ["train", "best train 0.7500 (epoch 1)"]
    assert all(left[0] < right[0] for line in drawn[0].axes[0].lines[:2] for left, right in pairwise(line.get_xydata()))


def test_learning_curves_say_what_is_not_a_number(tmp_path: Path, drawn: list[Figure]) -> None:
    nan, inf = float("nan"), float("inf")
    history = {
        "train/loss": [(0, nan), (1, inf), (2, 0.3), (3, nan)],
        "val/loss": [(0, nan), (1, nan)],
        "val/accuracy": [(0, nan)],
    }
    assert [path.name for path in plot_learning_curves(history, tmp_path)] == ["loss.png"]
    assert legend(drawn[0]) == ["train", "best train 0.3000 (epoch 2)", "3 not a number"]
    assert_legible(drawn[0])


def test_no_history_writes_nothing(tmp_path: Path) -> None:
    assert plot_learning_curves({"learning_rate": [(0, 0.1)], "val/loss": []}, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise StorageError(f"no space left while writing {str(path)!r}")

    monkeypatch.setattr(figure, "write_bytes", refuse)
    with pytest.raises(StorageError):
        plot_class_scores([ClassScore("a", 1, 1, 1, 3)], tmp_path / "scores.png")


def test_rates_on_the_axis_are_plain_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(learning_curves, "save_figure", lambda figure, path: figures.append(figure))
    losses = np.linspace(2.0, 1.0, 50)
    plot_learning_rate_finder(np.geomspace(1e-6, 10, 50), losses, losses, 1e-3, tmp_path / "finder.png")
    figures[0].canvas.draw()
    labels = [label.get_text() for label in figures[0].axes[0].get_xticklabels()]
    assert {"1e-06", "0.001", "0.1"} <= set(labels) and not any("$" in label for label in labels)


@pytest.mark.slow
def test_the_svg_beside_it_is_the_same_each_time_and_holds_no_code_font_or_date(tmp_path: Path) -> None:
    for name in ("one", "two"):
        plot_confusion_matrix(
            make_confusion(3), ["<script>alert(1)</script>", "--><b>", "]]>&"], tmp_path / name / "x.png", "<title>"
        )
    svg, again = ((tmp_path / name / "x.svg").read_bytes() for name in ("one", "two"))
    assert svg == again
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
    assert "path" in tags and not tags & {"script", "text", "foreignObject", "a", "date"}
