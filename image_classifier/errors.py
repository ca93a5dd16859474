"""The errors that users can correct, as one tree; each ends as one line on the terminal and exit code 2.

ClassifierError
├── ConfigError            an unknown or invalid key, value or option
├── DataError              a folder, a manifest or a table that cannot be used
│   ├── UnreadableImage    a file that is damaged or no image
│   └── SourceError        a data set that cannot be downloaded, found or unpacked
├── CheckpointError        a checkpoint or bundle that is missing, ambiguous or damaged
├── ParityError            an export whose answers differ from its checkpoint's
├── ServerError            a model server that does not answer, or answers wrongly
├── ClusterError           machines that cannot be reached, or workers that keep dying
├── TrainingError          a run that cannot continue (a loss that is not a number)
└── StorageError           no permission, no space left
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ClassifierError(Exception):
    """A failure that the user can correct: `fact` is what is wrong, `hint` what to do.

    >>> print(ConfigError("invalid port 70000", "expected 0 to 65535"))
    invalid port 70000: expected 0 to 65535
    """

    def __init__(self, fact: str, hint: str = "") -> None:
        super().__init__(fact, hint)
        self.fact, self.hint = fact, hint

    def __str__(self) -> str:
        text = f"{self.fact}: {self.hint}" if self.hint else self.fact
        return " ".join(text.split())


class ConfigError(ClassifierError):
    """An unknown or invalid key, value or option."""


class DataError(ClassifierError):
    """A folder, a manifest or a table that cannot be used."""


class UnreadableImage(DataError):
    """A file that is damaged or no image."""

    def __init__(self, path: str | Path, reason: str, hint: str = "") -> None:
        super().__init__(f"cannot read the image {os.fspath(path)!r} ({reason})", hint)
        self.path, self.reason = os.fspath(path), reason

    def __reduce__(self) -> tuple[type[UnreadableImage], tuple[str, str, str]]:
        return UnreadableImage, (self.path, self.reason, self.hint)  # crosses worker processes


class SourceError(DataError):
    """A data set that cannot be downloaded, found or unpacked."""


class CheckpointError(ClassifierError):
    """A checkpoint or bundle that is missing, ambiguous or damaged."""


class ParityError(ClassifierError):
    """An export whose answers differ from its checkpoint's."""


class ServerError(ClassifierError):
    """A model server that does not answer, or answers wrongly."""


class ClusterError(ClassifierError):
    """Machines that cannot be reached, or workers that keep dying."""


class TrainingError(ClassifierError):
    """A run that cannot continue."""


class StorageError(ClassifierError):
    """No permission, or no space left."""


@contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into a StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(
                f"no space left while writing {os.fspath(path)!r}", "free some space and run the same command again"
            ) from error
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise StorageError(
                f"cannot create {os.fspath(path)!r}: a file has that name", "move it or choose another folder"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"no permission to write {os.fspath(path)!r}", "change the owner or choose another folder"
            ) from error
        # A file that is missing elsewhere is a bug, whose traceback must be seen.
        is_here = str(error.filename or "").startswith(os.fspath(Path(path).parent))
        if is_here and error.errno in (errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.EIO):
            raise StorageError(f"cannot write {os.fspath(path)!r} ({error.strerror})", "choose another path") from error
        raise
