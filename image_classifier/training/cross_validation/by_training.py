"""Out-of-fold predictions by real trainings: one run per fold, each a process, resumed where it stopped."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from image_classifier.atomic_io import file_lock, write_text
from image_classifier.errors import TrainingError
from image_classifier.manifest import Manifest
from image_classifier.override_grammar import quoted
from image_classifier.program import child_command
from image_classifier.training.run_dir import read_notes
from image_classifier.training.tuning.subprocess_run import TrialOutcome, TrialProcess, sigterm_stops

log = logging.getLogger(__name__)

_TIME_TO_SAVE_S = 90.0  # after a training was signalled to stop, for its checkpoint


@dataclass(frozen=True)
class FoldRun:
    """One fold's training.

    Attributes:
        name: Of its run.
        directory: The study's folder, in which the run is.
        words: Of its command line.
        key: Names the images, labels and settings that it is made from.
        program: Starts `train`.
    """

    name: str
    directory: Path
    words: tuple[str, ...]
    key: str
    program: tuple[str, ...] = (*child_command(), "train")

    @property
    def log(self) -> Path:
        """The output of the process, over all its attempts."""
        return self.directory / f"{self.name}.log"

    @property
    def answers(self) -> Path:
        """The folder of its predictions of the val split."""
        return self.directory / "plots" / self.name / "val"

    @property
    def is_ours(self) -> bool:
        """Whether the files there were made from the same images, labels and settings."""
        return self._key_path.is_file() and self._key_path.read_text(encoding="utf-8").strip() == self.key

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to its end."""
        return bool(read_notes(self.directory / self.name).get("finished"))

    @property
    def is_done(self) -> bool:
        """Whether its predictions exist."""
        return (
            self.is_ours
            and self.is_finished
            and (self.answers / "logits.npy").is_file()
            and (self.answers / "predictions.csv").is_file()
        )

    @property
    def _key_path(self) -> Path:
        return self.directory / f"{self.name}.key"

    def command(self) -> list[str]:
        """Return the command line: it resumes from a checkpoint of the same run, else it starts again."""
        folders = {
            "runs_dir": self.directory,
            "models_dir": self.directory / "bundles",
            "plots_dir": self.directory / "plots",
        }
        overrides = [f"{key}={quoted(str(value))}" for key, value in {"name": self.name, **folders}.items()]
        checkpoints = (self.directory / self.name / "checkpoints").glob("*.ckpt")
        resumes = self.is_ours and not self.is_finished and any(checkpoints)
        return [*self.program, *self.words, *overrides, "resume=last" if resumes else "overwrite=true"]

    def train(self) -> None:
        """Train to the end; on Ctrl-C, SIGTERM or an error the process saves its newest step and ends.

        Raises:
            TrainingError: The training failed.
        """
        command = self.command()
        write_text(self._key_path, self.key + "\n")
        process = TrialProcess(command, self.log, {})
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(process.run, lambda step, value: False)
            try:
                outcome: TrialOutcome = future.result()
            except BaseException:
                process.stop()
                wait([future], timeout=_TIME_TO_SAVE_S)
                process.stop(at_once=True)
                raise
        if outcome.interrupted:
            raise KeyboardInterrupt
        if outcome.reason:
            raise TrainingError(
                f"the training of {self.name} failed: {outcome.reason}",
                f"see {self.log}; the same command resumes it",
            )


def fold_runs(
    name: str, directory: Path, folds: Sequence[Manifest], words: Sequence[str], program: Sequence[str] | None = None
) -> list[FoldRun]:
    """Return the runs of all folds: fold i is the val split of `folds[i]`; `words` are on the command line of each."""
    runs = []
    for number, fold in enumerate(folds):
        fold_words = (
            *words,
            f"data.folds={len(folds)}",
            f"data.fold={number}",
            "data.manifest_path=null",
            "test=false",
        )
        key = hashlib.sha256(json.dumps([fold.sha256, fold_words]).encode("utf-8", "surrogateescape")).hexdigest()
        runs.append(
            FoldRun(f"{name}-fold-{number}", directory, fold_words, key, *([tuple(program)] if program else []))
        )
    return runs


def predict_by_training(runs: Sequence[FoldRun]) -> list[Path]:
    """Return the folders of each fold's predictions; folds without any are trained.

    Raises:
        TrainingError: A training failed.
    """
    with sigterm_stops():
        for number, run in enumerate(runs, start=1):
            with file_lock(run.directory / f".{run.name}.fold.lock"):
                if run.is_done:
                    log.info("fold %d of %d: %s is trained", number, len(runs), run.name)
                else:
                    log.info("fold %d of %d: training %s; its output: %s", number, len(runs), run.name, run.log)
                    run.train()
    return [run.answers for run in runs]
