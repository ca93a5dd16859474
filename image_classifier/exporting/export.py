"""Export of a bundle's model to other forms, each compared with the checkpoint before it is kept."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from image_classifier.atomic_io import atomic_directory, file_lock, link_or_copy
from image_classifier.bundle import Bundle, add_export, read_bundle
from image_classifier.errors import ConfigError, ParityError
from image_classifier.exporting.int8 import Int8Settings, export_int8
from image_classifier.exporting.mlflow_model import export_mlflow
from image_classifier.exporting.onnx import re_export
from image_classifier.exporting.openvino import export_openvino
from image_classifier.exporting.parity_data import ParitySet
from image_classifier.exporting.sealed import export_sealed
from image_classifier.exporting.tensorrt import export_tensorrt
from image_classifier.exporting.triton import TritonSettings, export_triton
from image_classifier.images import DecodeLimits
from image_classifier.inference.backends import is_exported
from image_classifier.inference.model_reference import CheckpointReference
from image_classifier.inference.tensorrt.engine import EngineSettings, require

FORMATS = ("onnx", "sealed", "int8", "openvino", "tensorrt", "mlflow", "triton")

# Writes a form of the model into a folder; bundle.json keeps the metadata it returns under the name of the form.
Export = Callable[[ParitySet, Path], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ExportSettings(CheckpointReference):
    """The keys of conf/export.yaml."""

    to: list[str]
    data_dir: str | None = None
    images: int = 200
    int8: Int8Settings = field(default_factory=Int8Settings)
    tensorrt: EngineSettings = field(default_factory=EngineSettings)
    triton: TritonSettings = field(default_factory=TritonSettings)
    limits: DecodeLimits = field(default_factory=DecodeLimits)

    def __post_init__(self) -> None:
        for name in self.to:
            if name not in FORMATS:
                raise ConfigError(f"there is no format {name!r}", f"use one or more of {', '.join(FORMATS)}")
        if self.images < 1:
            raise ConfigError(f"images must be at least 1, not {self.images}")

    def parity_set(self, bundle: Bundle) -> ParitySet:
        """Return the images on which the bundle's exports are compared with the checkpoint."""
        root = Path(self.data_dir) if self.data_dir else None
        return ParitySet.of(bundle, root, self.images, self.trusted_packages, self.limits, self.dvc)

    def writer(self, name: str) -> Export:
        """Return the function that writes the form of this name."""
        writers: dict[str, Export] = {
            "onnx": re_export,
            "sealed": export_sealed,
            "int8": partial(export_int8, settings=self.int8),
            "openvino": export_openvino,
            "tensorrt": partial(export_tensorrt, settings=self.tensorrt),
            "mlflow": export_mlflow,
            "triton": partial(export_triton, settings=self.triton),
        }
        return writers[name]


@dataclass(frozen=True)
class ExportResult:
    """A form of the model that was written, and its metadata in bundle.json."""

    form: str
    metadata: dict[str, Any]


def export(
    settings: ExportSettings, on_written: Callable[[ExportResult], None] = lambda result: None
) -> list[ExportResult]:
    """Write the requested forms into the bundle, one after the other, and return the metadata of each.

    Each form appears completely or not at all; for one that is refused bundle.json keeps the reason. `on_written` is
    called after each form, as one can take minutes.

    Raises:
        ConfigError: A package or a GPU that a form needs is missing.
        ParityError: A form answers differently from the checkpoint; the forms before it are kept.
    """
    path = settings.bundle().directory.resolve()
    if "tensorrt" in settings.to:
        require()  # before other forms are made
    results: list[ExportResult] = []
    parity_set = None
    with file_lock(path.parent / f".{path.name[:50]}.lock", remove=True):
        for name in dict.fromkeys(settings.to):
            bundle = read_bundle(path)
            bundle.verify()
            parity_set = parity_set or settings.parity_set(bundle)
            parity_set.bundle = bundle  # with the forms written so far; images and answers are computed once
            try:
                result = ExportResult(name, _added(bundle, name, settings.writer(name), parity_set))
            except ParityError as error:
                if not is_exported(bundle, name):
                    add_export(path, bundle.info, name, {"refused": error.fact}, [])
                raise
            results.append(result)
            on_written(result)
    return results


def _added(bundle: Bundle, name: str, write: Export, parity_set: ParitySet) -> dict[str, Any]:
    """Add a form to the bundle and return its metadata.

    A new folder replaces the old one and shares its other files.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder)
        metadata = write(parity_set, written)
        files = list(_files(written))
        with atomic_directory(bundle.directory, overwrite=True) as fresh:
            for file in _kept(bundle, name):
                link_or_copy(bundle.directory / file, fresh / file)  # a bundle's file is never written to again
            for file in files:
                (fresh / file).parent.mkdir(parents=True, exist_ok=True)
                (fresh / file).unlink(missing_ok=True)
                shutil.copyfile(written / file, fresh / file)
            add_export(fresh, bundle.info, name, metadata, sorted(file.as_posix() for file in files))
    return metadata


def _kept(bundle: Bundle, name: str) -> list[Path]:
    """Return the bundle's files except those of the form `name`.

    From the folders of forms only exported files are kept, as servers run what lies there.
    """
    former = set(bundle.info.exports.get(name, {}).get("files", ()))
    listed = set(bundle.info.files) - former
    others = (file for file in _files(bundle.directory) if file.as_posix() not in former)
    return [file for file in others if file.as_posix() in listed or file.parts[0] not in FORMATS]


def _files(directory: Path) -> Iterator[Path]:
    return (path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file())
