"""What a word of the verb `report` names: the predictions of one part, and, where it is a bundle's, what the bundle knows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_classifier.bundle import INFO_NAME, BundleInfo, find_checkpoint, read_bundle
from image_classifier.errors import CheckpointError, DataError
from image_classifier.predictions import PredictionTable
from image_classifier.records import SPLITS

PREDICTIONS = "predictions.csv"


@dataclass(frozen=True)
class Judged:
    """The predictions of one part and where they lie.

    Args:
        name: For a heading: the bundle's name, or the folder's last two.
        directory: Of predictions.csv and logits.npy.
        table: The predictions.
        root: Folder that the paths start from, or None where nothing says it.
        bundle: The bundle's folder, or None.
        info: What stands in its bundle.json, or None.
    """

    name: str
    directory: Path
    table: PredictionTable
    root: Path | None
    bundle: Path | None = None
    info: BundleInfo | None = None

    @property
    def split(self) -> str:
        """The part that was judged, by the folder's name."""
        return self.directory.name


def find_judged(name: str, split: str, models_dir: Path, plots_dir: Path, data_dir: Path | None = None) -> Judged:
    """The predictions that a name means: a folder that holds them, a bundle, or a folder under plots/; `data_dir` overrules where the images lie.

    Raises:
        CheckpointError: Nothing has that name.
        DataError: The predictions are missing or damaged.
    """
    folder = Path(name).expanduser()
    if (folder / PREDICTIONS).is_file():
        return _in_folder(folder.resolve(), models_dir, data_dir)
    bundle, run = _bundle(name, models_dir, plots_dir)
    directory = plots_dir / run / split
    if not (directory / PREDICTIONS).is_file():
        raise DataError(f"{run!r} has no predictions of its {split} part", f"run `python commands.py test --checkpoint_name {run} --split {split}`")
    return _judged(run, directory, bundle, data_dir)


def _bundle(name: str, models_dir: Path, plots_dir: Path) -> tuple[Path | None, str]:
    """The bundle's folder, None where there are only its figures, and the run's name."""
    try:
        path = find_checkpoint(name, models_dir)
    except CheckpointError:
        if any((plots_dir / name / split / PREDICTIONS).is_file() for split in SPLITS):
            return None, name
        if Path(name).is_dir():
            raise DataError(f"{name!r} holds no {PREDICTIONS}", "give a bundle, or a folder that `test` or `train` wrote predictions to") from None
        raise
    return (path, path.name) if path.is_dir() else (None, path.stem)


def _in_folder(folder: Path, models_dir: Path, data_dir: Path | None) -> Judged:
    """Predictions in a folder; plots/NAME/PART belongs to the bundle NAME where there is one."""
    own = models_dir / folder.parent.name
    bundle = own if folder.name in SPLITS and (own / INFO_NAME).is_file() else None
    return _judged(f"{folder.parent.name}/{folder.name}", folder, bundle, data_dir)


def _judged(name: str, directory: Path, bundle: Path | None, data_dir: Path | None) -> Judged:
    info = read_bundle(bundle).info if bundle else None
    known = str(info.provenance.get("data_root", "")) if info else ""
    return Judged(name, directory, PredictionTable.read(directory), data_dir or (Path(known) if known else None), bundle, info)


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds, {} where there is none; DataError where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {str(path)!r} ({error})", "write it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{str(path)!r} holds no JSON object", "write it again")
    return content
