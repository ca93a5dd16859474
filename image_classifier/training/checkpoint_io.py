"""Checkpoints that a kill, a full disk or a power cut cannot damage, and how to find the newest readable one."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from image_classifier.atomic_io import atomic_file
from image_classifier.errors import CheckpointError, storage_errors

log = logging.getLogger(__name__)

LAST, BEST = "last.ckpt", "best.ckpt"


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file in the same folder, flushes it to the disk, then renames it over the old checkpoint.

    Lightning 2.6 writes through the temporary folder: on another file system a kill there destroys the old checkpoint
    (pytorch-lightning#21253), and a refused write is ignored (pytorch-lightning#21800).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint.

        Raises:
            StorageError: The disk refuses; the old checkpoint is untouched.
        """
        save_whole(checkpoint, Path(path))


def save_whole(content: dict[str, Any], path: Path) -> None:
    """Write a file as `torch.save` does, completely or not at all.

    Raises:
        StorageError: The disk refuses.
    """
    with atomic_file(path) as file:
        watched = _Watched(file)
        try:
            torch.save(content, cast(IO[bytes], watched))
        except RuntimeError as error:
            raise watched.refusal or error from None  # torch replaces the error of a full disk by one of its own


class _Watched(io.RawIOBase):
    """A file that remembers why it could not be written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.refusal: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.refusal = error
            raise

    def flush(self) -> None:
        if not self.file.closed:
            self.file.flush()


def step_path(directory: Path, step: int) -> Path:
    """Return the path of an optimizer step's checkpoint.

    >>> step_path(Path("checkpoints"), 120).name
    'step-000000120.ckpt'
    """
    return directory / f"step-{step:09d}.ckpt"


def steps(directory: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints by step, the newest first."""
    matches = ((re.fullmatch(r"step-(\d+)\.ckpt", path.name), path) for path in directory.glob("step-*.ckpt"))
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def make_last(newest: Path, keep: int) -> None:
    """Let `last.ckpt` be the same file as `newest`, and remove all but the newest `keep` checkpoints by step.

    Raises:
        StorageError: The disk refuses.
    """
    directory = newest.parent
    part = directory / f".{LAST}.{os.getpid()}.part"
    with storage_errors(newest):
        part.unlink(missing_ok=True)
        try:
            os.link(newest, part)
        except OSError:  # a file system without hard links
            with newest.open("rb") as source, atomic_file(directory / LAST) as copy:
                shutil.copyfileobj(source, copy)
        else:
            os.replace(part, directory / LAST)
        for _, path in steps(directory)[keep:]:
            path.unlink(missing_ok=True)


def go_back_to(path: Path, step: int) -> None:
    """Remove the checkpoints after the one that a run resumes; also `last.ckpt` where it is none of those left."""
    directory = path.parent
    last = directory / LAST
    for other, later in steps(directory):
        if other > step:
            log.warning("%s is from a later step and is removed", later)
            later.unlink(missing_ok=True)
    if last.exists() and path != last and not any(last.samefile(kept) for _, kept in steps(directory)):
        last.unlink()
    best = directory / BEST
    if best.exists() and path != best and read_part(best, "global_step") > step:
        log.warning("%s is from a later step and is removed", best)
        best.unlink()


def sweep(directory: Path) -> None:
    """Remove the temporary files of killed writers from a run folder; the caller holds its lock."""
    for folder in (directory, directory / "checkpoints"):
        for path in folder.glob(".*.part"):
            path.unlink(missing_ok=True)


def newest_readable(directory: Path) -> Path | None:
    """Return the newest undamaged checkpoint of a folder, None where it has none; the log names damaged ones.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
    """
    by_step = [path for _, path in steps(directory)]
    last = directory / LAST
    linked = any(last.exists() and last.samefile(path) for path in by_step)
    order = [path for path in (*by_step, *([] if linked else [last]), directory / BEST) if path.exists()]
    for path in order:
        reason = damage(path)
        if not reason:
            return path
        log.warning("the checkpoint %s%s is damaged (%s): using the one before", path, _also_last(path, last), reason)
    if order:
        raise CheckpointError(f"every checkpoint in {str(directory)!r} is damaged", "start again with overwrite=true")
    return None


def _also_last(path: Path, last: Path) -> str:
    return f" ({LAST})" if last.exists() and path != last and last.samefile(path) else ""


def damage(path: Path) -> str:
    """Return why a checkpoint cannot be read, or nothing; the checksum of every part of the file is compared."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return f"its part {broken} has changed" if broken else ""


def read_part(path: Path, key: str) -> Any:
    """Return one entry of a checkpoint, without reading the weights.

    Raises:
        CheckpointError: The file or the entry is missing.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch and pickle raise many types for a file that is not a checkpoint
        raise CheckpointError(
            f"{str(path)!r} cannot be read as a checkpoint ({' '.join(str(error).split())[:200]})"
        ) from error
    if not isinstance(content, dict) or key not in content:
        raise CheckpointError(
            f"{str(path)!r} is not a checkpoint to resume from", "give a run folder, or a .ckpt in its checkpoints/"
        )
    return content[key]
