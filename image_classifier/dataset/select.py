"""Which classes take part, and how many images of each: `data.classes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from image_classifier.dataset.group_split import ranks
from image_classifier.errors import ConfigError
from image_classifier.manifest import SPLITS
from image_classifier.text import did_you_mean

_TRAIN, _TEST = SPLITS.index("train"), SPLITS.index("test")


@dataclass(frozen=True)
class ClassSettings:
    """The config group `data.classes`: null and the empty list leave everything in.

    Applied in this order: `include` (these classes only, by their names after `rename`), `exclude` (not these), `min_images`
    (classes with fewer leave), `top` (the classes with the most images stay), `max_images` (so many of each class stay).

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
                    f"data.classes.{name} must be at least 1, not {value}", "null leaves every class as it is"
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
    """The rows that stay, int64 [M] in their order, and one line on what left ("" where nothing did)."""

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
    """The rows that `data.classes` leaves.

    Classes are counted and compared without the images of a given test part: what is chosen must not be chosen by them.
    The cap takes away images of train and of no part yet, never of a given val or test part, and keeps the lowest by
    sha256("seed:sha256 of the file"): names and order of files do not matter, and an added image changes the place of one at most.

    Args:
        targets: Class index of each image, int64 [N].
        classes: Class names, C of them.
        splits: Part given to each image as position in SPLITS, -1 for none, int8 [N].
        digests: sha256 of each file's bytes, uint8 [N, 32].
        settings: What to keep.
        seed: Decides which images a cap keeps.

    Raises:
        ConfigError: A name that is no class, or fewer than two classes left.
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
                f"max_images={settings.max_images} leaves out {len(over)} images of {len(np.unique(targets[over]))} classes"
            )
    rows = np.flatnonzero(stays)
    summary = f"data.classes keeps {kept.sum()} of {known.sum()} classes, {len(rows)} of {len(targets)} images: {'; '.join(reasons)}"
    return Selection(rows, summary if reasons else "")


def _kept_classes(
    counts: np.ndarray, known: np.ndarray, classes: Sequence[str], settings: ClassSettings
) -> tuple[np.ndarray, list[str]]:
    """Which classes stay, bool [C], and why the others do not."""
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


def _leave_out(
    kept: np.ndarray, stays: np.ndarray, step: str, classes: Sequence[str], reasons: list[str], most: int = 10
) -> None:
    leaving = np.flatnonzero(kept & ~stays).tolist()
    kept &= stays
    if leaving:
        names = ", ".join(classes[label] for label in leaving[:most])
        reasons.append(
            f"{step} leaves out {names}" + (f" and {len(leaving) - most} more" if len(leaving) > most else "")
        )


def _named(key: str, names: Sequence[str], classes: Sequence[str], known: np.ndarray) -> np.ndarray:
    """Which classes a list names, bool [C]; ConfigError for a name that is none."""
    labels = {name: label for label, name in enumerate(classes) if known[label]}
    for name in names:
        if name not in labels:
            some = ", ".join(list(labels)[:10]) + (" ..." if len(labels) > 10 else "")
            raise ConfigError(
                f"data.classes.{key} names {name!r}, which is no class",
                did_you_mean(name, labels) + f"the classes are {some}",
            )
    chosen = np.zeros(len(classes), dtype=bool)
    chosen[[labels[name] for name in names]] = True
    return chosen


def _over_the_cap(rows: np.ndarray, targets: np.ndarray, digests: np.ndarray, cap: int, seed: int) -> np.ndarray:
    """Those of the rows that come after the first `cap` of their class, in the order of rank, int64."""
    crowded = np.bincount(targets[rows], minlength=1)[targets[rows]] > cap
    rows = rows[crowded]
    rows = rows[np.lexsort((ranks((row.tobytes().hex() for row in digests[rows]), seed), targets[rows]))]
    labels = targets[rows]
    place = np.arange(len(rows)) - np.searchsorted(labels, labels)  # within the class
    return np.asarray(rows[place >= cap])
