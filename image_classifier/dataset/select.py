"""Selection of classes, and of how many images of each: `data.classes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from image_classifier.dataset.group_split import ranks
from image_classifier.errors import ConfigError
from image_classifier.manifest import SPLITS
from image_classifier.text import did_you_mean, listed

_TRAIN, _TEST = SPLITS.index("train"), SPLITS.index("test")


@dataclass(frozen=True)
class ClassSettings:
    """The config group `data.classes`; null and the empty list keep everything.

    Applied in this order: `include` (keep these classes only, by their names after `rename`), `exclude` (drop these),
    `min_images` (drop classes with fewer), `top` (keep the classes with the most images), `max_images` (keep so many
    images of each class).

    Raises:
        ConfigError: A number below 1, or a class that is both included and excluded.
    """

    top: int | None = None
    include: list[str] | None = None
    exclude: list[str] = field(default_factory=list)
    max_images: int | None = None
    min_images: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("top", self.top), ("max_images", self.max_images), ("min_images", self.min_images)):
            if value is not None and value < 1:
                raise ConfigError(
                    f"data.classes.{name} must be at least 1, not {value}", "null keeps every class as it is"
                )
        if self.include is not None and not self.include:
            raise ConfigError(
                "data.classes.include is an empty list", "name the classes to keep, or write null for all"
            )
        both = sorted(set(self.include or ()) & set(self.exclude))
        if both:
            raise ConfigError(f"data.classes includes and excludes {both[0]!r}", "take it out of one of the lists")


@dataclass(frozen=True)
class Selection:
    """The rows to keep, int64 [M] in their order, and one line about the others ("" if there are none)."""

    rows: np.ndarray
    summary: str


def select(
    targets: np.ndarray,
    classes: Sequence[str],
    splits: np.ndarray,
    digests: np.ndarray,
    settings: ClassSettings,
    seed: int = 0,
) -> Selection:
    """Select the rows that `data.classes` keeps.

    Classes are counted and compared without the images of a given test split: those must not influence the selection.
    `max_images` drops images of train and of no split yet, never of a given val or test split. It keeps the lowest by
    sha256("seed:sha256 of the file"): names and order of files do not matter, and a new image replaces one at most.

    Args:
        targets: Class index of each image, int64 [N].
        classes: Class names, C of them.
        splits: Split given to each image as index in SPLITS, -1 for none, int8 [N].
        digests: sha256 of each file's bytes, uint8 [N, 32].
        settings: What to keep.
        seed: Decides which images a cap keeps.

    Raises:
        ConfigError: A name that is not a class, or fewer than two classes left.
    """
    known = np.bincount(targets, minlength=len(classes)) > 0
    counts = np.bincount(targets[splits != _TEST], minlength=len(classes))
    kept, reasons = _kept_classes(counts, known, classes, settings)
    if reasons and kept.sum() < 2:
        left = f"one class only, {classes[int(np.flatnonzero(kept)[0])]!r}" if kept.any() else "no class"
        raise ConfigError(
            f"data.classes leaves {left} ({'; '.join(reasons)})", "a classifier needs images of two or more classes"
        )
    stays = kept[targets]
    if settings.max_images is not None:
        over = _over_the_cap(np.flatnonzero(stays & (splits <= _TRAIN)), targets, digests, settings.max_images, seed)
        stays[over] = False
        if len(over):
            reasons.append(
                f"max_images={settings.max_images} drops {len(over)} images of {len(np.unique(targets[over]))} classes"
            )
    rows = np.flatnonzero(stays)
    sizes = f"{kept.sum()} of {known.sum()} classes, {len(rows)} of {len(targets)} images"
    summary = f"data.classes keeps {sizes}: {'; '.join(reasons)}"
    return Selection(rows, summary if reasons else "")


def _kept_classes(
    counts: np.ndarray, known: np.ndarray, classes: Sequence[str], settings: ClassSettings
) -> tuple[np.ndarray, list[str]]:
    """Return which classes stay, bool [C], and why the others do not."""
    kept = known.copy()
    reasons: list[str] = []
    steps = {
        "include": known if settings.include is None else known & _named("include", settings.include, classes, known),
        "exclude": known & ~_named("exclude", settings.exclude, classes, known),
        f"min_images={settings.min_images}": counts >= (settings.min_images or 0),
    }
    for step, stays in steps.items():
        _leave_out(kept, stays, step, classes, reasons)
    if settings.top is not None:
        order = sorted(np.flatnonzero(kept).tolist(), key=lambda label: (-counts[label], classes[label]))
        stays = np.zeros(len(classes), dtype=bool)
        stays[order[: settings.top]] = True
        _leave_out(kept, stays, f"top={settings.top}", classes, reasons)
    return kept, reasons


def _leave_out(kept: np.ndarray, stays: np.ndarray, step: str, classes: Sequence[str], reasons: list[str]) -> None:
    leaving = np.flatnonzero(kept & ~stays).tolist()
    kept &= stays
    if leaving:
        reasons.append(f"{step} drops {listed([classes[label] for label in leaving], 10)}")


def _named(key: str, names: Sequence[str], classes: Sequence[str], known: np.ndarray) -> np.ndarray:
    """Return which classes a list names, bool [C]; ConfigError for a name that is not a class."""
    labels = {name: label for label, name in enumerate(classes) if known[label]}
    for name in names:
        if name not in labels:
            some = ", ".join(list(labels)[:10]) + (" ..." if len(labels) > 10 else "")
            raise ConfigError(
                f"data.classes.{key} names {name!r}, which is not a class",
                did_you_mean(name, labels) + f"the classes are {some}",
            )
    chosen = np.zeros(len(classes), dtype=bool)
    chosen[[labels[name] for name in names]] = True
    return chosen


def _over_the_cap(rows: np.ndarray, targets: np.ndarray, digests: np.ndarray, cap: int, seed: int) -> np.ndarray:
    """Return the rows after the first `cap` of their class, in the order of rank, int64."""
    crowded = np.bincount(targets[rows], minlength=1)[targets[rows]] > cap
    rows = rows[crowded]
    rows = rows[np.lexsort((ranks((row.tobytes().hex() for row in digests[rows]), seed), targets[rows]))]
    labels = targets[rows]
    position = np.arange(len(rows)) - np.searchsorted(labels, labels)  # within the class
    return np.asarray(rows[position >= cap])
