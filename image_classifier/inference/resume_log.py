"""The files from which a run into FILE resumes: FILE.part has the answers so far, .FILE.run describes a finished run.

FILE.part has a first line of JSON that identifies the run, then one answer per line. A run that was killed at any
moment leaves a file whose complete lines are valid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from image_classifier.atomic_io import write_bytes
from image_classifier.bundle import sha256_of
from image_classifier.errors import ConfigError, storage_errors
from image_classifier.inference.writers import Answer, AnswerCounter, json_line
from image_classifier.sources.image_source import ImageSource

_START_OVER = "repeat the settings of that run, or leave --resume out to start over"
_SAME_IMAGES = "repeat the --images of that run, or leave --resume out to start over"
_MAX_FIRST_LINE = 2**20  # bytes
_DIFFERENCES = {"model": "the model is another one", "images": "the images are others"}


@dataclass(frozen=True)
class ResumeLog:
    """The answers of a run that has not finished: FILE.part."""

    path: Path

    @classmethod
    def of(cls, output: Path) -> ResumeLog:
        """Return the log of an output file."""
        return cls(output.with_name(f"{output.name}.part"))

    def run(self) -> Mapping[str, Any] | None:
        """Return the fingerprint of the run, None where there is none; StorageError where the file cannot be read."""
        with self._errors():
            if not self.path.is_file():
                return None
            with self.path.open("rb") as file:
                return _parsed(file.readline(_MAX_FIRST_LINE))

    def check(self) -> None:
        """Raise ConfigError where FILE.part exists and no stopped run wrote it; an empty file may be overwritten."""
        with self._errors():
            if not self.path.exists():
                return
            is_empty = self.path.is_file() and not self.path.stat().st_size
            if not is_empty and not {"model", "backend"} <= {*(self.run() or ())}:
                raise ConfigError(
                    f"{str(self.path)!r} was not written by a stopped run", "move it away, or choose another --output"
                )

    def begin(self, run: Mapping[str, Any]) -> None:
        """Start over: write the first line."""
        write_bytes(self.path, _line(run))  # in one step, so that a half line is never the first one

    def keep(self, batch_size: int) -> int:
        """Remove the half line and the half batch that a kill left, and return how many answers remain.

        The rest of the images then comes in the same batches as in a run that was not interrupted.
        """
        with self._errors(), self.path.open("rb+") as file:
            # `position` is the end of the last complete line, `end` the end of the last complete batch.
            end = position = len(file.readline())
            kept = 0
            for count, line in enumerate(file, 1):
                # Only the last line can be incomplete.
                if _parsed(line) is None:
                    break
                position += len(line)
                if count % batch_size == 0:
                    end = position
                    kept = count
            file.truncate(end)
        return kept

    def answers(self) -> Iterator[Answer]:
        """Yield the answers so far."""
        with self._errors(), self.path.open("rb") as file:
            file.readline()
            yield from map(json.loads, file)

    def append(self, answers: Iterable[Answer]) -> None:
        """Write answers as they come."""
        with storage_errors(self.path), self.path.open("ab") as file:
            for answer in answers:
                file.write(_line(answer))
                file.flush()  # to the operating system, where a kill of this process cannot lose it

    def skip(self, items: Iterator[ImageSource], count: int) -> None:
        """Skip the first `count` items, which are answered; ConfigError where the answers are for other images."""
        for number, answer in zip_longest(range(count), self.answers()):
            item = next(items, None)
            if item is None or answer is None or item.name != answer["path"]:
                now = f"image {number + 1} is {item.name!r}" if item else f"there are only {number} images"
                before = "" if answer is None else f", but was {answer['path']!r} in the run of {str(self.path)!r}"
                raise ConfigError(now + before, _SAME_IMAGES)

    def _errors(self) -> AbstractContextManager[None]:
        return storage_errors(self.path)


def _line(value: Mapping[str, Any]) -> bytes:
    return (json_line(value) + "\n").encode()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the object of a complete line, None for an incomplete one."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def check_same_run(known: Mapping[str, Any], now: Mapping[str, Any], owner: str, hint: str = _START_OVER) -> None:
    """Raise ConfigError with the first key in which two runs differ; `owner` names the files of the known one.

    >>> check_same_run({"top_k": 1}, {"top_k": 1}, "'a.csv'")
    >>> check_same_run({"top_k": 1}, {"top_k": 3}, "'a.csv'", hint="start over")
    Traceback (most recent call last):
    image_classifier.errors.ConfigError: 'a.csv' belongs to another run: top_k=3 was 1: start over
    """
    for key in dict.fromkeys([*known, *now]):
        if known.get(key) != now.get(key):
            difference = _DIFFERENCES.get(key) or f"{key}={now.get(key)} was {known.get(key)}"
            raise ConfigError(f"{owner} belongs to another run: {difference}", hint)


class NameHash:
    """A hash of the names of images, in their order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str) -> None:
        """Add the next name."""
        self._hash.update(f"{name}\0".encode("utf-8", "surrogatepass"))

    def of(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """Yield the answers, adding the name of each."""
        for answer in answers:
            self.add(answer["path"])
            yield answer

    def __str__(self) -> str:
        return self._hash.hexdigest()


@dataclass(frozen=True)
class CompletionRecord:
    """The record of the run that wrote `output`, in .FILE.run: by it `--resume` sees that nothing is left to do."""

    output: Path

    @property
    def path(self) -> Path:
        """The file of the record."""
        return self.output.with_name(f".{self.output.name}.run")

    def write(self, run: Mapping[str, Any], counter: AnswerCounter, names: NameHash) -> None:
        """Record the run that wrote the output, its images and the counts of its answers."""
        with storage_errors(self.output):
            record = {"run": run, "answers": sha256_of(self.output), "images": str(names), "told": asdict(counter)}
        write_bytes(self.path, json.dumps(record).encode())

    def run(self) -> Mapping[str, Any] | None:
        """Return the fingerprint of that run; None where there is no record, or the output was changed since."""
        record = self._read()
        with storage_errors(self.output):
            unchanged = record is not None and self.output.is_file() and record["answers"] == sha256_of(self.output)
        return record["run"] if record and unchanged else None

    def counter(self, items: Iterable[ImageSource]) -> AnswerCounter:
        """Return the counts of that run; ConfigError where `items` are not its images."""
        record = self._read() or {}
        names = NameHash()
        for item in items:
            names.add(item.name)
        if record["images"] != str(names):
            raise ConfigError(f"{str(self.output)!r} holds the answers for other images", _SAME_IMAGES)
        return AnswerCounter(**record["told"])

    def _read(self) -> dict[str, Any] | None:
        """Return the record, None where there is none or the file is not one."""
        with storage_errors(self.path):
            content = self.path.read_bytes() if self.path.is_file() else b""
        try:
            record = json.loads(content)
        except ValueError:
            return None
        types = {"run": dict, "answers": str, "images": str, "told": dict}
        is_record = isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in types.items())
        return record if is_record else None
