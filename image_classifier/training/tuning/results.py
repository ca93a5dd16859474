"""What a study leaves: the folders of its best trials, a table, trials.csv and the command that trains the winner."""

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
    """Where the runs of a study's trials keep their files."""

    study: str
    runs_dir: Path
    models_dir: Path
    plots_dir: Path

    @property
    def folder(self) -> Path:
        """What the trials said, one log each."""
        return self.runs_dir / self.study

    def name(self, number: int) -> str:
        """The name of a trial's run."""
        return f"{self.study}-{number}"

    def log(self, number: int) -> Path:
        """What a trial's process said, over all its attempts."""
        return self.folder / f"{self.name(number)}.log"

    def lock(self, number: int) -> Path:
        """The file that a run holds while it is under way."""
        return self.runs_dir / f".{self.name(number)}.lock"

    def bundle(self, number: int) -> Path:
        """The trial's bundle."""
        return self.models_dir / self.name(number)

    def has_checkpoint(self, number: int) -> bool:
        """Whether an attempt has left something to go on from."""
        return any((self.runs_dir / self.name(number) / "checkpoints").glob("*.ckpt"))

    def remove(self, number: int) -> None:
        """Remove what a trial keeps, but for its log."""
        for directory in (self.runs_dir, self.models_dir, self.plots_dir):
            shutil.rmtree(directory / self.name(number), ignore_errors=True)  # another worker may be at it too
        self.lock(number).unlink(missing_ok=True)


def ranked(trials: Sequence[FrozenTrial], maximise: bool) -> list[FrozenTrial]:
    """The complete trials, best first."""
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE and trial.value is not None]
    return sorted(complete, key=lambda trial: (-(trial.value or 0.0) if maximise else trial.value or 0.0, trial.number))


def remove_losing_runs(trials: Sequence[FrozenTrial], asked: TuneSettings, places: StudyPaths) -> None:
    """Remove what finished trials keep, but for the best `keep`, so that a study's disk use is bounded."""
    if asked.keep is None:
        return
    kept = {trial.number for trial in ranked(trials, asked.maximise)[: asked.keep]}
    for trial in trials:
        if trial.state.is_finished() and trial.number not in kept:
            places.remove(trial.number)


def in_order(trials: Sequence[FrozenTrial], maximise: bool) -> list[FrozenTrial]:
    """All trials that were begun: the complete ones best first, then the others by number."""
    best = ranked(trials, maximise)
    return best + [trial for trial in trials if trial.state in _STATES and trial not in best]


def table(trials: Sequence[FrozenTrial], asked: TuneSettings) -> list[str]:
    """The trials as lines for a terminal, best first."""
    rows = in_order(trials, asked.maximise)
    keys = _keys(rows)
    cells = [["trial", asked.metric, "at", "seconds", "state", *keys]]
    for trial in rows[:_MAX_ROWS]:
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        facts = [
            str(trial.user_attrs.get("validation", "-")),
            f"{trial.user_attrs.get('seconds', 0):.0f}",
            _STATES[trial.state],
        ]
        cells.append([str(trial.number), value, *facts, *(_shown(trial.params.get(key)) for key in keys)])
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    more = [f"… and {len(rows) - _MAX_ROWS} more in trials.csv"] if len(rows) > _MAX_ROWS else []
    failed = [
        f"trial {trial.number} failed: {trial.user_attrs.get('reason', '')}"
        for trial in rows
        if trial.state is TrialState.FAIL
    ]
    return [*lines, *more, *failed[:_MAX_ROWS]]


def write_csv(trials: Sequence[FrozenTrial], asked: TuneSettings, path: Path) -> None:
    """All trials that were begun, best first; a parameter's column is its key."""
    rows = in_order(trials, asked.maximise)
    keys = _keys(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", asked.metric, "validation", "validations", "seconds", "reason", *keys])
    for trial in rows:
        facts = [
            trial.user_attrs.get("validation", ""),
            len(trial.intermediate_values),
            trial.user_attrs.get("seconds", ""),
        ]
        reason = trial.user_attrs.get("reason", "")
        value = "" if trial.value is None else trial.value
        writer.writerow(
            [
                trial.number,
                _STATES[trial.state],
                value,
                *facts,
                reason,
                *(_shown(trial.params.get(key, ""), ".12g") for key in keys),
            ]
        )
    write_text(path, text.getvalue())


def winner_command(first: Sequence[str], overrides: Sequence[str], study: str) -> str:
    """The command line that trains the winner, as a shell takes it."""
    return f"{program()} " + shlex.join(["train", *first, *overrides, f"name={study}-best"])


def _keys(trials: Sequence[FrozenTrial]) -> list[str]:
    return list(dict.fromkeys(key for trial in trials for key in trial.params))


def _shown(value: object, digits: str = ".4g") -> str:
    return format(value, digits) if isinstance(value, float) else "-" if value is None else str(value)
