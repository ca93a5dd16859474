"""torch.compile where it pays: tried in runs that are long enough, kept where steps get faster and stay finite."""

from __future__ import annotations

import logging
import os
import shutil
from statistics import median
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Timer

from image_classifier.errors import ConfigError
from image_classifier.training.callbacks.lr_sweep import synchronized_time_s
from image_classifier.training.hardware import processor_flags
from image_classifier.training.lightning_compat import callbacks_of
from image_classifier.training.module import ClassifierModule

log = logging.getLogger(__name__)

_NUM_TIMED = 12  # steps timed before and after
_WARMUP = 4  # the first of them, which do not count
_MIN_GAIN = 1.03


def break_even_s(device: str) -> float:
    """Return how many seconds of training a compilation must have ahead to be worth trying, in vain or not.

    CPUs gain most where they have AMX.
    """
    cpu_s = 180.0 if "amx_bf16" in processor_flags() else 900.0
    return {"cpu": cpu_s, "cuda": 180.0}.get(device, float("inf"))


class TorchCompile(Callback):
    """Compiles the backbone for training steps; validation and export stay uncompiled, as their shapes differ.

    With `at_once` it compiles before the first step. Else it times the first steps; where the rest of the run takes
    long enough it compiles the backbone, times the steps again, and keeps the faster way. A compiled network whose
    first gradients are not finite is given up.
    """

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once
        self._state = "off"  # then watching, trying, done
        self._times_s: list[float] = []
        self._uncompiled_s = 0.0  # a step without torch.compile
        self._is_unproven = False  # compiled, and no gradient was seen yet
        self._step_start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._state = "watching"
        self._times_s = []
        if self.at_once:
            _compile(pl_module)
            self._state = "done"
            self._is_unproven = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._state != "done":
            self._step_start = synchronized_time_s(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._state == "done":
            return
        self._times_s.append(synchronized_time_s(pl_module) - self._step_start)
        if len(self._times_s) < _NUM_TIMED:
            return
        step_s = median(self._times_s[_WARMUP:])
        self._times_s = []
        if self._state == "watching":
            self._try(trainer, pl_module, step_s)
        else:
            self._judge(pl_module, step_s)

    def _try(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step_s: float) -> None:
        left_s = _seconds_left(trainer, step_s)
        needed_s = break_even_s(pl_module.device.type)
        if left_s < needed_s:
            log.info("torch.compile: off (%.0f s of training are left; it is tried from %.0f s on)", left_s, needed_s)
            self._state = "done"
            return
        log.info("torch.compile: trying it, as %.0f s of training are left", left_s)
        self._uncompiled_s = step_s
        self._state = "trying"
        torch._dynamo.config.suppress_errors = True  # parts that cannot be compiled run as they are
        try:
            _compile(pl_module)
            self._is_unproven = True
        except ConfigError as error:
            log.info("torch.compile: off (%s)", error.fact)
            self._state = "done"

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # float16: scaled gradients may overflow in any network.
        has_scaler = bool(getattr(trainer.precision_plugin, "scaler", None))
        if not self._is_unproven or has_scaler:
            return
        self._is_unproven = False
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            log.warning("torch.compile: off (the compiled network's gradients are not finite; its step is skipped)")
            _uncompile(pl_module)
            pl_module.zero_grad(set_to_none=True)
            self._state = "done"

    def _judge(self, pl_module: pl.LightningModule, step_s: float) -> None:
        gain = self._uncompiled_s / step_s
        self._state = "done"
        if gain < _MIN_GAIN:
            _uncompile(pl_module)
        log.info("torch.compile: %s (a step is %.2f times as fast)", "on" if gain >= _MIN_GAIN else "off", gain)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.compiler.set_stance("default")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        torch.compiler.set_stance("default")
        _uncompile(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _uncompile(pl_module)


def _seconds_left(trainer: pl.Trainer, step_s: float) -> float:
    """Return the time to the end of the run, by its steps or its time limit."""
    steps = (float(trainer.estimated_stepping_batches) - trainer.global_step) * trainer.accumulate_grad_batches
    limits = [timer.time_remaining() for timer in callbacks_of(trainer, Timer)]
    return min([step_s * steps, *(seconds for seconds in limits if seconds is not None)])


def _compile(pl_module: pl.LightningModule) -> None:
    """Mark the backbone for compiling at its next call; the names of its parameters stay.

    Raises:
        ConfigError: There is no C++ compiler.
    """
    if pl_module.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise ConfigError("no C++ compiler is installed", "install g++, or set trainer.compile=false")
    cast(ClassifierModule, pl_module).classifier.backbone.compile()


def _uncompile(pl_module: pl.LightningModule) -> None:
    cast(ClassifierModule, pl_module).classifier.backbone._compiled_call_impl = None  # torch has no public way back
