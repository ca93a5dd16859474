"""The predictions that a name on the command line of `report` means, and the bundle they belong to."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from image_classifier.bundle import INFO_NAME, BundleInfo, find_checkpoint, read_bundle
from image_classifier.errors import CheckpointError, DataError
from image_classifier.images import DecodeLimits
from image_classifier.manifest import SPLITS, Manifest
from image_classifier.pillow_decoding import MAX_PIXELS
from image_classifier.predictions import PredictionTable
from image_classifier.program import program

PREDICTIONS = "predictions.csv"

_NO_LIMITS = DecodeLimits(max_bytes=2**31 - 1, max_pixels=MAX_PIXELS)


@dataclass(frozen=True)
class EvaluatedRun:
    """The predictions for one split, and where they come from.

    Args:
        name: Heading: the bundle's name, or the last two folders of the path.
        directory: Folder of predictions.csv and logits.npy.
        table: The predictions.
        root: Folder that the paths start from, None where it is unknown.
        bundle: Folder of the bundle, or None.
        info: Content of its bundle.json, or None.
    """

    name: str
    directory: Path
    table: PredictionTable
    root: Path | None
    bundle: Path | None = None
    info: BundleInfo | None = None

    @property
    def split(self) -> str:
        """The split that was evaluated: the folder's name."""
        return self.directory.name

    @property
    def run(self) -> str:
        """The name of the run."""
        return self.bundle.name if self.bundle else self.directory.parent.name


def find_evaluated(
    name: str, split: str | None, models_dir: Path, plots_dir: Path, data_dir: Path | None = None
) -> EvaluatedRun:
    """Find the predictions of a folder that holds them, of a bundle, or of a folder under plots/.

    Without a split it is that of `evaluated_split`. `data_dir` overrules the folder of the images.

    Raises:
        CheckpointError: Nothing has that name.
        DataError: The predictions are missing or damaged.
    """
    folder = Path(name).expanduser()
    if (folder / PREDICTIONS).is_file():
        return _in_folder(folder.resolve(), models_dir, data_dir)
    bundle, run = _bundle(name, models_dir, plots_dir)
    chosen = split or evaluated_split(plots_dir / run)
    if chosen is None or not (plots_dir / run / chosen / PREDICTIONS).is_file():
        raise _no_predictions(run, chosen, _splits_of(bundle))
    return _read(run, plots_dir / run / chosen, bundle, data_dir)


def evaluated_split(folder: Path) -> str | None:
    """Return the split that a report of plots/NAME shows: test, else val, else train; None without predictions."""
    return next((split for split in reversed(SPLITS) if (folder / split / PREDICTIONS).is_file()), None)


def _no_predictions(run: str, wanted: str | None, splits: Sequence[str]) -> DataError:
    split = wanted or next(split for split in reversed(SPLITS) if split in splits)
    command = f"run `{program()} test --checkpoint_name {shlex.quote(run)} --split {split}`"
    hint = command if split in splits else f"its data has no {split} split, only {', '.join(splits)}"
    return DataError(f"{run!r} has no predictions for its {split} split", hint)


def _splits_of(bundle: Path | None) -> Sequence[str]:
    """Return the splits of a bundle's manifest; all splits without a manifest."""
    if bundle is None or not (bundle / "manifest.csv").is_file():
        return SPLITS
    manifest = Manifest.read(bundle / "manifest.csv", Path())
    return [split for split in SPLITS if len(manifest.indices(split))]


def _bundle(name: str, models_dir: Path, plots_dir: Path) -> tuple[Path | None, str]:
    """Return the bundle's folder, None where only its figures are left, and the run's name."""
    try:
        path = find_checkpoint(name, models_dir)
    except CheckpointError:
        if evaluated_split(plots_dir / name):
            return None, name
        if Path(name).is_dir():
            hint = "give a bundle, or a folder that `test` or `train` wrote predictions to"
            raise DataError(f"{name!r} holds no {PREDICTIONS}", hint) from None
        raise
    return (path, path.name) if path.is_dir() else (None, path.stem)


def _in_folder(folder: Path, models_dir: Path, data_dir: Path | None) -> EvaluatedRun:
    """Return the predictions in a folder; plots/NAME/SPLIT belongs to the bundle NAME if there is one."""
    candidate = models_dir / folder.parent.name
    bundle = candidate if folder.name in SPLITS and (candidate / INFO_NAME).is_file() else None
    return _read(f"{folder.parent.name}/{folder.name}", folder, bundle, data_dir)


def _read(name: str, directory: Path, bundle: Path | None, data_dir: Path | None) -> EvaluatedRun:
    info = read_bundle(bundle).info if bundle else None
    known = str(info.provenance.get("data_root", "")) if info else ""
    root = data_dir or (Path(known) if known else None)
    return EvaluatedRun(name, directory, PredictionTable.read(directory), root, bundle, info)


def limits_of(info: BundleInfo | None) -> DecodeLimits:
    """Return the limits for decoding images: those of the training, or the widest where no bundle holds them."""
    config = info.provenance.get("config") if info else None
    known = ((config or {}).get("data") or {}).get("limits")
    return DecodeLimits(**known) if known else _NO_LIMITS
