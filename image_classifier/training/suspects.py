"""Images that are probably labelled wrong, from predictions of models that were not trained on them; loads no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from image_classifier.atomic_io import write_text
from image_classifier.bundle import INFO_NAME, find_checkpoint, read_bundle
from image_classifier.dataset.audit.fix import Fix, Fixes, read_fixes
from image_classifier.dataset.audit.issues import AuditSettings
from image_classifier.dataset.prepare import DatasetScan, all_folds
from image_classifier.dataset.run import prepare_dataset
from image_classifier.dataset.settings import DataSettings
from image_classifier.dataset.split import content_names
from image_classifier.errors import ConfigError, DataError
from image_classifier.evaluation.label_issues.html_report import Gallery, Row, render
from image_classifier.evaluation.label_issues.out_of_fold import OutOfFoldPredictions, out_of_fold
from image_classifier.evaluation.label_issues.proposals import accepted, lines, merged, worst_predictions, write_csv
from image_classifier.evaluation.label_issues.ranking import Suspect, find_suspects
from image_classifier.inference.load import pulled_checkpoint
from image_classifier.manifest import SPLITS, Manifest
from image_classifier.predictions import PredictionTable
from image_classifier.program import program
from image_classifier.text import did_you_mean
from image_classifier.training.run_dir import RunSettings

log = logging.getLogger(__name__)

WAYS = ("auto", "embeddings", "training")

# Takes the folds (fold i is the val split of folds[i]), the settings of the data and the study's folder, and returns
# the folders of each fold's predictions.
PredictFolds = Callable[[Sequence[Manifest], DataSettings, Path], Sequence[Path]]


@dataclass(frozen=True)
class SuspectSettings:
    """The keys of `suspects` in conf/suspects.yaml.

    Raises:
        ConfigError: An invalid value, named by its key.
    """

    by: str = "auto"
    folds: int = 5
    highest_loss: float = 0.1
    max_listed: int = 500

    def __post_init__(self) -> None:
        if isinstance(self.by, str) and self.by not in WAYS:
            raise ConfigError(
                f"suspects.by={self.by} is unknown", f"{did_you_mean(self.by, WAYS)}It is one of {', '.join(WAYS)}"
            )
        if isinstance(self.folds, int) and self.folds < 2:
            raise ConfigError(
                f"suspects.folds must be at least 2, not {self.folds}",
                "5 trains on four fifths of the images each time",
            )
        if isinstance(self.highest_loss, int | float) and not 0 <= self.highest_loss <= 1:
            raise ConfigError(
                f"suspects.highest_loss must lie between 0 and 1, not {self.highest_loss}", "0.1 lists the worst tenth"
            )
        if isinstance(self.max_listed, int) and self.max_listed < 0:
            raise ConfigError(f"suspects.max_listed must be at least 0, not {self.max_listed}")


@dataclass(frozen=True)
class SuspectSearch:
    """What is searched, and how.

    Attributes:
        settings: The keys of `suspects`.
        run: Names and folders.
        data: The images.
        audit: How they are audited.
        apply: How many proposals are accepted: none, all, or so many, the worst first.
        starts_from: The bundle that the models start from; None: there is none.
        bundle: A finished bundle whose own worst predictions are listed too; None: there is none.
    """

    settings: SuspectSettings
    run: RunSettings
    data: DataSettings
    audit: AuditSettings
    apply: bool | int = False
    starts_from: str | None = None
    bundle: str | None = None

    def __post_init__(self) -> None:
        if self.run.overwrite or self.run.resume:
            raise ConfigError(
                "suspects resumes by itself where it stopped",
                "leave overwrite= and resume= out, or choose another name=",
            )
        if not isinstance(self.apply, bool | int) or self.apply < 0:
            raise ConfigError(
                f"invalid apply={self.apply!r}",
                "apply=true accepts the proposals of confident learning, apply=50 the fifty worst labels",
            )


@dataclass(frozen=True)
class SuspectReport:
    """The suspects, the files that list them, and how many were decided before, accepted now, or only proposed."""

    suspects: Sequence[Suspect]
    num_images: int
    table: Path
    page: Path
    fixes: Path
    num_decided: int
    num_accepted: int
    num_proposed: int

    def lines(self) -> Iterator[str]:
        """Yield the summary for a person."""
        yield from lines(self.suspects, self.num_images)
        yield f"table    {self.table}"
        yield f"page     {self.page}"
        counts = f"{self.num_decided} decided before, {self.num_accepted} accepted now, {self.num_proposed} proposed"
        yield f"fix      {self.fixes}: {counts}"


def search_suspects(search: SuspectSearch, predict: PredictFolds) -> SuspectReport:
    """Rank images by how doubtful their labels are; write suspects.csv, suspects.html and proposals to fix.csv.

    Raises:
        ConfigError: The models would start from a bundle that was trained on these images.
        DataError: The images cannot be used.
        TrainingError: A fold's training failed.
    """
    settings, run = search.settings, search.run
    data = replace(search.data, folds=settings.folds, fold=0, manifest_path=None)
    manifest, scan = prepare_dataset(data, search.audit, run.trusted_packages)
    _check_start(search, manifest)
    name = run.name or f"{data.name or manifest.root.resolve().name}-suspects".replace("/", "-").lstrip(".")
    folds = all_folds(scan, data)
    folders = predict(folds, replace(data, folds=None, fold=None), Path(run.runs_dir) / name)
    predictions = _out_of_fold(folders, folds[0], scan)
    suspects = find_suspects(predictions, _label_conflicts(scan), settings.highest_loss)
    if search.bundle:
        suspects = merged(suspects, _of_bundle(search.bundle, run, manifest, settings.highest_loss))
    fixes = read_fixes(scan.fixes.path)  # read again: a person may have edited it meanwhile
    suspects = [suspect for suspect in suspects if suspect.path not in fixes.decided]
    return _write(search, suspects, fixes, scan, predictions)


def _check_start(search: SuspectSearch, manifest: Manifest) -> None:
    """Refuse a bundle that was trained on these labels: whatever starts from it would repeat them."""
    if not search.starts_from:
        return
    path = pulled_checkpoint(search.starts_from, Path(search.run.models_dir), search.data.dvc)
    if not (path / INFO_NAME).is_file():
        log.warning(
            "%s does not name the images it was trained on: if these are among them, it repeats wrong labels", path
        )
        return
    known = Manifest.read(read_bundle(path).path("manifest.csv"), manifest.root)
    trained_on = content_names(known.digests[known.indices("train")])
    seen = int(np.isin(content_names(manifest.digests), trained_on).sum())
    if seen:
        raise ConfigError(
            f"model.from={search.starts_from} was trained on {seen} of these images and repeats their labels, "
            "also the wrong ones",
            "start from weights of other images (model.weights=), or from none",
        )


def _out_of_fold(folders: Sequence[Path], first: Manifest, scan: DatasetScan) -> OutOfFoldPredictions:
    """Return the predictions of all images except the test images, each by a model that was not trained on it."""
    rows = np.flatnonzero(first.splits != SPLITS.index("test"))
    labels = {first.paths[row]: int(first.targets[row]) for row in rows.tolist()}
    splits = {image.path: image.split for image in scan.tree.images}
    if len(rows) < len(first):
        log.info(
            "the test split (%d images) is left alone: labels corrected after a model's predictions would flatter it",
            len(first) - len(rows),
        )
    return out_of_fold(folders, labels, splits, first.classes)


def _label_conflicts(scan: DatasetScan) -> list[list[tuple[str, str]]]:
    """Return the audit's groups of one picture under several labels, paths and labels as fix.csv has left them."""
    issues = [issue for issue in scan.audit.issues if issue.issue_type == "label_conflict"]
    return [[(item.path, item.label) for item in issue.items] for issue in issues]


