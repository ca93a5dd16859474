"""The verb `suspects`: which images are probably labelled wrong, read top to bottom; loads torch only where a backbone embeds."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier.atomic_io import write_text
from image_classifier.bundle import INFO_NAME, find_checkpoint, read_bundle
from image_classifier.cli import hydra_app
from image_classifier.dataset.audit.fix import Fix, Fixes, read_fixes
from image_classifier.dataset.prepare import DatasetScan, DataSettings, all_folds
from image_classifier.dataset.run import audited
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
from image_classifier.training.cross_validation.by_training import answer_by_training, fold_runs
from image_classifier.training.run_dir import RunSettings
from image_classifier.training.tuning.subprocess_run import spared_words, tracking_words

log = logging.getLogger(__name__)

WAYS = ("auto", "embeddings", "training")
_OURS = (
    "name",
    "overwrite",
    "resume",
    "suspects",
    "apply",
    "checkpoint_name",
    "runs_dir",
    "models_dir",
    "plots_dir",
)  # not a fold's


@dataclass(frozen=True)
class SuspectSettings:
    """The keys of `suspects` in conf/suspects.yaml.

    Raises:
        ConfigError: A value that cannot be, named by its key.
    """

    by: str = "auto"
    folds: int = 5
    highest_loss: float = 0.1
    max_listed: int = 500

    def __post_init__(self) -> None:
        if isinstance(self.by, str) and self.by not in WAYS:
            raise ConfigError(
                f"suspects.by={self.by} is not known", f"{did_you_mean(self.by, WAYS)}It is one of {', '.join(WAYS)}"
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


def suspects(config: Any) -> Path:
    """Rank the images by how doubtful their labels are; writes suspects.csv, suspects.html and the proposals of fix.csv beside the audit."""
    asked = hydra_app.typed(SuspectSettings, config.suspects, "suspects")
    run = hydra_app.typed(RunSettings, hydra_app.only(config, *(item.name for item in fields(RunSettings))), "")
    apply = _apply(config.get("apply"))
    _check(config)
    folded = hydra_app.replaced(config, {"data.folds": asked.folds, "data.fold": 0, "data.manifest_path": None})
    first, data, found = audited(folded)
    _check_start(config, run, first)
    folds = all_folds(found, data)
    name = run.name or f"{data.name or first.root.resolve().name}-suspects".replace("/", "-").lstrip(".")
    directory = Path(run.runs_dir) / name
    answers = _out_of_fold(config, asked.by, folds, replace(data, folds=None, fold=None), directory, found)
    suspected = find_suspects(answers, _conflicts(found), asked.highest_loss)
    if config.checkpoint_name:
        suspected = merged(suspected, _of_bundle(str(config.checkpoint_name), run, first, asked.highest_loss))
    fixes = read_fixes(found.fixes.path)  # read again: a person may have written to it meanwhile
    suspected = [suspect for suspect in suspected if suspect.path not in fixes.decided]
    return _write(suspected, fixes, apply, asked.max_listed, found, data, answers)


def _apply(value: Any) -> bool | int:
    if isinstance(value, bool) or (isinstance(value, int) and value >= 0):
        return value
    raise ConfigError(
        f"apply={value!r} cannot be", "apply=true accepts what confident learning says, apply=50 the worst fifty"
    )


def _check(config: Any) -> None:
    if config.overwrite or config.get("resume"):
        raise ConfigError(
            "suspects goes on by itself where it stopped", "leave overwrite= and resume= out, or choose another name="
        )
    if config.data.folds is not None or config.data.fold is not None:
        raise ConfigError(
            "suspects deals all folds itself",
            "leave data.folds and data.fold out, and say how many with suspects.folds",
        )


def _check_start(config: Any, run: RunSettings, manifest: Manifest) -> None:
    """Refuse a bundle that has seen these labels: whatever starts from it would repeat them."""
    if not config.model["from"]:
        return
    path = pulled_checkpoint(str(config.model["from"]), Path(run.models_dir), config.data.dvc)
    if not (path / INFO_NAME).is_file():
        log.warning("%s does not say what it was trained on: if on these labels, it repeats the wrong ones", path)
        return
    known = Manifest.read(read_bundle(path).path("manifest.csv"), manifest.root)
    seen = int(np.isin(content_names(manifest.digests), content_names(known.digests[known.indices("train")])).sum())
    if seen:
        fact = f"model.from={config.model['from']} was trained on {seen} of these images and repeats their labels, the wrong ones too"
        raise ConfigError(fact, "start from weights of other images (model.weights=), or from none")


def _out_of_fold(
    config: Any, by: str, folds: Sequence[Manifest], data: DataSettings, directory: Path, found: DatasetScan
) -> OutOfFoldPredictions:
    """The answers of the models that did not see them for all images but those of the test part."""
    if by == "embeddings" or (by == "auto" and _is_pretrained(config)):
        from image_classifier.training.cross_validation.by_embeddings import (
            answer_by_embeddings,
        )  # torch, which the processes of the other way load themselves

        places = answer_by_embeddings(config, folds, data, directory)
    else:
        places = answer_by_training(fold_runs(directory.name, directory, folds, _words(config, directory.name)))
    first = folds[0]
    rows = np.flatnonzero(first.splits != SPLITS.index("test"))
    labels = {first.paths[row]: int(first.targets[row]) for row in rows.tolist()}
    splits = {image.path: image.split for image in found.tree.images}
    if len(rows) < len(first):
        log.info(
            "the test part (%d images) is left alone: labels mended by what a model says would flatter it",
            len(first) - len(rows),
        )
    return out_of_fold(places, labels, splits, first.classes)


def _is_pretrained(config: Any) -> bool:
    backbone = hydra_app.to_plain(config.model.backbone) if config.model.backbone else {}
    return bool(config.model.weights or config.model["from"] or backbone.get("pretrained") or backbone.get("weights"))


def _words(config: Any, study: str) -> tuple[str, ...]:
    """The flags and overrides of this command that are every fold's too."""
    line = hydra_app.running_line("suspects")
    flags = [
        part for flag, value in line.flags if flag in ("--config-dir", "--config-path") for part in (flag, str(value))
    ]
    own = [text for text in line.overrides if re.split(r"[.=]", text.lstrip("+~"))[0].partition("@")[0] not in _OURS]
    kept = [
        text for text in own if not text.lstrip("+~").startswith(("data.fold=", "data.folds=", "data.manifest_path="))
    ]
    return (*flags, *kept, "plots.figures=false", *spared_words(kept), *tracking_words(config, study))


