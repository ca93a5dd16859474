"""Answers on their way to a file: FILE.part has a line of JSON for each, so that a run that was killed at any moment can be gone on with."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from image_classifier.atomic_io import write_bytes
from image_classifier.errors import ConfigError, storage_errors
from image_classifier.inference.writers import Answer, line_of
from image_classifier.sources.image_source import ImageSource

log = logging.getLogger(__name__)

_START_OVER = "ask as then, or leave --resume out to start over"
_FIRST = 2**20  # bytes that the first line may have
_OTHERS = {"model": "the model is another one", "images": "the images are others"}


@dataclass(frozen=True)
class ResumeLog:
    """What a run has answered so far: a first line that says which run it is, then an answer a line."""

    path: Path

    @classmethod
    def of(cls, output: Path) -> ResumeLog:
        """The one of an output file."""
        return cls(output.with_name(f"{output.name}.part"))

    def run(self) -> Mapping[str, Any] | None:
        """What the first line says of the run, None where there is none to go on with; StorageError where the file cannot be read."""
        with self._errors():
            if not self.path.is_file():
                return None
            with self.path.open("rb") as file:
                return _parsed(file.readline(_FIRST))

    def check(self) -> None:
        """ConfigError where what lies there is not of a run that was stopped; a file without a byte is nobody's."""
        with self._errors():
            is_ours = not self.path.exists() or (
                self.path.is_file() and (not self.path.stat().st_size or {"model", "backend"} <= {*(self.run() or ())})
            )
            if not is_ours:
                raise ConfigError(
                    f"{str(self.path)!r} is no run that was stopped", "move it away, or choose another --output"
                )

    def begin(self, run: Mapping[str, Any]) -> None:
        """Start over."""
        write_bytes(self.path, _line(run))  # whole, so that a line that was cut is never this one

    def keep(self, batch_size: int) -> int:
        """Cut off the half line and the half batch of a kill, so that the rest comes in the batches of a run without one; how many stay."""
        with self._errors(), self.path.open("rb+") as file:
            end = ends = len(file.readline())
            count = kept = 0
            for line in file:
                if _parsed(line) is None:
                    break
                end, count = end + len(line), count + 1
                if count % batch_size == 0:
                    ends, kept = end, count
            file.truncate(ends)
        return kept

    def answers(self) -> Iterator[Answer]:
        """The answers so far."""
        with self._errors(), self.path.open("rb") as file:
            file.readline()
            yield from map(json.loads, file)

    def append(self, answers: Iterable[Answer]) -> None:
        """Write answers as they come."""
        with storage_errors(self.path), self.path.open("ab") as file:
            for answer in answers:
                file.write(_line(answer))
                file.flush()  # to the system, where a kill cannot reach it

    def skip(self, items: Iterator[ImageSource], count: int) -> None:
        """Pass over the first items, which are answered; ConfigError where they are not those of the answers."""
        for number, answer in zip_longest(range(count), self.answers()):
            item = next(items, None)
            if item is None or answer is None or item.name != answer["path"]:
                fact = f"image {number + 1} is {item.name!r}" if item else f"there are only {number} images"
                was = "" if answer is None else f", and was {answer['path']!r} in the run that {str(self.path)!r} is of"
                raise ConfigError(fact + was, "give --images as then, or leave --resume out to start over")

    def _errors(self) -> Any:
        return storage_errors(self.path)


def _line(value: Mapping[str, Any]) -> bytes:
    return (line_of(value) + "\n").encode()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A whole line's object; None where it was cut."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def check_same_run(known: Mapping[str, Any], now: Mapping[str, Any], place: str, hint: str = _START_OVER) -> None:
    """ConfigError that names the first key in which two runs differ; `place` is what the known one left."""
    for key in dict.fromkeys([*known, *now]):
        if known.get(key) != now.get(key):
            what = _OTHERS.get(key) or f"{key}={now.get(key)} was {known.get(key)}"
            raise ConfigError(f"{place} is of another run: {what}", hint)
