"""The verb `promote`: after a last check, MLflow's registry gets the bundle's model as a new version, and the alias points to it."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from image_classifier.atomic_io import link_or_copy
from image_classifier.cli import hydra_app
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.exporting.mlflow_model import NAME as FOLDER
from image_classifier.inference.load import pulled_bundle
from image_classifier.inference.verify import verified
from image_classifier.mlflow_tracking import register
from image_classifier.program import program


@dataclass(frozen=True)
class PromoteSettings:
    """The keys of conf/promote.yaml."""

    checkpoint_name: str
    alias: str = "champion"
    tracking_uri: str = "sqlite:///mlflow.db"
    registered_name: str | None = None
    models_dir: str = "models"
    dvc: bool | None = None
    trusted_packages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", self.alias):
            raise ConfigError(f"alias={self.alias!r} cannot be", "use small letters, digits, - and _, such as champion")
        if self.registered_name is not None and re.search(r"[/:\s]|^$", self.registered_name):
            raise ConfigError(
                f"registered_name={self.registered_name!r} cannot be", "MLflow's names have no slash, colon or space"
            )


def promote(config: Any) -> None:
    """Verify the bundle, register it, and set the alias; prints the command that serves it.

    Raises:
        CheckpointError: A file is damaged, or there is no model of MLflow in the bundle.
        ParityError: A backend answers otherwise than the golden images say.
    """
    asked = hydra_app.typed(PromoteSettings, config, "")
    bundle = pulled_bundle(asked.checkpoint_name, Path(asked.models_dir), asked.dvc)
    verified(bundle, ["onnx"])
    called = bundle.directory.resolve().name
    files = bundle.info.exports.get("mlflow", {}).get("files")
    if not files:
        raise CheckpointError(
            f"{called!r} has no model of MLflow",
            f"write it first: {program()} export {bundle.directory} --to mlflow",
        )
    name = asked.registered_name or re.sub(r"[/:\s]+", "-", called)
    about = {
        "classes": str(len(bundle.info.classes)),
        "manifest_sha256": str(bundle.info.provenance.get("manifest_sha256")),
    }
    scores = {
        f"{split}/{metric}": float(value)
        for split, values in bundle.info.metrics.items()
        for metric, value in values.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        for file in files:  # what else lies there would be run by whoever serves the model
            link_or_copy(bundle.directory / file, Path(folder, file))
        version = register(asked.tracking_uri, Path(folder, FOLDER), name, asked.alias, about, scores)
    print(f"promoted  {name} version {version} is @{asked.alias} in {asked.tracking_uri}")
    print(
        f"next      MLFLOW_TRACKING_URI={asked.tracking_uri} mlflow models serve -m models:/{name}@{asked.alias} --env-manager local --port 5001"
    )
