"""What watches the steps of a rehearsal: the sweep of the learning rate, and a stopwatch."""

from __future__ import annotations

import math
import time
from statistics import mean, quantiles
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

_DIVERGED = 4.0  # times the lowest smoothed loss
_MEMORY = 0.9  # of the running mean that only decides when to stop


class LearningRateSweep(Callback):
    """Raises every group's learning rate by one factor a step, from `lowest` to `highest`, and keeps rates and losses; stops where they diverge."""

    def __init__(self, lowest: float, highest: float, steps: int) -> None:
        self.factor = (highest / lowest) ** (1 / max(1, steps - 1))
        self.lowest, self.rates, self.losses = lowest, list[float](), list[float]()
        self._first: list[float] = []
        self._rate, self._running, self._best = lowest, 0.0, math.inf
        self._step, self._of_step = 0, list[float]()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        groups = trainer.optimizers[0].param_groups
        self._first = self._first or [float(group["lr"]) for group in groups]
        for group, first in zip(groups, self._first, strict=True):
            group["lr"] = first * self.factor**trainer.global_step
        self._rate, self._step = self.lowest * self.factor**trainer.global_step, trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean"))
        if not math.isfinite(loss):
            trainer.should_stop = True
            return
        self._of_step.append(loss)
        if trainer.global_step == self._step:
            return  # gradients are still gathered
        loss, self._of_step = sum(self._of_step), []  # Lightning has divided each by the number of batches a step
        self.rates.append(self._rate)
        self.losses.append(loss)
        self._running = _MEMORY * self._running + (1 - _MEMORY) * loss
        smooth = self._running / (1 - _MEMORY ** len(self.losses))
        self._best = min(self._best, smooth)
        trainer.should_stop = smooth > _DIVERGED * self._best


class StepTimer(Callback):
    """Times steps, the first ones of each phase left out, and validation batches; stops after `seconds` where they are given."""

    def __init__(self, warmup: int, seconds: float | None, phases: int = 1) -> None:
        self.warmup, self.seconds, self.phases = warmup, seconds, phases
        self.steps: list[float] = []
        self.validations: list[float] = []
        self._start, self._begun = 0.0, 0.0

    def step_s(self, undisturbed: bool = True) -> float:
        """Seconds a step, the mean of the phases: of each the lower quartile, as a busy machine only ever adds, or the mean, as that adds up."""
        size = max(1, len(self.steps) // self.phases)
        phases = [self.steps[number * size : (number + 1) * size] for number in range(self.phases)]
        judge = _quartile if undisturbed else mean
        return mean(judge(times[min(self.warmup, len(times) - 1) :]) for times in phases if times)

    def validation_s(self) -> float:
        """Seconds a validation batch, the first one left out where there are more."""
        return mean(self.validations[1:] or self.validations or [0.0])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = 0.0  # a validation may have come between

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = self._start or now_on(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = now_on(pl_module)
        self.steps.append(now - self._start)  # from the end of one to the end of the next: making the batch counts
        self._start = now
        timed = self.steps[self.warmup :]
        if self.seconds is not None and len(timed) >= 5 and sum(timed) > self.seconds:
            trainer.should_stop = True

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._begun = now_on(pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.validations.append(now_on(pl_module) - self._begun)


def now_on(pl_module: pl.LightningModule) -> float:
    """Seconds of a clock that has waited for what the device was asked to do."""
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _quartile(times: list[float]) -> float:
    return quantiles(times, n=4)[0] if len(times) > 1 else times[0]
