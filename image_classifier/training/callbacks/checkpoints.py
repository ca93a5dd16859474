"""Checkpoints of a run: the best epoch and the newest steps, in separate files; a run can resume from each of them."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from image_classifier.errors import ConfigError
from image_classifier.training.callbacks.exact_resume import batches_done_in_epoch, is_accumulating
from image_classifier.training.checkpoint_io import BEST, LAST, damage, make_last, step_path, steps
from image_classifier.training.distributed import broadcast, world_size
from image_classifier.training.lightning_compat import callbacks_of, is_dev_run

log = logging.getLogger(__name__)

STEPS_BETWEEN_CHECKS = 8  # several processes agree on what one of them knows once in so many steps: it is a round trip


class BetweenSteps(Callback):
    """Base of callbacks that act where a checkpoint may be taken: before an epoch, between steps, after the last."""

    _validated_at = -1

    def between_steps(self, trainer: pl.Trainer, at_epoch_end: bool) -> None:
        """Act on every rank, after all of the last step and before any of the next."""
        raise NotImplementedError

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated_at = trainer.fit_loop.epoch_loop.batch_progress.total.completed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Right after a validation in mid-epoch Lightning's restart would validate again: wait for one more step.
        has_just_validated = self._validated_at == trainer.fit_loop.epoch_loop.batch_progress.total.completed
        if batches_done_in_epoch(trainer) and not has_just_validated and not is_accumulating(trainer):
            self.between_steps(trainer, at_epoch_end=False)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step:
            self.between_steps(trainer, at_epoch_end=True)


class LastCheckpoint(BetweenSteps):
    """Writer of `step-NNNNNNNNN.ckpt`, the newest `keep` of them, and of `last.ckpt`, a fixed name for the newest."""

    def __init__(
        self,
        dirpath: str,
        keep: int = 2,
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
    ) -> None:
        """Set the folder and the intervals; each interval that is not None adds checkpoints.

        Args:
            dirpath: The folder.
            keep: Number of newest checkpoints to keep.
            every_n_epochs: Write one at the end of every n-th epoch.
            every_n_steps: Write one after every n optimizer steps.
            every_n_minutes: Write one when the newest is that old.

        Raises:
            ConfigError: A number is not above 0.
        """
        numbers = {
            "keep": keep,
            "every_n_epochs": every_n_epochs,
            "every_n_steps": every_n_steps,
            "every_n_minutes": every_n_minutes,
        }
        for name, value in numbers.items():
            if value is not None and value <= 0:
                raise ConfigError(f"invalid callbacks.last_checkpoint.{name}={value}", "use a number above 0")
        self.directory = Path(dirpath)
        self.keep = keep
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.newest = ""
        self._saved_step = 0
        self._saved_time_s = math.inf

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = trainer.global_step
        self._saved_time_s = time.monotonic()
        self.newest = next((str(path) for _, path in steps(self.directory)), "")  # the one that a run resumes from

    def between_steps(self, trainer: pl.Trainer, at_epoch_end: bool) -> None:
        if trainer.global_step > self._saved_step and (
            self._is_due(trainer, at_epoch_end) or (at_epoch_end and self._is_due_by_epochs(trainer))
        ):
            self.save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        in_mid_epoch = batches_done_in_epoch(trainer) != trainer.num_training_batches
        if (
            in_mid_epoch
            and trainer.global_step > self._saved_step
            and not is_accumulating(trainer)
            and self._is_due(trainer, True)
        ):
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write a checkpoint of this step.

        Raises:
            StorageError: The disk refuses; the old checkpoints are kept.
        """
        if is_dev_run(trainer):
            return
        path = step_path(self.directory, trainer.global_step)
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            make_last(path, self.keep)
        self._saved_step = trainer.global_step
        self._saved_time_s = time.monotonic()
        self.newest = str(path)

    def _is_due_by_epochs(self, trainer: pl.Trainer) -> bool:
        return bool(self.every_n_epochs) and trainer.current_epoch % (self.every_n_epochs or 1) == 0

    def _is_due(self, trainer: pl.Trainer, at_rare_hook: bool) -> bool:
        """Return whether enough steps or minutes have passed; several processes use the main one's clock."""
        if self.every_n_steps and trainer.global_step // self.every_n_steps > self._saved_step // self.every_n_steps:
            return True
        is_check_step = at_rare_hook or trainer.global_step % STEPS_BETWEEN_CHECKS == 0
        if not self.every_n_minutes or (world_size() > 1 and not is_check_step):
            return False
        return bool(broadcast(time.monotonic() - self._saved_time_s > 60 * self.every_n_minutes))


def last_checkpoint(trainer: pl.Trainer) -> LastCheckpoint | None:
    """Return the callback that keeps the newest steps, None where the configuration has none."""
    return next(iter(callbacks_of(trainer, LastCheckpoint)), None)


def final_checkpoint(trainer: pl.Trainer) -> Path | None:
    """Return the checkpoint with the result of a run: the best one, else the newest; None where none was kept."""
    if is_dev_run(trainer):
        return None
    best = [callback.path for callback in callbacks_of(trainer, BestCheckpoint)]
    last = [callback.directory / LAST for callback in callbacks_of(trainer, LastCheckpoint)]
    return next((path for path in (*best, *last) if path.exists()), None)


class BestCheckpoint(Callback):
    """Writer of `best.ckpt`, the epoch with the best validation by one metric."""

    def __init__(self, dirpath: str, monitor: str = "val/f1_macro", mode: str = "max") -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"invalid callbacks.best_checkpoint.mode={mode}", "use min or max")
        self.path = Path(dirpath) / BEST
        self.monitor = monitor
        self.mode = mode
        self.score = -math.inf if mode == "max" else math.inf

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or is_dev_run(trainer):
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if self.monitor not in metrics:
            raise ConfigError(
                f"callbacks.best_checkpoint.monitor={self.monitor} is not a validation metric",
                f"use one of {', '.join(metrics)}",
            )
        value = metrics[self.monitor]
        if value > self.score if self.mode == "max" else value < self.score:
            self.score = value
            trainer.save_checkpoint(self.path, weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "monitor": self.monitor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["monitor"] != self.monitor:
            return
        reason = damage(self.path) if self.path.exists() else "it is missing"
        if reason and math.isfinite(state["score"]):
            log.warning(
                "cannot read the best checkpoint %s (%s): the best of the remaining epochs replaces it",
                self.path,
                reason,
            )
            self.path.unlink(missing_ok=True)
        else:
            self.score = state["score"]
