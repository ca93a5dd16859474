"""Engines that were built here. One is native code for one GPU: none is ever read from a bundle, or from a folder that others may write."""

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

PLACE = ".cache/image_classifier/tensorrt"  # in the home folder: the current one may be a stranger's


@dataclass(frozen=True)
class EngineCache:
    """Where an engine is kept, and what it is the engine of: model, precision, batch, GPU, driver and version."""

    folder: Path
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, model: Path, asked: EngineSettings) -> EngineCache:
        """The place of a model's engine for this GPU.

        Raises:
            ConfigError: TensorRT or a GPU is missing.
        """
        version, gpu = package().__version__, this_gpu()
        return cls(
            Path.home() / PLACE, {"model_sha256": sha256_of(model), **asdict(asked), **asdict(gpu), "tensorrt": version}
        )

    def read(self) -> bytes | None:
        """The engine, under the lock; None where it is not there, or is not what was written."""
        if not self.is_there:
            return None
        try:
            plan = self._path("engine").read_bytes()
            note = json.loads(self._path("json").read_bytes())
        except (OSError, ValueError) as error:
            log.warning("an engine of TensorRT cannot be read and is built anew (%s)", error)
            return None
        if note != self._note(plan):
            log.warning("an engine of TensorRT is damaged and is built anew (%s)", self._path("engine"))
            return None
        return plan

    @property
    def is_there(self) -> bool:
        """Whether an engine was written."""
        return self._path("json").is_file()

    def write(self, plan: bytes) -> None:
        """Keep an engine; StorageError where the disk refuses."""
        write_bytes(self._path("engine"), plan)
        write_text(self._path("json"), json.dumps(self._note(plan), indent=2) + "\n")  # last: what it tells of is there

    def forget(self) -> None:
        """Remove the engine."""
        for kind in ("json", "engine"):
            self._path(kind).unlink(missing_ok=True)

    def locked(self) -> AbstractContextManager[None]:
        """One process at a time reads or builds this engine; StorageError where others may write there, or this user may not."""
        _make_private(self.folder)
        return file_lock(self._path("lock"))

    def _note(self, plan: bytes) -> dict[str, Any]:
        return {**self.facts, "sha256": hashlib.sha256(plan).hexdigest()}

    def _path(self, kind: str) -> Path:
        key = hashlib.sha256(json.dumps(dict(self.facts), sort_keys=True).encode()).hexdigest()
        return self.folder / f"{key[:32]}.{kind}"


def _make_private(folder: Path) -> None:
    """Make a folder that this user alone may write; StorageError where others may."""
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o022):
        raise StorageError(
            f"others may write into {str(folder)!r}, and an engine is code",
            "make it yours alone: chmod 700, or remove it",
        )