def _conflicts(found: DatasetScan) -> list[list[tuple[str, str]]]:
    """The audit's groups of one picture under several labels, paths and labels as fix.csv has left them."""
    return [
        [(item.path, item.label) for item in finding.items]
        for finding in found.audit.issues
        if finding.issue_type == "label_conflict"
    ]


def _of_bundle(name: str, run: RunSettings, manifest: Manifest, share: float) -> list[Suspect]:
    """The worst answers that a bundle gave to its own val and test part, as `train` and `test` left them in plots/."""
    bundle = read_bundle(find_checkpoint(name, Path(run.models_dir)))
    targets = dict(zip(manifest.paths, manifest.targets.tolist(), strict=True))
    if tuple(bundle.info.classes) != manifest.classes:
        raise DataError(
            f"the bundle {name!r} has other classes than these images", "name a bundle that was trained on them"
        )
    found: list[Suspect] = []
    for split in SPLITS[1:]:
        place = Path(run.plots_dir) / bundle.directory.name / split
        if (place / "logits.npy").is_file():
            table = PredictionTable.read(place)
            rows = [row for row, path in enumerate(table.paths) if path in targets]
            part = [table.paths[row] for row in rows]
            codes = np.array([targets[path] for path in part], dtype=np.int64)
            found += worst_predictions(
                OutOfFoldPredictions(part, codes, table.probabilities[rows], manifest.classes, [split] * len(rows)),
                share,
                name,
            )
    if not found and share:
        fact = f"there are no predictions of {name!r} for these images in {run.plots_dir}"
        raise DataError(fact, f"{program()} test --checkpoint_name {name} --split val writes them")
    return found


def _write(
    suspected: Sequence[Suspect],
    fixes: Fixes,
    apply: bool | int,
    most: int,
    found: DatasetScan,
    data: DataSettings,
    answers: OutOfFoldPredictions,
) -> Path:
    """Leave the table, the page and the proposals beside the audit, and say where."""
    decided, directory = len(fixes.decided), found.directory
    done = accepted(suspected, apply)
    rows = []
    for suspect in suspected:
        action, label = done.get(suspect.path, ("", suspect.suggested))
        note = f"accepted unseen: {suspect.reason}" if action else suspect.reason
        if suspect.split != "test":
            rows.append(Fix(suspect.path, suspect.label, action, label, note))
    path, page = directory / "suspects.csv", directory / "suspects.html"
    write_csv(suspected, path)
    fixes.proposing(rows).write()
    kept = {row.path: Row(row.path, row.label, row.action, row.reason) for row in rows}
    gallery = Gallery(
        found.tree.root, fixes.path, len(answers.paths), answers.classes, kept, fixes.proposing(()).to_csv(), decided
    )
    write_text(page, render(suspected, gallery, most, data.limits, data.background))
    print("\n".join(lines(suspected, len(answers.paths))))
    counts = f"{decided} decided before, {len(done)} accepted now, {len(rows) - len(done)} proposed"
    print(f"table    {path}\npage     {page}\nfix      {fixes.path}: {counts}")
    print(
        "next     write relabel, exclude or keep into its column action; every run honours it, and removing a row undoes it"
    )
    return path
