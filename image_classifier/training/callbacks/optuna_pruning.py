"""Pruning of a trial of `tune`: it prints a line after each validation and reads back whether to continue."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from image_classifier.errors import ConfigError
from image_classifier.text import did_you_mean
from image_classifier.training.tuning.subprocess_run import GO_ON, MARK, STOP


class OptunaPruning(Callback):
    """Reports the metric after each validation to the tuner, and ends the run where the tuner prunes the trial.

    The tuner started this process: reports go to standard output, answers come from standard input. When the tuner
    dies, standard input closes, and the run stops as on SIGTERM: it saves its newest step for the worker that resumes
    it.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.validations = 0
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._listener: threading.Thread | None = None

    @property
    def state_key(self) -> str:
        """The name of the state in checkpoints, which is the class's old name."""
        return "ReportToTuner"

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and self._listener is None:
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self.metric not in trainer.callback_metrics:
            names = [name for name in trainer.callback_metrics if name.startswith("val/")]
            raise ConfigError(
                f"tune.metric={self.metric} is not a validation metric",
                f"{did_you_mean(self.metric, names)}use one of {', '.join(names)}",
            )
        self.validations += 1
        answer = self._ask(float(trainer.callback_metrics[self.metric])) if trainer.is_global_zero else ""
        if trainer.strategy.broadcast(answer) == STOP:
            raise SystemExit(0)

    def _ask(self, value: float) -> str:
        print(f"{MARK}{json.dumps([self.validations, value])}", flush=True)
        return self._answers.get()

    def _listen(self) -> None:
        """Queue the tuner's answers; not through sys.stdin, whose lock a thread must not hold when Python exits."""
        while words := os.read(sys.__stdin__.fileno() if sys.__stdin__ else 0, 4096):
            for word in words.decode().split():
                self._answers.put(word)
        # The tuner is gone: the run must not wait for an answer, and must stop.
        self._answers.put(GO_ON)
        os.kill(os.getpid(), signal.SIGTERM)
