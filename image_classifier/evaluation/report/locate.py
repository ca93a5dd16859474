"""What a word of the verb `report` names: the predictions of one part, and, where it is a bundle's, what the bundle knows."""

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

_WIDEST = DecodeLimits(max_bytes=2**31 - 1, max_pixels=MAX_PIXELS)


@dataclass(frozen=True)
class EvaluatedRun:
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


def find_evaluated(
    name: str, split: str | None, models_dir: Path, plots_dir: Path, data_dir: Path | None = None
) -> EvaluatedRun:
    """The predictions that a name means: a folder that holds them, a bundle, or a folder under plots/; `data_dir` overrules where the images lie.

    Without a split it is that of `judged_part`.

    Raises:
        CheckpointError: Nothing has that name.
        DataError: The predictions are missing or damaged.
    """
    folder = Path(name).expanduser()
    if (folder / PREDICTIONS).is_file():
        return _in_folder(folder.resolve(), models_dir, data_dir)
    bundle, run = _bundle(name, models_dir, plots_dir)
    part = split or judged_part(plots_dir / run)
    if part is None or not (plots_dir / run / part / PREDICTIONS).is_file():
        raise _not_judged(run, part, _parts_of(bundle))
    return _judged(run, plots_dir / run / part, bundle, data_dir)


def judged_part(folder: Path) -> str | None:
    """The part from which the figures of a run are read: test, else val, else train; None where no part was judged."""
    return next((split for split in reversed(SPLITS) if (folder / split / PREDICTIONS).is_file()), None)


def _not_judged(run: str, asked: str | None, parts: Sequence[str]) -> DataError:
    part = asked or next(split for split in reversed(SPLITS) if split in parts)
    command = f"run `{program()} test --checkpoint_name {shlex.quote(run)} --split {part}`"
    return DataError(
        f"{run!r} has no predictions of its {part} part",
        command if part in parts else f"its data has no such part, only {', '.join(parts)}",
    )


def _parts_of(bundle: Path | None) -> Sequence[str]:
    """The parts that a bundle's manifest has; all where there is none to ask."""
    if bundle is None or not (bundle / "manifest.csv").is_file():
        return SPLITS
    manifest = Manifest.read(bundle / "manifest.csv", Path())
    return [split for split in SPLITS if len(manifest.indices(split))]


def _bundle(name: str, models_dir: Path, plots_dir: Path) -> tuple[Path | None, str]:
    """The bundle's folder, None where there are only its figures, and the run's name."""
    try:
        path = find_checkpoint(name, models_dir)
    except CheckpointError:
        if judged_part(plots_dir / name):
            return None, name
        if Path(name).is_dir():
            raise DataError(
                f"{name!r} holds no {PREDICTIONS}",
                "give a bundle, or a folder that `test` or `train` wrote predictions to",
            ) from None
        raise
    return (path, path.name) if path.is_dir() else (None, path.stem)


def _in_folder(folder: Path, models_dir: Path, data_dir: Path | None) -> EvaluatedRun:
    """Predictions in a folder; plots/NAME/PART belongs to the bundle NAME where there is one."""
    own = models_dir / folder.parent.name
    bundle = own if folder.name in SPLITS and (own / INFO_NAME).is_file() else None
    return _judged(f"{folder.parent.name}/{folder.name}", folder, bundle, data_dir)


def _judged(name: str, directory: Path, bundle: Path | None, data_dir: Path | None) -> EvaluatedRun:
    info = read_bundle(bundle).info if bundle else None
    known = str(info.provenance.get("data_root", "")) if info else ""
    return EvaluatedRun(
        name, directory, PredictionTable.read(directory), data_dir or (Path(known) if known else None), bundle, info
    )


def limits_of(info: BundleInfo | None) -> DecodeLimits:
    """What a file may ask for: as much as in the training, the most there is where no bundle says it."""
    config = info.provenance.get("config") if info else None
    known = ((config or {}).get("data") or {}).get("limits")
    return DecodeLimits(**known) if known else _WIDEST