def _of_bundle(name: str, run: RunSettings, manifest: Manifest, share: float) -> list[Suspect]:
    """Return a bundle's worst predictions of its own val and test split, as `train` and `test` wrote them to plots/."""
    bundle = read_bundle(find_checkpoint(name, Path(run.models_dir)))
    targets = dict(zip(manifest.paths, manifest.targets.tolist(), strict=True))
    if tuple(bundle.info.classes) != manifest.classes:
        raise DataError(
            f"the bundle {name!r} has other classes than these images", "name a bundle that was trained on them"
        )
    suspects: list[Suspect] = []
    for split in SPLITS[1:]:
        folder = Path(run.plots_dir) / bundle.directory.name / split
        if (folder / "logits.npy").is_file():
            table = PredictionTable.read(folder)
            rows = [row for row, path in enumerate(table.paths) if path in targets]
            paths = [table.paths[row] for row in rows]
            codes = np.array([targets[path] for path in paths], dtype=np.int64)
            predictions = OutOfFoldPredictions(
                paths, codes, table.probabilities[rows], manifest.classes, [split] * len(rows)
            )
            suspects += worst_predictions(predictions, share, name)
    if not suspects and share:
        fact = f"there are no predictions of {name!r} for these images in {run.plots_dir}"
        raise DataError(fact, f"{program()} test --checkpoint_name {name} --split val writes them")
    return suspects


def _write(
    search: SuspectSearch,
    suspects: Sequence[Suspect],
    fixes: Fixes,
    scan: DatasetScan,
    predictions: OutOfFoldPredictions,
) -> SuspectReport:
    """Write the table, the page and the proposals into the audit's folder."""
    actions = accepted(suspects, search.apply)
    rows = [_proposal(suspect, actions) for suspect in suspects if suspect.split != "test"]
    table, page = scan.directory / "suspects.csv", scan.directory / "suspects.html"
    num_decided = len(fixes.decided)
    write_csv(suspects, table)
    fixes.proposing(rows).write()
    proposed = {row.path: Row(row.path, row.label, row.action, row.reason) for row in rows}
    gallery = Gallery(
        scan.tree.root,
        fixes.path,
        len(predictions.paths),
        predictions.classes,
        proposed,
        fixes.proposing(()).to_csv(),
        num_decided,
    )
    data = search.data
    write_text(page, render(suspects, gallery, search.settings.max_listed, data.limits, data.background))
    return SuspectReport(
        suspects,
        len(predictions.paths),
        table,
        page,
        fixes.path,
        num_decided=num_decided,
        num_accepted=len(actions),
        num_proposed=len(rows) - len(actions),
    )


def _proposal(suspect: Suspect, actions: Mapping[str, tuple[str, str]]) -> Fix:
    action, label = actions.get(suspect.path, ("", suspect.suggested))
    reason = f"accepted unseen: {suspect.reason}" if action else suspect.reason
    return Fix(suspect.path, suspect.label, action, label, reason)
