"""Answers as a folder of numbered Parquet files, each written in one step: a retry neither repeats nor loses a row."""

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

RUN = "_run.json"  # readers of Parquet folders skip names that begin with _
DONE = "_SUCCESS"
_DIGITS = 5


class ShardStore(Protocol):
    """A folder in which a file appears completely or not at all."""

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
    """The answers of one run: `count` files in the order of the images, and `_run.json`, which identifies the run.

    On a disk they are in OUTPUT.part, which is renamed to OUTPUT when the last is written. In S3-like storage, where
    nothing can be renamed, they are in OUTPUT, and `_SUCCESS` is written last.
    """

    output: str
    storage: Storage
    run: Mapping[str, Any]
    count: int

    @property
    def store(self) -> ShardStore:
        """The folder of the files until all are written."""
        return Prefix(self.output, self.storage) if is_stored(self.output) else ShardFolder(Path(f"{self._path}.part"))

    @property
    def _path(self) -> Path:
        return Path(os.path.abspath(self.output))

    def name(self, number: int) -> str:
        """Return the file name of a shard; names sort in the order of the numbers."""
        return f"part-{number:0{max(_DIGITS, len(str(self.count - 1)))}d}.parquet"

    def check(self, resume: bool) -> int:
        """Check that this run may write there, and return the number of shards that exist already.

        Raises:
            ConfigError: Other files are there, or files of this run and `resume` is false.
        """
        if not is_stored(self.output) and (self._path.is_file() or ShardFolder(self._path).names()):
            raise ConfigError(f"{self.output!r} exists", "choose another --output, or remove it")
        names = {name for name in self.store.names() if not name.startswith(".")}  # left by killed workers
        if DONE in names or (names and RUN not in names):
            content = "complete answers" if DONE in names else "other files"
            raise ConfigError(f"{self._unfinished} holds {content}", "choose another --output")
        done = len({self.name(number) for number in range(self.count)} & names)
        if names - {RUN} and not resume:
            raise ConfigError(
                f"{self._unfinished} belongs to a run that was stopped",
                "add --resume to continue it, remove it, or choose another --output",
            )
        if names - {RUN}:
            hint = "repeat the settings of that run, or choose another --output"
            check_same_run(self._known(), self.run, self._unfinished, hint)
        return done

    def begin(self) -> None:
        """Write `_run.json`, which identifies the run."""
        self.store.write(RUN, json.dumps(self.run, indent=1).encode())

    def check_shared(self, machine: str) -> None:
        """Raise StorageError where this machine does not see the driver's files, or another run began there since."""
        if dict(self._known()) != dict(self.run):
            raise StorageError(
                f"{self._unfinished} is another folder on {machine}",
                "give a folder that all machines share, or s3://BUCKET/FOLDER",
            )

    def answers(self, number: int) -> list[Answer] | None:
        """Return path and error, where there is one, of each row of a shard; None for a shard that is not written."""
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]

        content = self.store.read(self.name(number))
        if content is None:
            return None
        rows = parquet.read_table(io.BytesIO(content), columns=["path", "error"]).to_pylist()
        return [row if row["error"] else {"path": row["path"]} for row in rows]

    def write(self, number: int, answers: Iterable[Answer], top_k: int | None) -> None:
        """Write a shard in one step; writing it again gives the same bytes."""
        file = io.BytesIO()
        write_answers(answers, "parquet", top_k, file)
        self.store.write(self.name(number), file.getvalue())

    def finish(self, images: int, failed: int) -> None:
        """Rename the folder to OUTPUT, or mark it as complete; StorageError where a shard is missing."""
        missing = sorted({self.name(number) for number in range(self.count)} - self.store.names())
        if missing:
            raise StorageError(
                f"{missing[0]} was written and is not in {self._unfinished}", "give a folder that all machines share"
            )
        self.store.write(DONE, json.dumps({"images": images, "errors": failed, "shards": self.count}).encode())
        if isinstance(self.store, ShardFolder):
            with storage_errors(self._path):
                for partial in self.store.path.glob(".*.part"):  # of workers that were killed
                    partial.unlink(missing_ok=True)
                os.replace(self.store.path, self._path)

    @property
    def _unfinished(self) -> str:
        return repr(self.output if is_stored(self.output) else f"{self._path}.part")

    def _known(self) -> Mapping[str, Any]:
        content = self.store.read(RUN)
        try:
            run = json.loads(content or b"{}")
        except ValueError:
            run = {}
        return run if isinstance(run, dict) else {}
