"""The verb `export`: other forms of a bundle's model, each held against the checkpoint before it may stay."""

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
from image_classifier.cli import hydra_app
from image_classifier.errors import ConfigError, ParityError
from image_classifier.exporting.int8 import Int8Settings, export_int8
from image_classifier.exporting.mlflow_model import export_mlflow
from image_classifier.exporting.onnx_again import re_export
from image_classifier.exporting.openvino import export_openvino
from image_classifier.exporting.parity_data import ParitySet
from image_classifier.exporting.sealed import export_sealed
from image_classifier.exporting.tensorrt import export_tensorrt
from image_classifier.exporting.triton import TritonSettings, export_triton
from image_classifier.images import DecodeLimits
from image_classifier.inference.backends import exported
from image_classifier.inference.load import pulled_bundle
from image_classifier.inference.tensorrt.engine import EngineSettings, require

FORMATS = ("onnx", "sealed", "int8", "openvino", "tensorrt", "mlflow", "triton")


# Writes a form of the model into a folder; what was found is kept in bundle.json under its name.
Export = Callable[[ParitySet, Path], dict[str, Any]]


@dataclass(frozen=True)
class ExportSettings:
    """The keys of conf/export.yaml."""

    checkpoint_name: str
    to: list[str]
    data_dir: str | None = None
    images: int = 200
    int8: Int8Settings = field(default_factory=Int8Settings)
    tensorrt: EngineSettings = field(default_factory=EngineSettings)
    triton: TritonSettings = field(default_factory=TritonSettings)
    models_dir: str = "models"
    dvc: bool | None = None
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    trusted_packages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in self.to:
            if name not in FORMATS:
                raise ConfigError(f"there is no format {name!r}", f"use one or more of {', '.join(FORMATS)}")
        if self.images < 1:
            raise ConfigError(f"images must be at least 1, not {self.images}")

    def reference(self, bundle: Bundle) -> ParitySet:
        """What the bundle's exports are held against."""
        root = Path(self.data_dir) if self.data_dir else None
        return ParitySet.of(bundle, root, self.images, self.trusted_packages, self.limits, self.dvc)

    def writer(self, name: str) -> Export:
        """What writes the form of this name."""
        writers: dict[str, Export] = {
            "onnx": re_export,
            "sealed": export_sealed,
            "int8": partial(export_int8, asked=self.int8),
            "openvino": export_openvino,
            "tensorrt": partial(export_tensorrt, asked=self.tensorrt),
            "mlflow": export_mlflow,
            "triton": partial(export_triton, asked=self.triton),
        }
        return writers[name]


def export(config: Any) -> None:
    """Write the forms asked for into the bundle, one after the other; each appears whole or not at all, and of one that is refused the reason.

    Raises:
        ConfigError: A package or a GPU that a form needs is missing.
        ParityError: One answers otherwise than the checkpoint; those before it stay.
    """
    asked = hydra_app.typed(ExportSettings, config, "")
    path = pulled_bundle(asked.checkpoint_name, Path(asked.models_dir), asked.dvc).directory.resolve()
    if "tensorrt" in asked.to:
        require()  # before other forms are made
    reference = None
    with file_lock(path.parent / f".{path.name[:50]}.lock", remove=True):
        for name in dict.fromkeys(asked.to):
            bundle = read_bundle(path)
            bundle.verify()
            reference = reference or asked.reference(bundle)
            reference.bundle = bundle  # with the forms before; images and answers stay
            try:
                facts = _added(bundle, name, asked.writer(name), reference)
            except ParityError as error:
                if not exported(bundle, name):
                    add_export(path, bundle.info, name, {"refused": error.fact}, [])
                raise
            print(f"{name:<9} {_line(facts)}")


def _added(bundle: Bundle, name: str, write: Export, reference: ParitySet) -> dict[str, Any]:
    """The bundle with one more form of its model: a new folder in the place of the old, its other files shared with it."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        facts = write(reference, made)
        with atomic_directory(bundle.directory, overwrite=True) as fresh:
            for file in _kept(bundle, name):
                link_or_copy(bundle.directory / file, fresh / file)  # nothing ever writes into a bundle's file
            for file in _files(made):
                (fresh / file).parent.mkdir(parents=True, exist_ok=True)
                (fresh / file).unlink(missing_ok=True)
                shutil.copyfile(made / file, fresh / file)
            add_export(fresh, bundle.info, name, facts, sorted(file.as_posix() for file in _files(made)))
    return facts


def _kept(bundle: Bundle, name: str) -> list[Path]:
    """What the bundle holds beside the form of this name; in the folders of forms only what was exported, as servers run what lies there."""
    former = set(bundle.info.exports.get(name, {}).get("files", ()))
    listed = set(bundle.info.files) - former
    others = (file for file in _files(bundle.directory) if file.as_posix() not in former)
    return [file for file in others if file.as_posix() in listed or file.parts[0] not in FORMATS]


def _files(directory: Path) -> Iterator[Path]:
    return (path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file())


def _line(facts: dict[str, Any]) -> str:
    return (
        f"{facts['agreement']:.2%} of {facts['images']} images get the checkpoint's class, "
        f"largest difference of a probability {facts['largest_difference']:.1e} ({facts['worst_image']})"
    )
