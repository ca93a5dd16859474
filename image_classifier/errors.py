"""What can go wrong, as one tree; every leaf becomes one line on the terminal and exit code 2.

ClassifierError
├── ConfigError            a key, a value or an option that cannot be
├── DataError              a folder or a manifest that cannot be trained on
│   ├── UnreadableImage    one file that is not the picture it claims to be
│   └── SourceError        a data set that cannot be fetched, found or unpacked
├── CheckpointError        a checkpoint or bundle that is missing, ambiguous or damaged
├── ParityError            an export that disagrees with the model it came from
├── ServerError            a model server that does not answer, or answers wrong
├── ClusterError           machines that cannot be reached, or workers that die again and again
├── TrainingError          a run that cannot go on (a loss that is not a number)
└── StorageError           no permission, no space left
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ClassifierError(Exception):
    """A failure the user can mend: `fact` says what is wrong, `hint` what to do about it."""

    def __init__(self, fact: str, hint: str = "") -> None:
        super().__init__(fact, hint)
        self.fact, self.hint = fact, hint

    def __str__(self) -> str:
        text = f"{self.fact}: {self.hint}" if self.hint else self.fact
        return " ".join(text.split())


class ConfigError(ClassifierError):
    """A key, a value or an option that cannot be."""


class DataError(ClassifierError):
    """A folder or a manifest that cannot be trained on."""


class UnreadableImage(DataError):
    """One file that is not the picture it claims to be."""

    def __init__(self, path: str | Path, reason: str, hint: str = "") -> None:
        super().__init__(f"cannot read the image {os.fspath(path)!r} ({reason})", hint)
        self.path, self.reason = os.fspath(path), reason

    def __reduce__(self) -> tuple[type[UnreadableImage], tuple[str, str, str]]:
        return UnreadableImage, (self.path, self.reason, self.hint)  # crosses worker processes


class SourceError(DataError):
    """A data set that cannot be fetched, found or unpacked."""


class CheckpointError(ClassifierError):
    """A checkpoint or bundle that is missing, ambiguous or damaged."""


class ParityError(ClassifierError):
    """An export that disagrees with the model it came from."""


class ServerError(ClassifierError):
    """A model server that does not answer, or answers wrong."""


class ClusterError(ClassifierError):
    """Machines that cannot be reached, or workers that die again and again."""


class TrainingError(ClassifierError):
    """A run that cannot go on."""


class StorageError(ClassifierError):
    """No permission, or no space left."""


@contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(
                f"no space left while writing {os.fspath(path)!r}", "free some space and run the same command again"
            ) from error
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise StorageError(
                f"{os.fspath(path)!r} cannot be made: a file is in the way", "move it or choose another folder"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"no permission to write {os.fspath(path)!r}", "change the owner or choose another folder"
            ) from error
        own = str(error.filename or "").startswith(
            os.fspath(Path(path).parent)
        )  # a file missing elsewhere is a bug and must be seen
        if own and error.errno in (errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.EIO):
            raise StorageError(
                f"cannot write {os.fspath(path)!r} ({error.strerror})", "choose another place"
            ) from error
        raise
