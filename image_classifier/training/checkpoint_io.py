"""Checkpoints that a kill, a full disk or a power cut cannot damage."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from image_classifier.files import whole_file


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes to a sibling in the same folder, flushes it to the disk, then renames it over the old checkpoint.

    Lightning 2.6 writes through the temporary folder: on another file system a kill there destroys the old checkpoint
    (pytorch-lightning#21253), and a refused write is ignored (pytorch-lightning#21800).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint; StorageError where the disk refuses, with the old one untouched."""
        save_whole(checkpoint, Path(path))


def save_whole(content: dict[str, Any], path: Path) -> None:
    """`torch.save`, whole or not at all; StorageError where the disk refuses."""
    with whole_file(path) as file:
        watched = _Watched(file)
        try:
            torch.save(content, cast(IO[bytes], watched))
        except RuntimeError as error:
            raise watched.refusal or error from None  # torch hides a full disk behind an error of its own


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
