"""Out-of-fold answers by real trainings: one ordinary run a fold, each in a process of its own, resumed where it was stopped and never done twice."""

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

_PATIENCE_S = 90.0  # for a training that was asked to stop: time to write its checkpoint


@dataclass(frozen=True)
class FoldRun:
    """One fold's training: its run `name` below `directory`, the words of its command line, and what it is to be made from."""

    name: str
    directory: Path
    words: tuple[str, ...]
    key: str
    program: tuple[str, ...] = (*child_command(), "train")

    @property
    def log(self) -> Path:
        """What the process said, over all its attempts."""
        return self.directory / f"{self.name}.log"

    @property
    def answers(self) -> Path:
        """The folder of its predictions of the val part."""
        return self.directory / "plots" / self.name / "val"

    @property
    def is_ours(self) -> bool:
        """Whether what lies there was made from the same images, labels and settings."""
        return self._key_path.is_file() and self._key_path.read_text(encoding="utf-8").strip() == self.key

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to its end."""
        return bool(read_notes(self.directory / self.name).get("finished"))

    @property
    def is_done(self) -> bool:
        """Whether its predictions are there."""
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
        """The whole command line: going on from a checkpoint of the same run, else from the start."""
        places = {
            "runs_dir": self.directory,
            "models_dir": self.directory / "bundles",
            "plots_dir": self.directory / "plots",
        }
        own = [f"{key}={quoted(str(value))}" for key, value in {"name": self.name, **places}.items()]
        goes_on = (
            self.is_ours and not self.is_finished and any((self.directory / self.name / "checkpoints").glob("*.ckpt"))
        )
        return [*self.program, *self.words, *own, "resume=last" if goes_on else "overwrite=true"]

    def train(self) -> None:
        """Train to the end; on Ctrl-C, SIGTERM or an error the process is asked to keep its newest step.

        Raises:
            TrainingError: The training failed.
        """
        command = self.command()
        write_text(self._key_path, self.key + "\n")
        process = TrialProcess(command, self.log, {})
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(process.run, lambda step, value: False)
            try:
                ending: TrialOutcome = future.result()
            except BaseException:
                process.stop()
                wait([future], timeout=_PATIENCE_S)
                process.stop(at_once=True)
                raise
        if ending.interrupted:
            raise KeyboardInterrupt
        if ending.reason:
            raise TrainingError(
                f"the training of {self.name} failed: {ending.reason}",
                f"see {self.log}; the same command goes on where it stopped",
            )


def fold_runs(
    name: str, directory: Path, folds: Sequence[Manifest], words: Sequence[str], program: Sequence[str] | None = None
) -> list[FoldRun]:
    """The runs of all folds, fold i being the val part of `folds[i]`; `words` are those of every training's command line."""
    runs = []
    for number, fold in enumerate(folds):
        own = (*words, f"data.folds={len(folds)}", f"data.fold={number}", "data.manifest_path=null", "test=false")
        key = hashlib.sha256(json.dumps([fold.sha256, own]).encode("utf-8", "surrogateescape")).hexdigest()
        runs.append(FoldRun(f"{name}-fold-{number}", directory, own, key, *([tuple(program)] if program else [])))
    return runs


def answer_by_training(runs: Sequence[FoldRun]) -> list[Path]:
    """The folders of each fold's predictions, trained where they are not there yet.

    Raises:
        TrainingError: A training failed.
    """
    with sigterm_stops():
        for number, run in enumerate(runs, start=1):
            with file_lock(run.directory / f".{run.name}.fold.lock"):
                if run.is_done:
                    log.info("fold %d of %d: %s is trained", number, len(runs), run.name)
                else:
                    log.info("fold %d of %d: training %s; what it says: %s", number, len(runs), run.name, run.log)
                    run.train()
    return [run.answers for run in runs]
