"""Answers as a folder of numbered Parquet files, each written whole by whoever answered it: doing one again neither repeats nor loses a row."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from image_classifier.atomic_io import write_bytes
from image_classifier.errors import ConfigError, StorageError, storage_errors
from image_classifier.inference.resume_log import check_same_run
from image_classifier.inference.writers import Answer, write_answers
from image_classifier.sources.object_store import Prefix, Storage, is_stored

RUN = "_run.json"  # readers of Parquet folders pass over names that begin so
DONE = "_SUCCESS"
_DIGITS = 5


class ShardStore(Protocol):
    """A folder in which a file appears whole or not at all."""

    def names(self) -> set[str]: ...

    def read(self, name: str) -> bytes | None: ...

    def write(self, name: str, content: bytes) -> None: ...


@dataclass(frozen=True)
class ShardFolder:
    """A folder that all machines see under this path."""

    path: Path

    def names(self) -> set[str]:
        with storage_errors(self.path):
            return set(os.listdir(self.path)) if self.path.is_dir() else set()

    def read(self, name: str) -> bytes | None:
        with storage_errors(self.path / name):
            try:
                return (self.path / name).read_bytes()
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        write_bytes(self.path / name, content)


@dataclass(frozen=True)
class Shards:
    """The answers of one run: `count` files, in the order of the images, and before them which run it is.

    On a disk they lie in OUTPUT.part until the last is there, when that takes the name OUTPUT; in S3-like storage, where nothing can be renamed,
    they lie in OUTPUT, and `_SUCCESS` is written last.
    """

    output: str
    storage: Storage
    run: Mapping[str, Any]
    count: int

    @property
    def place(self) -> ShardStore:
        """Where the files lie until all are there."""
        return Prefix(self.output, self.storage) if is_stored(self.output) else ShardFolder(Path(f"{self._path}.part"))

    @property
    def _path(self) -> Path:
        return Path(os.path.abspath(self.output))

    def name(self, number: int) -> str:
        """The file of a shard, such that names are in the order of numbers."""
        return f"part-{number:0{max(_DIGITS, len(str(self.count - 1)))}d}.parquet"

    def check(self, resume: bool) -> int:
        """Whether this run may write there, of which `resume` may go on with what it left: how many shards are there already.

        Raises:
            ConfigError: Something else lies there.
        """
        if not is_stored(self.output) and (self._path.is_file() or ShardFolder(self._path).names()):
            raise ConfigError(f"{self.output!r} exists", "choose another --output, or remove it")
        names = {name for name in self.place.names() if not name.startswith(".")}  # killed workers leave such
        if DONE in names or (names and RUN not in names):
            raise ConfigError(
                f"{self._left} holds {'answers that are whole' if DONE in names else 'other files'}",
                "choose another --output",
            )
        done = len({self.name(number) for number in range(self.count)} & names)
        if names - {RUN} and not resume:
            raise ConfigError(
                f"{self._left} is of a run that was stopped",
                "add --resume to go on with it, remove it, or choose another --output",
            )
        if names - {RUN}:
            check_same_run(self._known(), self.run, self._left, "ask as then, or choose another --output")
        return done

    def begin(self) -> None:
        """Say which run this is."""
        self.place.write(RUN, json.dumps(self.run, indent=1).encode())

    def check_shared(self, machine: str) -> None:
        """StorageError where this machine does not see what the one that began wrote, or another run began there meanwhile."""
        if dict(self._known()) != dict(self.run):
            raise StorageError(
                f"{self._left} is another place on {machine}",
                "give a folder that all machines share, or s3://BUCKET/FOLDER",
            )

    def answers(self, number: int) -> list[Answer] | None:
        """The path of each row of a shard, and the error of those that have one; None where the shard is not there yet."""
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]

        content = self.place.read(self.name(number))
        if content is None:
            return None
        rows = parquet.read_table(io.BytesIO(content), columns=["path", "error"]).to_pylist()
        return [row if row["error"] else {"path": row["path"]} for row in rows]

    def write(self, number: int, answers: Iterable[Answer], top_k: int | None) -> None:
        """Write a shard whole; once more is the same bytes."""
        file = io.BytesIO()
        write_answers(answers, "parquet", top_k, file)
        self.place.write(self.name(number), file.getvalue())

    def finish(self, images: int, failed: int) -> None:
        """Make it OUTPUT; StorageError where a shard is missing."""
        missing = sorted({self.name(number) for number in range(self.count)} - self.place.names())
        if missing:
            raise StorageError(
                f"{missing[0]} was written and is not in {self._left}", "give a folder that all machines share"
            )
        self.place.write(DONE, json.dumps({"images": images, "errors": failed, "shards": self.count}).encode())
        if isinstance(self.place, ShardFolder):
            with storage_errors(self._path):
                for left in self.place.path.glob(".*.part"):  # of workers that were killed
                    left.unlink(missing_ok=True)
                os.replace(self.place.path, self._path)

    @property
    def _left(self) -> str:
        return repr(self.output if is_stored(self.output) else f"{self._path}.part")

    def _known(self) -> Mapping[str, Any]:
        content = self.place.read(RUN)
        try:
            found = json.loads(content or b"{}")
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}
