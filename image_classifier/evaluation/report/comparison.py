"""The comparison of two classifiers in words: lines for a terminal, and one page with the images that changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from image_classifier.evaluation.compare import LOWER_IS_BETTER, Comparison, Paired
from image_classifier.html import document, thumbnails
from image_classifier.html.text import plain
from image_classifier.html.thumbnails import NO_PICTURE, Thumbnail, thumbnail
from image_classifier.images import DecodeLimits
from image_classifier.text import counted, printable

_HERE = Path(__file__).parent
_SHOWN = 60  # images of one direction
_MARKUP = 400  # characters of HTML around one image
_WORDS = {"accuracy": "accuracy", "f1_macro": "F1 (macro)", "log_loss": "log loss"}
_WIDTH, _ROW = 360, 34  # of the drawing of intervals, in its own units


@dataclass(frozen=True)
class Change:
    """An image that one of the two gets right and the other wrong."""

    path: str
    truth: str
    answers: tuple[str, str]
    confidences: tuple[float, float]
    thumbnail: Thumbnail


@dataclass(frozen=True)
class Direction:
    """The images that changed one way: `kind` names the section, `shown` of `whole` are on the page."""

    kind: str
    title: str
    whole: int
    shown: Sequence[Change]


def verdict(comparison: Comparison, names: tuple[str, str]) -> str:
    """Is the second really better? One or two sentences."""
    accuracy, (first, second) = comparison.paired["accuracy"], (printable(name) for name in names)
    points, (low, high) = 100 * accuracy.difference, (100 * bound for bound in accuracy.interval)
    bounds = f"95 % interval {low:+.2f} to {high:+.2f}, McNemar p = {probability(comparison.p_value)}"
    if comparison.better:
        better, worse = (second, first) if comparison.better > 0 else (first, second)
        opening = "Yes" if comparison.better > 0 else "No, the other way round"
        return f"{opening}: {better} is better than {worse} by {abs(points):.2f} points of accuracy ({bounds}).{_against(comparison, better)}"
    if not sum(comparison.only_right):
        return f"No difference: {first} and {second} are right on the very same images."
    return (
        f"Not shown: {second} differs from {first} by {points:+.2f} points of accuracy, which may be chance ({bounds})."
    )


def _against(comparison: Comparison, better: str) -> str:
    """A sentence where the probabilities of the better one are worse."""
    loss = comparison.paired["log_loss"]
    worse = loss.interval[0] > 0 if comparison.better > 0 else loss.interval[1] < 0
    return (
        f" But the probabilities of {better} are worse: log loss {max(loss.values):.3f} against {min(loss.values):.3f}."
        if worse
        else ""
    )


def lines(comparison: Comparison, names: tuple[str, str]) -> Iterator[str]:
    """The comparison for a terminal."""
    shared, (first, second) = comparison.shared, names
    yield f"A          {printable(first)}"
    yield f"B          {printable(second)}"
    yield f"images     {counted(len(shared.targets), 'image')} judged by both{_left(shared.left)}"
    yield "metric             A         B     B - A  95 % interval of B - A"
    for paired in comparison.paired.values():
        low, high = paired.interval
        values = (
            f"{paired.values[0]:8.4f}  {paired.values[1]:8.4f}  {paired.difference:+8.4f}  {low:+.4f} to {high:+.4f}"
        )
        yield f"{paired.metric:<10}  {values}{'  (lower is better)' if paired.metric in LOWER_IS_BETTER else ''}"
    only = comparison.only_right
    yield f"McNemar    only A right {only[0]}, only B right {only[1]}, p = {probability(comparison.p_value)}"
    yield f"answer     {verdict(comparison, names)}"


def _left(left: tuple[int, int]) -> str:
    return f"; not shared: {left[0]} of A, {left[1]} of B" if any(left) else ""


def probability(value: float) -> str:
    """A p-value as a person reads it."""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def page(
    comparison: Comparison,
    names: tuple[str, str],
    split: str,
    root: Path | None,
    limits: DecodeLimits,
    facts: Sequence[tuple[str, str]],
) -> str:
    """The page as one HTML text below 10 MB; `facts` are the lines of its footer, `root` is where the images' paths start,
    `limits` what these may ask for.
    """
    directions = list(_directions(comparison, names, root, limits))
    return document.render(
        _HERE / "versus.html.j2",
        _HERE / "report.css",
        Path(document.__file__).parent / "filter.js",
        names=[plain(name) for name in names],
        split=split,
        comparison=comparison,
        verdict=verdict(comparison, names),
        p_value=probability(comparison.p_value),
        left=_left(comparison.shared.left).removeprefix("; "),
        rows=[_row(paired, comparison) for paired in comparison.paired.values()],
        directions=directions,
        pictures=any(change.thumbnail.address for direction in directions for change in direction.shown),
        facts=facts,
    )


def _row(paired: Paired, comparison: Comparison) -> dict[str, object]:
    """A metric's row of the table, with its interval on a scale that all of its kind share, zero in the middle."""
    alike = [
        other
        for other in comparison.paired.values()
        if (other.metric in LOWER_IS_BETTER) == (paired.metric in LOWER_IS_BETTER)
    ]
    reach = max(abs(bound) for other in alike for bound in (*other.interval, other.difference)) * 1.1 or 1.0
    places = [_WIDTH / 2 * (1 + value / reach) for value in (*paired.interval, paired.difference)]
    side = "" if paired.interval[0] <= 0 <= paired.interval[1] else "better" if paired.gain > 0 else "worse"
    return {
        "title": _WORDS[paired.metric],
        "lower": paired.metric in LOWER_IS_BETTER,
        "paired": paired,
        "side": side,
        "low": round(places[0], 1),
        "high": round(places[1], 1),
        "place": round(places[2], 1),
        "reach": f"{reach:.2g}",
    }


def _directions(
    comparison: Comparison, names: tuple[str, str], root: Path | None, limits: DecodeLimits
) -> Iterator[Direction]:
    right, titles = comparison.shared.right, [plain(name) for name in names]
    room = thumbnails.BUDGET // 2
    for kind, won, lost in (("gained", 1, 0), ("lost", 0, 1)):
        rows = np.flatnonzero(right[won] & ~right[lost])
        order = rows[np.argsort(-comparison.shared.confidences[lost, rows], kind="stable")]
        title = f"{'Gained' if kind == 'gained' else 'Lost'}: only {titles[won]} is right"
        yield Direction(kind, title, len(rows), _changes(comparison, order[:_SHOWN].tolist(), root, limits, room))


def _changes(
    comparison: Comparison, rows: Sequence[int], root: Path | None, limits: DecodeLimits, room: int
) -> list[Change]:
    """The changed images with their thumbnails, as many of these as there is room for (characters)."""
    shared, found = comparison.shared, []
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda row: thumbnail(root / shared.paths[row], limits) if root else NO_PICTURE, rows))
    for row, picture in zip(rows, drawn, strict=True):
        room -= len(picture.address) + len(shared.paths[row]) + _MARKUP
        first, second = (plain(shared.classes[code]) for code in shared.predicted[:, row])
        confidences = float(shared.confidences[0, row]), float(shared.confidences[1, row])
        truth = plain(shared.classes[shared.targets[row]])
        found.append(
            Change(plain(shared.paths[row]), truth, (first, second), confidences, picture if room > 0 else NO_PICTURE)
        )
    return found
