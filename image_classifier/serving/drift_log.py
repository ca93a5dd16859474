"""The log of a server's answers, runs/serve/NAME.jsonl: read and compared with the validation split."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_classifier.bundle import Bundle, reading
from image_classifier.errors import ConfigError, DataError
from image_classifier.evaluation.drift import DriftReference, Shift
from image_classifier.serving.worker.spec import version_of
from image_classifier.text import listed

_MAX_LISTED = 10  # names of other logs

Row = tuple[float, float | None]  # the confidence and the out-of-distribution score of one answer


@dataclass(frozen=True)
class DriftResult:
    """The shifts of a model's recent answers from the validation split."""

    version: str
    images: int
    val_images: int
    shifts: list[Shift]

    @property
    def drifted(self) -> bool:
        """Whether at least one figure has drifted."""
        return any(shift.drifted for shift in self.shifts)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        figures = [shift.as_dict() for shift in self.shifts]
        return {"version": self.version, "images": self.images, "figures": figures}


def measure_drift(bundle: Bundle, path: Path, last: int) -> DriftResult:
    """Compare the last answers in a log with the validation split of a bundle.

    Raises:
        ConfigError: The bundle holds no figures of the validation split.
        DataError: There is no log, or no answer of this model's version in it.
    """
    reference = DriftReference.of(bundle.info.decision)
    if reference is None:
        name = bundle.directory.name
        raise ConfigError(f"the bundle {name!r} has no reference for drift", "train it again with this release")
    version = version_of(bundle.directory)
    with reading(path):
        rows = deque(_read_rows(path, version), maxlen=last)
    if not rows:
        raise DataError(f"{str(path)!r} holds no answer of version {version}", _hint(path))
    return DriftResult(version, len(rows), reference.num_images, reference.shifts(columns(rows)))


def columns(rows: Iterable[Row]) -> dict[str, list[float]]:
    """Return each figure of the answers as a list; scores only where every answer has one.

    >>> columns([(0.9, 1.5), (0.8, 2.5)])
    {'confidence': [0.9, 0.8], 'ood_score': [1.5, 2.5]}
    >>> columns([(0.9, 1.5), (0.8, None)])
    {'confidence': [0.9, 0.8]}
    """
    rows = list(rows)
    figures = {"confidence": [confidence for confidence, _ in rows]}
    scores = [score for _, score in rows if score is not None]
    return {**figures, "ood_score": scores} if len(scores) == len(rows) else figures


def _read_rows(path: Path, version: str) -> Iterator[Row]:
    """Yield the answers of one version, from the older log first. Skip damaged lines (a full disk cuts them off)."""
    for file in (path.with_name(f"{path.name}.1"), path):
        if not file.is_file():
            continue
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    if row["version"] == version:
                        yield float(row["confidence"]), None if row["ood_score"] is None else float(row["ood_score"])
                except (ValueError, KeyError, TypeError):
                    continue


def _hint(path: Path) -> str:
    """Return what to do about a missing log: the model may have been served under another name."""
    with reading(path.parent):
        names = sorted({file.name.partition(".jsonl")[0] for file in path.parent.glob("*.jsonl*")} - {path.stem})
    if not names:
        return "serve it with drift.enabled=true, or name the file: --log PATH"
    return f"if it was served under another name, add --name NAME; there are logs of {listed(names, _MAX_LISTED)}"
