"""Where a served model comes from: a bundle or file on disk, or an alias in MLflow's registry."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from image_classifier.bundle import INFO_NAME
from image_classifier.errors import CheckpointError, ConfigError, storage_errors
from image_classifier.inference.load import pulled_checkpoint
from image_classifier.program import program
from image_classifier.serving.worker.spec import served_name

_REGISTERED = re.compile(r"models:/([^/@:\s]+)[@/]([^/@:\s]+)")
_UNFINISHED = "download-"
_DAY_S = 86_400
_BUNDLE_IN_MODEL = Path("artifacts/bundle")  # inside the MLflow model that `promote` registers


class ModelSource(Protocol):
    """Finds one model."""

    @property
    def name(self) -> str:
        """The model's name where the configuration gives no other."""
        ...

    def find(self) -> Path:
        """Return the current path of the bundle or file."""
        ...


@dataclass(frozen=True)
class LocalModel:
    """A bundle or a file, given by its name under `models_dir` or by its path."""

    given: str
    models_dir: Path
    dvc: bool | None

    @property
    def name(self) -> str:
        """The name of the folder, or of the file without its suffix. A link keeps its own name."""
        path = Path(os.path.abspath(self._pull()))
        return path.name if path.is_dir() else path.stem

    def find(self) -> Path:
        """Return the path with links resolved; raises what `pulled_checkpoint` raises."""
        return self._pull().resolve()

    def _pull(self) -> Path:
        return pulled_checkpoint(self.given, self.models_dir, self.dvc)


@dataclass(frozen=True)
class RegisteredModel:
    """A model in MLflow's registry, by an alias or a version number."""

    name: str
    alias: str
    tracking_uri: str
    cache: Path

    def find(self) -> Path:
        """Return the bundle of the alias's version; download it the first time.

        Raises:
            ConfigError: The registry does not answer or has no such model, or mlflow is not installed.
            CheckpointError: The registered model holds no bundle.
        """
        if find_spec("mlflow") is None:
            raise ConfigError(
                f"models:/{self.name}@{self.alias} needs the package mlflow, which is not installed here",
                "pip install mlflow, or download the bundle elsewhere and name its folder "
                "(docs/deployment.md, An alias)",
            )
        from image_classifier.mlflow_tracking import download, registered_version

        _, source = registered_version(self.tracking_uri, self.name, self.alias)
        # The source names the run that wrote the version, so each version has a folder of its own.
        path = self.cache / hashlib.sha256(source.encode()).hexdigest()[:32]
        if (path / INFO_NAME).is_file():
            return path
        with storage_errors(path):
            self.cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=self.cache) as folder:
                self._remove_unfinished(Path(folder).stat().st_mtime)
                bundle = download(self.tracking_uri, source, Path(folder)) / _BUNDLE_IN_MODEL
                if not (bundle / INFO_NAME).is_file():
                    raise CheckpointError(
                        f"{self.name}@{self.alias} holds no bundle", f"register one: {program()} promote NAME"
                    )
                shutil.rmtree(path, ignore_errors=True)
                os.rename(bundle, path)
        return path

    def _remove_unfinished(self, now: float) -> None:
        """Remove downloads that were interrupted more than a day ago."""
        for folder in self.cache.glob(f"{_UNFINISHED}*"):
            if now - folder.stat().st_mtime > _DAY_S:
                shutil.rmtree(folder, ignore_errors=True)


def model_source(checkpoint: str, models_dir: Path, dvc: bool | None, tracking_uri: str) -> ModelSource:
    """Return the source of `models:/NAME@ALIAS`, of a name or of a path."""
    if not checkpoint.startswith("models:/"):
        return LocalModel(checkpoint, models_dir, dvc)
    parts = _REGISTERED.fullmatch(checkpoint)
    if parts is None:
        raise ConfigError(
            f"{checkpoint!r} is not a registered model", "write models:/NAME@ALIAS, or models:/NAME/VERSION"
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return RegisteredModel(parts[1], parts[2], tracking_uri, cache / "image_classifier" / "registry")


def by_served_name(sources: Iterable[tuple[str, ModelSource]]) -> dict[str, ModelSource]:
    """Return the sources by the name in requests: the given one, or the source's own where that is empty.

    Raises:
        ConfigError: Two models have the same name.
    """
    named: dict[str, ModelSource] = {}
    for given, source in sources:
        name = served_name(given or source.name)
        if name in named:
            raise ConfigError(
                f"two models would be served as {name!r}", "give the other its own name: models.NAME=CHECKPOINT"
            )
        named[name] = source
    return named
