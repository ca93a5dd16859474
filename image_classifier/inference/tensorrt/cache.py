"""The cache of engines built on this machine.

An engine is native code for one GPU: none is ever read from a bundle, or from a folder that other users may write.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from image_classifier.atomic_io import file_lock, write_bytes, write_text
from image_classifier.bundle import sha256_of
from image_classifier.errors import StorageError, storage_errors
from image_classifier.inference.tensorrt.cuda import this_gpu
from image_classifier.inference.tensorrt.engine import EngineSettings, package

log = logging.getLogger(__name__)

PLACE = ".cache/image_classifier/tensorrt"  # in the home folder: the current folder may be another user's


@dataclass(frozen=True)
class EngineCache:
    """The files of one engine, and their key: model, precision, batch size, GPU, driver and version."""

    folder: Path
    key: Mapping[str, Any]

    @classmethod
    def of(cls, model: Path, settings: EngineSettings) -> EngineCache:
        """Return the entry for a model on this GPU.

        Raises:
            ConfigError: TensorRT or a GPU is missing.
        """
        version = package().__version__
        key = {"model_sha256": sha256_of(model), **asdict(settings), **asdict(this_gpu()), "tensorrt": version}
        return cls(Path.home() / PLACE, key)

    def read(self) -> bytes | None:
        """Return the engine; None where there is none, or it is damaged. Call it under the lock."""
        if not self.exists:
            return None
        try:
            plan = self._path("engine").read_bytes()
            note = json.loads(self._path("json").read_bytes())
        except (OSError, ValueError) as error:
            log.warning("a TensorRT engine cannot be read and is built again (%s)", error)
            return None
        if note != self._note(plan):
            log.warning("a TensorRT engine is damaged and is built again (%s)", self._path("engine"))
            return None
        return plan

    @property
    def exists(self) -> bool:
        """True where an engine was written."""
        return self._path("json").is_file()

    def write(self, plan: bytes) -> None:
        """Write an engine; StorageError where the disk refuses."""
        write_bytes(self._path("engine"), plan)
        write_text(self._path("json"), json.dumps(self._note(plan), indent=2) + "\n")  # last, so that its engine exists

    def remove(self) -> None:
        """Remove the engine."""
        for kind in ("json", "engine"):
            self._path(kind).unlink(missing_ok=True)

    def locked(self) -> AbstractContextManager[None]:
        """Return a lock: one process at a time reads or builds this engine.

        Raises:
            StorageError: Other users may write to the folder, or this one may not.
        """
        _make_private(self.folder)
        return file_lock(self._path("lock"))

    def _note(self, plan: bytes) -> dict[str, Any]:
        return {**self.key, "sha256": hashlib.sha256(plan).hexdigest()}

    def _path(self, kind: str) -> Path:
        digest = hashlib.sha256(json.dumps(dict(self.key), sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.{kind}"


def _make_private(folder: Path) -> None:
    """Make a folder that only this user may write to; StorageError where others may."""
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o022):
        raise StorageError(
            f"other users may write to {str(folder)!r}, and an engine is code",
            "chmod 700 it, or remove it",
        )
