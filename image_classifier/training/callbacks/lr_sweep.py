"""Callbacks of autotune's short trials: a sweep of the learning rate, and a timer of steps."""

from __future__ import annotations

import math
import time
from statistics import mean, quantiles
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

_DIVERGED = 4.0  # times the lowest smoothed loss
_SMOOTHING = 0.9  # of the running mean, which only decides when to stop


class LearningRateSweep(Callback):
    """Learning rate range test (Smith, 2017): multiplies the rates by one factor per step, records losses, stops early.

    Raises the learning rate of every parameter group from `lowest` to `highest`, and stops where the loss diverges.
    """

    def __init__(self, lowest: float, highest: float, steps: int) -> None:
        self.factor = (highest / lowest) ** (1 / max(1, steps - 1))
        self.lowest = lowest
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._base_rates: list[float] = []  # of the parameter groups
        self._rate = lowest
        self._running_loss = 0.0
        self._best_loss = math.inf
        self._step = 0
        self._losses_of_step: list[float] = []  # of the batches accumulated for one optimizer step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        groups = trainer.optimizers[0].param_groups
        self._base_rates = self._base_rates or [float(group["lr"]) for group in groups]
        # Groups keep the ratios of their learning rates.
        for group, base_rate in zip(groups, self._base_rates, strict=True):
            group["lr"] = base_rate * self.factor**trainer.global_step
        self._rate = self.lowest * self.factor**trainer.global_step
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The mean over the ranks, so that all of them stop at the same step.
        loss = float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean"))
        if not math.isfinite(loss):
            trainer.should_stop = True
            return
        # Wait until the optimizer has stepped: gradients may accumulate over several batches.
        self._losses_of_step.append(loss)
        if trainer.global_step == self._step:
            return
        # A sum is the mean loss of the step: Lightning has divided each by the number of batches a step.
        loss = sum(self._losses_of_step)
        self._losses_of_step = []
        self.rates.append(self._rate)
        self.losses.append(loss)
        # An exponential running mean, corrected for its start at zero.
        self._running_loss = _SMOOTHING * self._running_loss + (1 - _SMOOTHING) * loss
        smoothed = self._running_loss / (1 - _SMOOTHING ** len(self.losses))
        self._best_loss = min(self._best_loss, smoothed)
        trainer.should_stop = smoothed > _DIVERGED * self._best_loss


class StepTimer(Callback):
    """Timer of training steps and validation batches that stops the trial after `seconds`, None: never.

    The first `warmup` steps of each of the `phases` are not counted: the image size changes from phase to phase.
    """

    def __init__(self, warmup: int, seconds: float | None, phases: int = 1) -> None:
        self.warmup = warmup
        self.seconds = seconds
        self.phases = phases
        self.steps: list[float] = []
        self.validations: list[float] = []
        self._step_start = 0.0
        self._validation_start = 0.0

    def step_s(self, undisturbed: bool = True) -> float:
        """Return the seconds a step takes, averaged over the phases.

        `undisturbed`: the lower quartile of each phase, as a busy machine only makes steps slower; else the mean, which
        adds up to the time of a run.
        """
        size = max(1, len(self.steps) // self.phases)
        phases = [self.steps[number * size : (number + 1) * size] for number in range(self.phases)]
        average = _lower_quartile if undisturbed else mean
        return mean(average(times[min(self.warmup, len(times) - 1) :]) for times in phases if times)

    def validation_s(self) -> float:
        """Return the seconds a validation batch takes, without the first one where there are more."""
        return mean(self.validations[1:] or self.validations or [0.0])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step_start = 0.0  # there may have been a validation in between

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step_start = self._step_start or synchronized_time_s(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # From the end of one step to the end of the next, so that making the batch counts too.
        now = synchronized_time_s(pl_module)
        self.steps.append(now - self._step_start)
        self._step_start = now
        timed = self.steps[self.warmup :]
        if self.seconds is not None and len(timed) >= 5 and sum(timed) > self.seconds:
            trainer.should_stop = True

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._validation_start = synchronized_time_s(pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.validations.append(synchronized_time_s(pl_module) - self._validation_start)


def synchronized_time_s(pl_module: pl.LightningModule) -> float:
    """Return the seconds of a clock, after waiting for all work on the module's device."""
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _lower_quartile(times: list[float]) -> float:
    return quantiles(times, n=4)[0] if len(times) > 1 else times[0]
