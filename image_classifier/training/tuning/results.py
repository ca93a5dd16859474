"""Results of a study: folders of its best trials, table, trials.csv, the command that trains the winner."""

from __future__ import annotations

import csv
import io
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from image_classifier.atomic_io import write_text
from image_classifier.program import program
from image_classifier.training.tuning.study import TuneSettings

_MAX_ROWS = 30
_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


@dataclass(frozen=True)
class StudyPaths:
    """Paths of the runs of a study's trials."""

    study: str
    runs_dir: Path
    models_dir: Path
    plots_dir: Path

    @property
    def folder(self) -> Path:
        """The folder of the trials' logs."""
        return self.runs_dir / self.study

    def name(self, number: int) -> str:
        """Return the name of a trial's run."""
        return f"{self.study}-{number}"

    def log(self, number: int) -> Path:
        """Return the log of a trial's process, over all its attempts."""
        return self.folder / f"{self.name(number)}.log"

    def lock(self, number: int) -> Path:
        """Return the file that a run locks while it is under way."""
        return self.runs_dir / f".{self.name(number)}.lock"

    def bundle(self, number: int) -> Path:
        """Return the trial's bundle."""
        return self.models_dir / self.name(number)

    def has_checkpoint(self, number: int) -> bool:
        """Return whether an earlier attempt has saved a checkpoint to resume from."""
        return any((self.runs_dir / self.name(number) / "checkpoints").glob("*.ckpt"))

    def remove(self, number: int) -> None:
        """Remove all files of a trial except its log."""
        for directory in (self.runs_dir, self.models_dir, self.plots_dir):
            # Another worker may remove them at the same time.
            shutil.rmtree(directory / self.name(number), ignore_errors=True)
        self.lock(number).unlink(missing_ok=True)


def ranked(trials: Sequence[FrozenTrial], maximise: bool) -> list[FrozenTrial]:
    """Return the complete trials, best first, equal ones by number."""
    sign = -1 if maximise else 1
    complete = [
        (sign * trial.value, trial.number, trial)
        for trial in trials
        if trial.state is TrialState.COMPLETE and trial.value is not None
    ]
    return [trial for _, _, trial in sorted(complete, key=lambda row: row[:2])]


def remove_losing_runs(trials: Sequence[FrozenTrial], settings: TuneSettings, paths: StudyPaths) -> None:
    """Remove the files of finished trials except the best `keep`, so that a study's disk use is limited."""
    if settings.keep is None:
        return
    kept = {trial.number for trial in ranked(trials, settings.maximise)[: settings.keep]}
    for trial in trials:
        if trial.state.is_finished() and trial.number not in kept:
            paths.remove(trial.number)


def in_order(trials: Sequence[FrozenTrial], maximise: bool) -> list[FrozenTrial]:
    """Return all trials that have started: the complete ones best first, then the others by number."""
    best = ranked(trials, maximise)
    return best + [trial for trial in trials if trial.state in _STATES and trial not in best]


def table(trials: Sequence[FrozenTrial], settings: TuneSettings) -> list[str]:
    """Return the trials as lines for a terminal, best first, and the reasons of failures."""
    rows = in_order(trials, settings.maximise)
    keys = _keys(rows)
    cells = [["trial", settings.metric, "at", "seconds", "state", *keys]]
    cells += [_cells(trial, keys) for trial in rows[:_MAX_ROWS]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    if len(rows) > _MAX_ROWS:
        lines.append(f"… and {len(rows) - _MAX_ROWS} more in trials.csv")
    failed = [trial for trial in rows if trial.state is TrialState.FAIL]
    lines += [f"trial {trial.number} failed: {trial.user_attrs.get('reason', '')}" for trial in failed[:_MAX_ROWS]]
    return lines


def _cells(trial: FrozenTrial, keys: Sequence[str]) -> list[str]:
    return [
        str(trial.number),
        "-" if trial.value is None else f"{trial.value:.4f}",
        str(trial.user_attrs.get("validation", "-")),
        f"{trial.user_attrs.get('seconds', 0):.0f}",
        _STATES[trial.state],
        *(_shown(trial.params.get(key)) for key in keys),
    ]


def write_csv(trials: Sequence[FrozenTrial], settings: TuneSettings, path: Path) -> None:
    """Write all trials that have started, best first; a parameter's column is its key."""
    rows = in_order(trials, settings.maximise)
    keys = _keys(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", settings.metric, "validation", "validations", "seconds", "reason", *keys])
    for trial in rows:
        writer.writerow(
            [
                trial.number,
                _STATES[trial.state],
                "" if trial.value is None else trial.value,
                trial.user_attrs.get("validation", ""),
                len(trial.intermediate_values),
                trial.user_attrs.get("seconds", ""),
                trial.user_attrs.get("reason", ""),
                *(_shown(trial.params.get(key, ""), ".12g") for key in keys),
            ]
        )
    write_text(path, text.getvalue())


def winner_command(first: Sequence[str], overrides: Sequence[str], study: str) -> str:
    """Return the command line that trains the winner, quoted for a shell."""
    return f"{program()} " + shlex.join(["train", *first, *overrides, f"name={study}-best"])


def _keys(trials: Sequence[FrozenTrial]) -> list[str]:
    return list(dict.fromkeys(key for trial in trials for key in trial.params))


def _shown(value: object, digits: str = ".4g") -> str:
    return format(value, digits) if isinstance(value, float) else "-" if value is None else str(value)
