"""The value objects that cross rooms: Record, Manifest, Prediction; CSV in and out, never half-written."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from image_classifier.errors import DataError
from image_classifier.files import write_bytes, write_text

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Record:
    """One image: where it is (relative to the manifest's root), what it shows, and which split it belongs to.

    `group` names the cluster that must stay in one split; `sha256` is of the file's bytes; width and height
    are in pixels after EXIF orientation.
    """

    path: str
    label: str
    split: str
    group: str
    sha256: str
    width: int
    height: int


_COLUMNS = tuple(field.name for field in fields(Record))


@dataclass(frozen=True)
class Manifest:
    """The ordered table of a data set's images; `root` is the folder its paths start from."""

    root: Path
    records: tuple[Record, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names in the one order used everywhere: sorted by code point."""
        return tuple(sorted({record.label for record in self.records}))

    @cached_property
    def targets(self) -> np.ndarray:
        """Class index of each record, int64 [N]."""
        index = {label: position for position, label in enumerate(self.classes)}
        return np.array([index[record.label] for record in self.records], dtype=np.int64)

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the table: equal if and only if every row is equal and in the same order."""
        return hashlib.sha256(self.to_csv().encode("utf-8", "surrogateescape")).hexdigest()

    def indices(self, split: str) -> np.ndarray:
        """Positions of the records of one split, int64 [M], in manifest order."""
        return np.array([i for i, record in enumerate(self.records) if record.split == split], dtype=np.int64)

    def part(self, split: str) -> Manifest:
        """The records of one split, in manifest order."""
        return Manifest(self.root, tuple(record for record in self.records if record.split == split))

    def file(self, record: Record) -> Path:
        """Where the record's image lies."""
        return self.root / record.path

    def to_csv(self) -> str:
        """The table as text: a header line, then one row an image; lines end as on Unix."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(astuple(record) for record in self.records)
        return text.getvalue()

    def write(self, path: Path) -> None:
        """Write `manifest.csv` whole or not at all; StorageError where the disk refuses."""
        write_text(path, self.to_csv())

    @classmethod
    def read(cls, path: Path, root: Path) -> Manifest:
        """Read `manifest.csv`; DataError names the line that is not a record."""
        try:
            text = path.read_bytes().decode("utf-8", "surrogateescape")
        except OSError as error:
            raise DataError(f"cannot read the manifest {str(path)!r} ({error.strerror})", "run `python commands.py prepare` first") from error
        rows = csv.DictReader(io.StringIO(text, newline=""))
        missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise DataError(f"the manifest {str(path)!r} has no column {', '.join(missing)}", f"its columns are {','.join(_COLUMNS)}")
        return cls(root, tuple(_record(row, path, number) for number, row in enumerate(rows, start=2)))


def _record(row: Mapping[str, str], path: Path, line: int) -> Record:
    try:
        record = Record(row["path"], row["label"], row["split"], row["group"], row["sha256"], int(row["width"]), int(row["height"]))
    except (TypeError, ValueError) as error:
        raise DataError(f"line {line} of the manifest {str(path)!r} is not a record", "width and height are whole numbers") from error
    if record.split not in SPLITS:
        raise DataError(f"line {line} of the manifest {str(path)!r} has the split {record.split!r}", f"use one of {', '.join(SPLITS)}")
    return record


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one image: probabilities over all classes, or the reason why there is none."""

    path: str
    label: str = ""
    confidence: float = 0.0
    probabilities: Mapping[str, float] = field(default_factory=dict)
    error: str = ""

    def answer(self, top_k: int | None = None) -> dict[str, object]:
        """The JSON object of the command line and the servers, most probable class first."""
        if self.error:
            return {"path": self.path, "error": self.error}
        ranked = sorted(self.probabilities.items(), key=lambda item: -item[1])[:top_k]
        return {"path": self.path, "predicted_class": self.label, "confidence": self.confidence, "all_predictions": dict(ranked)}


@dataclass(frozen=True)
class PredictionTable:
    """What a model said of one split: `logits` float32 [N, C] beside the rows' paths and true labels."""

    paths: tuple[str, ...]
    targets: np.ndarray
    logits: np.ndarray
    classes: tuple[str, ...]

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Softmax of the logits, float64 [N, C]."""
        return softmax(self.logits)

    def write(self, directory: Path) -> None:
        """Write `predictions.csv` (path, label, predicted_class, confidence) and `logits.npy` beside it."""
        predicted = self.probabilities.argmax(axis=1)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("path", "label", "predicted_class", "confidence"))
        for row, path in enumerate(self.paths):
            confidence = f"{self.probabilities[row, predicted[row]]:.6f}"
            writer.writerow((path, self.classes[self.targets[row]], self.classes[predicted[row]], confidence))
        write_text(directory / "predictions.csv", text.getvalue())
        buffer = io.BytesIO()
        np.save(buffer, self.logits.astype(np.float32))
        write_bytes(directory / "logits.npy", buffer.getvalue())


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits [N, C], float64 [N, C]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponents = np.exp(shifted)
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))
