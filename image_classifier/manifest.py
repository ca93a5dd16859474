"""The images of a data set: `Record` and `Manifest`, read from and written to CSV, never half-written."""

from __future__ import annotations

import csv
import hashlib
import io
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np

from image_classifier.atomic_io import atomic_file
from image_classifier.errors import DataError
from image_classifier.program import program

SPLITS = ("train", "val", "test")
ENCODING = ("utf-8", "surrogateescape")  # any file name survives
_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Record:
    """One image: its path (relative to the manifest's root), its label and its split.

    `group` (16 hex digits) names the cluster that must stay in one split; `sha256` (64 hex digits) is of the file's
    bytes; width and height are in pixels after EXIF orientation; `split` is "" until the image is assigned to one.
    """

    path: str
    label: str
    split: str
    group: str
    sha256: str
    width: int
    height: int


_COLUMNS = tuple(field.name for field in fields(Record))


class Texts(Sequence[str]):
    """Many short texts in one block of memory, without the 100 bytes that each object of Python costs.

    >>> texts = Texts.of(["cat/1.jpg", "dog/2.jpg"])
    >>> len(texts), texts[-1], list(texts)
    (2, 'dog/2.jpg', ['cat/1.jpg', 'dog/2.jpg'])
    """

    def __init__(self, block: bytes, ends: np.ndarray) -> None:
        self._block, self._ends = block, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Return the texts, packed."""
        block, ends = bytearray(), array("q")
        for text in texts:
            block += text.encode(*ENCODING)
            ends.append(len(block))
        return cls(bytes(block), np.frombuffer(ends, dtype=np.int64) if ends else np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        index = range(len(self._ends))[index]
        start = int(self._ends[index - 1]) if index else 0
        return self._block[start : int(self._ends[index])].decode(*ENCODING)

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends.tolist():
            yield self._block[start:end].decode(*ENCODING)
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Texts) and self._block == other._block and np.array_equal(self._ends, other._ends)

    def __hash__(self) -> int:
        return hash(self._block)


@dataclass(frozen=True, eq=False)
class Manifest:
    """The ordered table of a data set's images, kept by columns.

    >>> one = Record("cat/1.jpg", "cat", "train", "0" * 16, "0" * 64, 640, 480)
    >>> two = Record("dog/2.jpg", "dog", "val", "1" * 16, "1" * 64, 640, 480)
    >>> manifest = Manifest.of(Path("photos"), [one, two])
    >>> len(manifest), manifest.classes, manifest.targets.tolist(), manifest.indices("val").tolist()
    (2, ('cat', 'dog'), [0, 1], [1])

    Args:
        root: The folder that `paths` are relative to.
        paths: N POSIX paths.
        classes: Class names, sorted by code point: the order used everywhere.
        targets: Class index of each image, int64 [N].
        splits: Index in SPLITS, -1 where not assigned yet, int8 [N].
        groups: The cluster that must stay in one split, uint64 [N].
        digests: The sha256 of each file's bytes, uint8 [N, 32].
        widths: Pixels after EXIF orientation, int32 [N].
        heights: The same, int32 [N].
        corrected: How many labels fix.csv changed ("relabelled") and how many images it left out ("excluded"); for
            reports, not in the file.
    """

    root: Path
    paths: Sequence[str] = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)
    targets: np.ndarray = field(repr=False)
    splits: np.ndarray = field(repr=False)
    groups: np.ndarray = field(repr=False)
    digests: np.ndarray = field(repr=False)
    widths: np.ndarray = field(repr=False)
    heights: np.ndarray = field(repr=False)
    corrected: Mapping[str, int] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, root: Path, records: Iterable[Record]) -> Manifest:
        """Return the table of these records; raise ValueError for an invalid split, group or sha256."""
        columns = _Columns()
        for record in records:
            columns.add(*astuple(record))
        return columns.manifest(root)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> Record:
        split = int(self.splits[row])
        return Record(
            path=self.paths[row],
            label=self.classes[int(self.targets[row])],
            split=SPLITS[split] if split >= 0 else "",
            group=f"{int(self.groups[row]):016x}",
            sha256=self.digests[row].tobytes().hex(),
            width=int(self.widths[row]),
            height=int(self.heights[row]),
        )

    def __iter__(self) -> Iterator[Record]:
        names = (*SPLITS, "")  # -1 is the index of the last
        for start in range(0, len(self), _BLOCK):
            block = slice(start, start + _BLOCK)
            targets, splits, groups, digests, widths, heights = (column[block] for column in self._columns)
            text = digests.tobytes().hex()
            rows = zip(
                targets.tolist(), splits.tolist(), groups.tolist(), widths.tolist(), heights.tolist(), strict=True
            )
            for row, (target, split, group, width, height) in enumerate(rows):
                sha256 = text[64 * row : 64 * row + 64]
                yield Record(
                    self.paths[start + row], self.classes[target], names[split], f"{group:016x}", sha256, width, height
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Manifest):
            return NotImplemented
        if len(self) != len(other) or self.root != other.root or self.classes != other.classes:
            return False
        same = (np.array_equal(mine, yours) for mine, yours in zip(self._columns, other._columns, strict=True))
        return all(same) and list(self.paths) == list(other.paths)

    @property
    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.targets, self.splits, self.groups, self.digests, self.widths, self.heights

    def __hash__(self) -> int:
        return hash((self.root, self.sha256))

    @cached_property
    def sha256(self) -> str:
        """The fingerprint of the table: equal if and only if all rows are equal and in the same order."""
        digest = hashlib.sha256()
        for text in self._csv():
            digest.update(text.encode(*ENCODING))
        return digest.hexdigest()

    def indices(self, split: str) -> np.ndarray:
        """Return the rows of one split, int64 [M], in manifest order."""
        return np.flatnonzero(self.splits == _SPLIT_CODES[split])

    def take(self, rows: np.ndarray) -> Manifest:
        """Return the manifest of these rows, in this order, with only the classes that they have."""
        present, targets = np.unique(self.targets[rows], return_inverse=True)
        paths = Texts.of(self.paths[row] for row in np.asarray(rows).tolist())
        classes = tuple(self.classes[code] for code in present.tolist())
        columns = (self.splits, self.groups, self.digests, self.widths, self.heights)
        taken = Manifest(self.root, paths, classes, targets.astype(np.int64), *(column[rows] for column in columns))
        return replace(taken, corrected=self.corrected)

    def part(self, split: str) -> Manifest:
        """Return the manifest of one split."""
        return self.take(self.indices(split))

    def moved(self, split: str, to: str) -> Manifest:
        """Return the manifest with the images of one split in another."""
        return replace(self, splits=np.where(self.splits == _SPLIT_CODES[split], _SPLIT_CODES[to], self.splits))

    def leaked(self, split: str) -> np.ndarray:
        """Return which records of a split, bool [M], have a duplicate or near-duplicate (their group) in train."""
        return np.isin(self.groups[self.indices(split)], self.groups[self.indices("train")])

    def file(self, record: Record) -> Path:
        """Return the path of the record's image."""
        return self.root / record.path

    def to_csv(self) -> str:
        """Return the table as text: a header, then one row per image; lines end as on Unix."""
        return "".join(self._csv())

    def write(self, path: Path) -> None:
        """Write `manifest.csv` completely or not at all; raise StorageError where the disk refuses."""
        with atomic_file(path) as file:
            for text in self._csv():
                file.write(text.encode(*ENCODING))

    def _csv(self) -> Iterator[str]:
        text = io.StringIO()
        write_row = csv_writer(text)
        write_row(_COLUMNS)
        for row, record in enumerate(self, start=1):
            write_row(
                (record.path, record.label, record.split, record.group, record.sha256, record.width, record.height)
            )
            if row % _BLOCK == 0:
                yield text.getvalue()
                text.seek(0)
                text.truncate()
        yield text.getvalue()

    @classmethod
    def read(cls, path: Path, root: Path) -> Manifest:
        """Read `manifest.csv`; raise DataError for the first line that is not a record."""
        try:
            with path.open(encoding=ENCODING[0], errors=ENCODING[1], newline="") as file:
                return _read(csv.DictReader(file), path, root)
        except OSError as error:
            raise DataError(
                f"cannot read the manifest {str(path)!r} ({error.strerror})", f"run `{program()} prepare` first"
            ) from error


