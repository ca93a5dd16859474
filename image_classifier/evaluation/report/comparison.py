"""The comparison of two classifiers: lines for a terminal, and one page with the images on which they differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from image_classifier.evaluation.compare import LOWER_IS_BETTER, Comparison, PairedMetric
from image_classifier.html import document, thumbnails
from image_classifier.html.text import plain
from image_classifier.html.thumbnails import NO_PICTURE, Thumbnail, thumbnail
from image_classifier.images import DecodeLimits
from image_classifier.text import counted, printable

_HERE = Path(__file__).parent
_MAX_SHOWN = 60  # images of one direction
_MARKUP = 400  # characters of HTML around one image
_TITLES = {"accuracy": "accuracy", "f1_macro": "F1 (macro)", "log_loss": "log loss"}
_WIDTH = 360  # of the drawing of an interval, in its own units


@dataclass(frozen=True)
class Cost:
    """What an answer costs: size of the model's file in MB, median ms for one image, the backend, and the processor."""

    megabytes: float
    p50_ms: float
    backend: str
    processor: str


Costs = tuple[Cost, Cost]  # of A and B, on the same backend and processor


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
    """The images that changed one way: `kind` names the section, `shown` of `total` images are on the page."""

    kind: str
    title: str
    total: int
    shown: Sequence[Change]


def verdict(comparison: Comparison, names: tuple[str, str]) -> str:
    """Return whether the second is really better, in one or two sentences."""
    accuracy = comparison.paired["accuracy"]
    first, second = (printable(name) for name in names)
    points = 100 * accuracy.difference
    low, high = (100 * bound for bound in accuracy.interval)
    bounds = f"95 % interval {low:+.2f} to {high:+.2f}, McNemar p = {probability(comparison.p_value)}"
    if comparison.better:
        better, worse = (second, first) if comparison.better > 0 else (first, second)
        opening = "Yes" if comparison.better > 0 else "No, the other way round"
        gain = f"by {abs(points):.2f} points of accuracy ({bounds})"
        return f"{opening}: {better} is better than {worse} {gain}.{_worse_probabilities(comparison, better)}"
    if not sum(comparison.only_right):
        return f"No difference: {first} and {second} are right on exactly the same images."
    images = counted(len(comparison.shared.targets), "image")
    side = f"{abs(points):.2f} points {'higher' if points > 0 else 'lower'}" if points else "as accurate"
    than = f"{'than' if points else 'as'} {first}"
    return f"No clear winner: {second} is {side} {than} on {images}, which can be luck ({bounds})."


def _worse_probabilities(comparison: Comparison, better: str) -> str:
    """Return a sentence if the probabilities of the better one are worse."""
    loss = comparison.paired["log_loss"]
    worse = loss.interval[0] > 0 if comparison.better > 0 else loss.interval[1] < 0
    if not worse:
        return ""
    return (
        f" But the probabilities of {better} are worse: log loss {max(loss.values):.3f} against {min(loss.values):.3f}."
    )


def tradeoff(comparison: Comparison, names: tuple[str, str], costs: Costs) -> str:
    """Return how much faster and how much better the second is than the first, in one sentence."""
    accuracy = comparison.paired["accuracy"]
    ratio, points = costs[0].p50_ms / costs[1].p50_ms, 100 * accuracy.difference
    speed = f"{max(ratio, 1 / ratio):.1f} times {'faster' if ratio >= 1 else 'slower'}"
    quality = f"{abs(points):.1f} points {'better' if points > 0 else 'worse'}" if points else "as accurate"
    low, high = (100 * bound for bound in accuracy.interval)
    first, second = (printable(name) for name in names)
    return f"Compared with {first}, {second} is {speed} and {quality} (95 % interval {low:+.1f} to {high:+.1f})."


def cost_lines(costs: Costs) -> Iterator[tuple[str, str]]:
    """Yield the size and the latency of both, each with its name."""
    first, second = costs
    yield "size", f"A {first.megabytes:.1f} MB, B {second.megabytes:.1f} MB"
    yield (
        "latency",
        f"A {first.p50_ms:.2f} ms, B {second.p50_ms:.2f} ms for one image ({first.backend}, {first.processor})",
    )


