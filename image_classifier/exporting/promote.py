"""Promotion of a bundle: a last check, a new version in MLflow's registry, and an alias that points to it."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from image_classifier.atomic_io import link_or_copy
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.exporting.mlflow_model import NAME as FOLDER
from image_classifier.inference.model_reference import CheckpointReference
from image_classifier.inference.verify import verify_backend
from image_classifier.mlflow_tracking import register
from image_classifier.program import program


@dataclass(frozen=True, kw_only=True)
class PromoteSettings(CheckpointReference):
    """The keys of conf/promote.yaml."""

    alias: str = "champion"
    tracking_uri: str = "sqlite:///mlflow.db"
    registered_name: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", self.alias):
            raise ConfigError(
                f"invalid alias {self.alias!r}: expected lower-case letters, digits, - and _, such as champion"
            )
        if self.registered_name is not None and re.search(r"[/:\s]|^$", self.registered_name):
            raise ConfigError(
                f"invalid registered_name {self.registered_name!r}: "
                "MLflow's names are not empty and have no slash, colon or space"
            )


@dataclass(frozen=True)
class Promotion:
    """A version in MLflow's registry, and the alias that points to it."""

    name: str
    version: str
    alias: str
    tracking_uri: str


def promote(settings: PromoteSettings) -> Promotion:
    """Verify the bundle, register its MLflow model, and set the alias.

    Raises:
        CheckpointError: A file is damaged, or the bundle has no MLflow model.
        ParityError: The ONNX model answers the golden images differently from the checkpoint.
    """
    bundle = settings.bundle()
    verify_backend(bundle, "onnx")
    bundle_name = bundle.directory.resolve().name
    files = bundle.info.exports.get("mlflow", {}).get("files")
    if not files:
        raise CheckpointError(
            f"{bundle_name!r} has no MLflow model",
            f"write it first: {program()} export {bundle.directory} --to mlflow",
        )
    name = settings.registered_name or re.sub(r"[/:\s]+", "-", bundle_name)
    tags = {
        "classes": str(len(bundle.info.classes)),
        "manifest_sha256": str(bundle.info.provenance.get("manifest_sha256")),
    }
    scores = {
        f"{split}/{metric}": float(value)
        for split, values in bundle.info.metrics.items()
        for metric, value in values.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        # Only the exported files: whoever serves the model runs what lies in its folder.
        for file in files:
            link_or_copy(bundle.directory / file, Path(folder, file))
        version = register(settings.tracking_uri, Path(folder, FOLDER), name, settings.alias, tags, scores)
    return Promotion(name, str(version), settings.alias, settings.tracking_uri)