def csv_writer(file: IO[str]) -> Callable[[Sequence[object]], object]:
    """Return a function that writes one row.

    The module csv does not quote a lone carriage return, which a file name may hold, and then cannot read it back.
    """
    plain = csv.writer(file, lineterminator="\n")
    quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
    return lambda row: (quoted if any("\r" in item for item in row if isinstance(item, str)) else plain).writerow(row)


_SPLIT_CODES = {name: code for code, name in enumerate(SPLITS)}


class _Columns:
    """Columns that grow row by row; a row costs its bytes and no Python object."""

    def __init__(self) -> None:
        self.paths, self.ends, self.digests = bytearray(), array("q"), bytearray()
        self.labels: dict[str, int] = {}
        self.targets, self.splits, self.groups = array("q"), array("b"), array("Q")
        self.widths, self.heights = array("i"), array("i")

    def add(self, path: str, label: str, split: str, group: str, sha256: str, width: int, height: int) -> None:
        digest = bytes.fromhex(sha256)
        if len(digest) != 32 or len(group) != 16:
            raise ValueError("sha256 has 64 hex digits and group 16")
        group_number = int(group, 16)
        split_code = -1 if split == "" else _SPLIT_CODES[split]
        # All values are checked above: from here on every column grows by one row.
        self.groups.append(group_number)
        self.splits.append(split_code)
        self.digests += digest
        self.paths += path.encode(*ENCODING)
        self.ends.append(len(self.paths))
        self.targets.append(self.labels.setdefault(label, len(self.labels)))
        self.widths.append(width)
        self.heights.append(height)

    def manifest(self, root: Path) -> Manifest:
        classes = sorted(self.labels)
        order = np.zeros(len(classes), dtype=np.int64)
        order[[self.labels[label] for label in classes]] = np.arange(len(classes))
        targets = order[np.array(self.targets, dtype=np.int64)]
        paths = Texts(bytes(self.paths), np.array(self.ends, dtype=np.int64))
        digests = np.frombuffer(bytes(self.digests), dtype=np.uint8).reshape(-1, 32)
        sizes = (np.array(self.widths, dtype=np.int32), np.array(self.heights, dtype=np.int32))
        return Manifest(
            root,
            paths,
            tuple(classes),
            targets,
            np.array(self.splits, dtype=np.int8),
            np.array(self.groups, dtype=np.uint64),
            digests,
            *sizes,
        )


def _read(rows: csv.DictReader[str], path: Path, root: Path) -> Manifest:
    missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise DataError(
            f"the manifest {str(path)!r} has no column {', '.join(missing)}", f"its columns are {','.join(_COLUMNS)}"
        )
    columns = _Columns()
    for number, row in enumerate(rows, start=2):
        if row["split"] not in SPLITS:
            raise DataError(
                f"line {number} of the manifest {str(path)!r} has the split {row['split']!r}",
                f"use one of {', '.join(SPLITS)}",
            )
        try:
            columns.add(
                row["path"],
                row["label"],
                row["split"],
                row["group"],
                row["sha256"],
                int(row["width"]),
                int(row["height"]),
            )
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            hint = "sha256 has 64 hex digits, group 16; width and height are integers"
            raise DataError(f"line {number} of the manifest {str(path)!r} is not a record", hint) from error
    return columns.manifest(root)
