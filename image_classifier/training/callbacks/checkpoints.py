"""Which checkpoints a run keeps: the best epoch and the newest steps, in separate files, each one a place to go on from."""

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

log = logging.getLogger(__name__)

STEPS_BETWEEN_LOOKS = (
    8  # several processes agree about what only one of them knows once in so many steps: each time costs a round trip
)


class BetweenSteps(Callback):
    """Calls `between_steps` wherever a checkpoint may be taken: before an epoch, between two steps, after the last."""

    _validated_at = -1

    def between_steps(self, trainer: pl.Trainer, at_epoch_end: bool) -> None:
        """Called on every rank, with all of the last step done and nothing of the next begun."""
        raise NotImplementedError

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated_at = trainer.fit_loop.epoch_loop.batch_progress.total.completed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Right after a validation in the middle of an epoch Lightning's restart would validate again: then one step later.
        validated = self._validated_at == trainer.fit_loop.epoch_loop.batch_progress.total.completed
        if batches_done_in_epoch(trainer) and not validated and not is_accumulating(trainer):
            self.between_steps(trainer, at_epoch_end=False)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step:
            self.between_steps(trainer, at_epoch_end=True)


class LastCheckpoint(BetweenSteps):
    """`step-NNNNNNNNN.ckpt`, the newest `keep` of them, and `last.ckpt`, the newest under a name that stays."""

    def __init__(
        self,
        dirpath: str,
        keep: int = 2,
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
    ) -> None:
        """Where and how often.

        Args:
            dirpath: The folder.
            keep: How many of the newest stay.
            every_n_epochs: A checkpoint at the end of every n-th epoch; None: not by epochs.
            every_n_steps: And after every n optimizer steps.
            every_n_minutes: And when the newest is that old.

        Raises:
            ConfigError: A number that cannot be.
        """
        numbers = {
            "keep": keep,
            "every_n_epochs": every_n_epochs,
            "every_n_steps": every_n_steps,
            "every_n_minutes": every_n_minutes,
        }
        for name, value in numbers.items():
            if value is not None and value <= 0:
                raise ConfigError(f"invalid callbacks.last_checkpoint.{name} {value}", "expected a number above 0")
        self.directory, self.keep = Path(dirpath), keep
        self.every_n_epochs, self.every_n_steps, self.every_n_minutes = every_n_epochs, every_n_steps, every_n_minutes
        self._step, self._time, self.newest = 0, math.inf, ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step, self._time = trainer.global_step, time.monotonic()
        self.newest = next((str(path) for _, path in steps(self.directory)), "")  # where the run goes on

    def between_steps(self, trainer: pl.Trainer, at_epoch_end: bool) -> None:
        if trainer.global_step > self._step and (
            self._is_late(trainer, at_epoch_end) or (at_epoch_end and self._is_epoch(trainer))
        ):
            self.save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        in_the_middle = batches_done_in_epoch(trainer) != trainer.num_training_batches
        if (
            in_the_middle
            and trainer.global_step > self._step
            and not is_accumulating(trainer)
            and self._is_late(trainer, True)
        ):
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write a checkpoint of this place in the run; StorageError where the disk refuses, and then the old ones stay."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = step_path(self.directory, trainer.global_step)
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            make_last(path, self.keep)
        self._step, self._time, self.newest = trainer.global_step, time.monotonic(), str(path)

    def _is_epoch(self, trainer: pl.Trainer) -> bool:
        return bool(self.every_n_epochs) and trainer.current_epoch % (self.every_n_epochs or 1) == 0

    def _is_late(self, trainer: pl.Trainer, rare: bool) -> bool:
        """Whether so many steps or minutes have passed; several processes go by the main one's clock."""
        if self.every_n_steps and trainer.global_step // self.every_n_steps > self._step // self.every_n_steps:
            return True
        if not self.every_n_minutes or (world_size() > 1 and not rare and trainer.global_step % STEPS_BETWEEN_LOOKS):
            return False
        return broadcast(time.monotonic() - self._time > 60 * self.every_n_minutes)


def last_checkpoint(trainer: pl.Trainer) -> LastCheckpoint | None:
    """The callback that keeps the newest steps, unless the configuration left it out."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, LastCheckpoint)), None)  # type: ignore[attr-defined]


def final_checkpoint(trainer: pl.Trainer) -> Path | None:
    """The checkpoint whose weights are the result of a run: the best one, else the newest; None where none was kept."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    best = [callback.path for callback in trainer.callbacks if isinstance(callback, BestCheckpoint)]  # type: ignore[attr-defined]
    last = [callback.directory / LAST for callback in trainer.callbacks if isinstance(callback, LastCheckpoint)]  # type: ignore[attr-defined]
    return next((path for path in (*best, *last) if path.exists()), None)


class BestCheckpoint(Callback):
    """`best.ckpt`: the validation with the best value of one metric."""

    def __init__(self, dirpath: str, monitor: str = "val/f1_macro", mode: str = "max") -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"invalid callbacks.best_checkpoint.mode {mode}", "expected min or max")
        self.path, self.monitor, self.mode = Path(dirpath) / BEST, monitor, mode
        self.score = -math.inf if mode == "max" else math.inf

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        seen = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if self.monitor not in seen:
            raise ConfigError(
                f"callbacks.best_checkpoint.monitor={self.monitor} is no metric of a validation",
                f"use one of {', '.join(seen)}",
            )
        value = seen[self.monitor]
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
                "the best checkpoint %s cannot be read (%s): the best of the epochs still to come takes its place",
                self.path,
                reason,
            )
            self.path.unlink(missing_ok=True)
        else:
            self.score = state["score"]