def lines(comparison: Comparison, names: tuple[str, str], costs: Costs | None = None) -> Iterator[str]:
    """Yield the comparison for a terminal."""
    shared = comparison.shared
    yield f"A          {printable(names[0])}"
    yield f"B          {printable(names[1])}"
    yield f"images     {counted(len(shared.targets), 'image')} in both{_not_shared(shared.num_unmatched)}"
    yield "metric             A         B     B - A  95 % interval of B - A"
    for paired in comparison.paired.values():
        low, high = paired.interval
        values = f"{paired.values[0]:8.4f}  {paired.values[1]:8.4f}  {paired.difference:+8.4f}"
        note = "  (lower is better)" if paired.metric in LOWER_IS_BETTER else ""
        yield f"{paired.metric:<10}  {values}  {low:+.4f} to {high:+.4f}{note}"
    only = comparison.only_right
    yield f"McNemar    only A right {only[0]}, only B right {only[1]}, p = {probability(comparison.p_value)}"
    if costs:
        yield from (f"{name:<9}  {text}" for name, text in cost_lines(costs))
        yield f"tradeoff   {tradeoff(comparison, names, costs)}"
    yield f"answer     {verdict(comparison, names)}"


def _not_shared(numbers: tuple[int, int]) -> str:
    return f"; not in both: {numbers[0]} of A, {numbers[1]} of B" if any(numbers) else ""


def probability(value: float) -> str:
    """Return a p-value in readable form.

    >>> probability(0.25), probability(0.000012)
    ('0.250', '1.2e-05')
    """
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def page(
    comparison: Comparison,
    names: tuple[str, str],
    split: str,
    root: Path | None,
    limits: DecodeLimits,
    provenance: Sequence[tuple[str, str]],
    costs: Costs | None = None,
) -> str:
    """Return the page as HTML below 10 MB.

    `root` is the folder that the images' paths start from, `limits` bounds their decoding, `provenance` are the
    lines of the footer, and `costs` are shown where both were measured.
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
        unmatched=_not_shared(comparison.shared.num_unmatched).removeprefix("; "),
        rows=[_row(paired, comparison) for paired in comparison.paired.values()],
        directions=directions,
        pictures=any(change.thumbnail.address for direction in directions for change in direction.shown),
        provenance=provenance,
        tradeoff=plain(tradeoff(comparison, names, costs)) if costs else "",
        costs=[(name, plain(text)) for name, text in cost_lines(costs)] if costs else [],
    )


def _row(paired: PairedMetric, comparison: Comparison) -> dict[str, object]:
    """Return a metric's row of the table, its interval on a scale that similar metrics share, zero in the middle."""
    similar = [
        other
        for other in comparison.paired.values()
        if (other.metric in LOWER_IS_BETTER) == (paired.metric in LOWER_IS_BETTER)
    ]
    reach = max(abs(bound) for other in similar for bound in (*other.interval, other.difference)) * 1.1 or 1.0
    positions = [_WIDTH / 2 * (1 + value / reach) for value in (*paired.interval, paired.difference)]
    side = "" if paired.interval[0] <= 0 <= paired.interval[1] else "better" if paired.gain > 0 else "worse"
    return {
        "title": _TITLES[paired.metric],
        "lower": paired.metric in LOWER_IS_BETTER,
        "paired": paired,
        "side": side,
        "low": round(positions[0], 1),
        "high": round(positions[1], 1),
        "middle": round(positions[2], 1),
        "reach": f"{reach:.2g}",
    }


def _directions(
    comparison: Comparison, names: tuple[str, str], root: Path | None, limits: DecodeLimits
) -> Iterator[Direction]:
    right = comparison.shared.right
    titles = [plain(name) for name in names]
    room = thumbnails.BUDGET // 2
    for kind, won, lost in (("gained", 1, 0), ("lost", 0, 1)):
        rows = np.flatnonzero(right[won] & ~right[lost])
        order = rows[np.argsort(-comparison.shared.confidences[lost, rows], kind="stable")]
        title = f"{'Gained' if kind == 'gained' else 'Lost'}: only {titles[won]} is right"
        yield Direction(kind, title, len(rows), _changes(comparison, order[:_MAX_SHOWN].tolist(), root, limits, room))


def _changes(
    comparison: Comparison, rows: Sequence[int], root: Path | None, limits: DecodeLimits, room: int
) -> list[Change]:
    """Return the changed images; thumbnails until `room` characters are used."""
    shared = comparison.shared
    changes = []
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda row: thumbnail(root / shared.paths[row], limits) if root else NO_PICTURE, rows))
    for row, picture in zip(rows, drawn, strict=True):
        room -= len(picture.address) + len(shared.paths[row]) + _MARKUP
        first, second = (plain(shared.classes[code]) for code in shared.predicted[:, row])
        confidences = float(shared.confidences[0, row]), float(shared.confidences[1, row])
        truth = plain(shared.classes[shared.targets[row]])
        changes.append(
            Change(plain(shared.paths[row]), truth, (first, second), confidences, picture if room > 0 else NO_PICTURE)
        )
    return changes
