"""Where a served model comes from: a bundle or a file on disk, or MLflow's registry, where an alias may point to another version tomorrow."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from image_classifier.bundle import INFO_NAME
from image_classifier.errors import CheckpointError, ConfigError, storage_errors
from image_classifier.inference.load import pulled_checkpoint
from image_classifier.program import program

_REGISTERED = re.compile(r"models:/([^/@:\s]+)[@/]([^/@:\s]+)")
_UNFINISHED = "download-"
_DAY_S = 86_400
_INSIDE = Path("artifacts/bundle")  # of a model of MLflow


class ModelSource(Protocol):
    """Where one model comes from."""

    @property
    def name(self) -> str:
        """What the model is called where it is given no other name."""
        ...

    def find(self) -> Path:
        """The bundle or the file as it is now."""
        ...


@dataclass(frozen=True)
class LocalModel:
    """A bundle or a file, by its name under `models_dir` or its path."""

    given: str
    models_dir: Path
    dvc: bool | None

    @property
    def name(self) -> str:
        """That of the folder, or of the file without its ending; of a link its own, wherever it leads."""
        path = Path(os.path.abspath(self._found()))
        return path.name if path.is_dir() else path.stem

    def find(self) -> Path:
        """Errors as `pulled_checkpoint`."""
        return self._found().resolve()

    def _found(self) -> Path:
        return pulled_checkpoint(self.given, self.models_dir, self.dvc)


@dataclass(frozen=True)
class RegisteredModel:
    """A registered model and an alias of it, or a version's number."""

    name: str
    alias: str
    tracking_uri: str
    cache: Path

    def find(self) -> Path:
        """The bundle of that version, downloaded once.

        Raises:
            ConfigError: The registry does not answer, or has no such model; or nothing here can ask it.
            CheckpointError: It is no model that `promote` registered.
        """
        if find_spec("mlflow") is None:
            fact = f"models:/{self.name}@{self.alias} needs the package mlflow, which is not installed here"
            raise ConfigError(
                fact,
                "pip install mlflow, or download the bundle elsewhere and name its folder (docs/deployment.md, An alias)",
            )
        from image_classifier.mlflow_tracking import download, registered_version

        _, source = registered_version(self.tracking_uri, self.name, self.alias)
        place = (
            self.cache / hashlib.sha256(source.encode()).hexdigest()[:32]
        )  # where it lies names the run that wrote it
        if not (place / INFO_NAME).is_file():
            with storage_errors(place):
                self.cache.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=self.cache) as folder:
                    self._clear(Path(folder).stat().st_mtime)
                    bundle = download(self.tracking_uri, source, Path(folder)) / _INSIDE
                    if not (bundle / INFO_NAME).is_file():
                        raise CheckpointError(
                            f"{self.name}@{self.alias} holds no bundle", f"register one: {program()} promote NAME"
                        )
                    shutil.rmtree(place, ignore_errors=True)
                    os.rename(bundle, place)
        return place

    def _clear(self, now: float) -> None:
        """Remove downloads that a program left when it was ended in the middle of one."""
        for folder in self.cache.glob(f"{_UNFINISHED}*"):
            if now - folder.stat().st_mtime > _DAY_S:
                shutil.rmtree(folder, ignore_errors=True)


def model_source(where: str, models_dir: Path, dvc: bool | None, tracking_uri: str) -> ModelSource:
    """The place that `models:/NAME@ALIAS`, a name or a path means."""
    if not where.startswith("models:/"):
        return LocalModel(where, models_dir, dvc)
    parts = _REGISTERED.fullmatch(where)
    if parts is None:
        raise ConfigError(f"{where!r} names no registered model", "write models:/NAME@ALIAS, or models:/NAME/VERSION")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return RegisteredModel(parts[1], parts[2], tracking_uri, base / "image_classifier" / "registry")
