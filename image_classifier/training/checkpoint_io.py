"""Checkpoints that a kill, a full disk or a power cut cannot damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
        with whole_file(Path(path)) as file:
            torch.save(checkpoint, file)
