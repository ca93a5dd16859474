"""torch.compile where it pays: tried once in a run that is long enough, kept only where the steps become faster and the gradients stay numbers."""

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
from image_classifier.training.callbacks.lr_sweep import now_on
from image_classifier.training.hardware import processor_flags
from image_classifier.training.module import ClassifierModule

log = logging.getLogger(__name__)

_WATCHED = 12  # steps timed before and after; the first few of them are warm-up
_WARMUP = 4


def break_even_s(device: str) -> float:
    """A rest of the run of so many seconds repays a compilation, which may turn out to be in vain; processors gain most where they have AMX."""
    return {"cpu": 180.0 if "amx_bf16" in processor_flags() else 900.0, "cuda": 180.0}.get(device, float("inf"))


class TorchCompile(Callback):
    """Compiles the backbone for training steps; validation and export stay uncompiled, as their shapes differ.

    With `at_once` from the first step. Else the first steps are timed; where the rest of the run would take long enough the backbone is
    compiled, the steps are timed again, and the faster way stays. A compiled network whose first gradients are not finite is given up.
    """

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once
        self._times: list[float] = []
        self._uncompiled_s = 0.0
        self._unproven = False  # compiled, and no gradient seen yet
        self._state = "off"
        self._last = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._state, self._times = "watching", []
        if self.at_once:
            _compile(pl_module)
            self._state, self._unproven = "done", True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._state != "done":
            self._last = now_on(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._state == "done":
            return
        self._times.append(now_on(pl_module) - self._last)
        if len(self._times) < _WATCHED:
            return
        step_s, self._times = median(self._times[_WARMUP:]), []
        if self._state == "watching":
            self._try(trainer, pl_module, step_s)
        else:
            self._judge(pl_module, step_s)

    def _try(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step_s: float) -> None:
        left_s, worth_s = _seconds_left(trainer, step_s), break_even_s(pl_module.device.type)
        if left_s < worth_s:
            log.info(
                "torch.compile: off (%.0f s of training do not repay it; from %.0f s on it is tried)", left_s, worth_s
            )
            self._state = "done"
            return
        log.info("torch.compile: tried, as the rest would take %.0f s without", left_s)
        self._uncompiled_s, self._state = step_s, "trying"
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        try:
            _compile(pl_module)
            self._unproven = True
        except ConfigError as error:
            log.info("torch.compile: off (%s)", error.fact)
            self._state = "done"

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._unproven or getattr(
            trainer.precision_plugin, "scaler", None
        ):  # float16's scaled gradients may overflow in any network
            return
        self._unproven = False
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            log.warning(
                "torch.compile: off (the gradients of the compiled network are not finite; its step is left out)"
            )
            _uncompile(pl_module)
            pl_module.zero_grad(set_to_none=True)
            self._state = "done"

    def _judge(self, pl_module: pl.LightningModule, step_s: float) -> None:
        gain = self._uncompiled_s / step_s
        self._state = "done"
        if gain < 1.03:
            _uncompile(pl_module)
        log.info("torch.compile: %s (a step is %.2f times as fast)", "on" if gain >= 1.03 else "off", gain)

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
    steps = (float(trainer.estimated_stepping_batches) - trainer.global_step) * trainer.accumulate_grad_batches
    timers = [callback.time_remaining() for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return min([step_s * steps, *(seconds for seconds in timers if seconds is not None)])


def _compile(pl_module: pl.LightningModule) -> None:
    """Mark the backbone for compiling at its next call; its parameters keep their names. ConfigError where there is no compiler."""
    if pl_module.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise ConfigError("no C++ compiler is installed", "install g++, or set trainer.compile=false")
    cast(ClassifierModule, pl_module).classifier.backbone.compile()


def _uncompile(pl_module: pl.LightningModule) -> None:
    cast(ClassifierModule, pl_module).classifier.backbone._compiled_call_impl = None
