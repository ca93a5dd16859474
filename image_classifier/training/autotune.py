"""Numbers that a run finds by trying: batch size, learning rate, and how many steps fit into `trainer.max_time`.

Each trial trains a fresh network for some real steps and throws it away. The random states are restored afterwards, so
a run that found a value is the same to the last bit as one that was given it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks.timer import Timer
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from image_classifier.errors import ConfigError
from image_classifier.modeling.classifier import TTA
from image_classifier.training.builders import TrainingInputs, build_datamodule
from image_classifier.training.callbacks.lr_sweep import StepTimer
from image_classifier.training.callbacks.torch_compile import break_even_s
from image_classifier.training.config import AUTO, TrainConfig
from image_classifier.training.distributed import broadcast, world_size
from image_classifier.training.hardware import Hardware
from image_classifier.training.launch import device_count
from image_classifier.training.learning_rate_finder import find_learning_rate, suggest
from image_classifier.training.lightning_compat import time_limit_s
from image_classifier.training.memory import free_memory, memory_used, reset_peak
from image_classifier.training.trial_trainer import UNSCHEDULED, TrialTrainer, Values

log = logging.getLogger(__name__)

_SMALLEST_BATCH = 16
_MIN_STEPS = 10  # an epoch: a batch holds at most a tenth of the training images
_MIN_GAIN = 1.03  # each doubling of the batch must make training 3 % faster
_TIMED_STEPS, _TIMED_S, _WARMUP = 20, 2.0, 3
_SHARE_PLANNED = 0.9  # of the time; the rest is for checkpoints, plots, and a machine that others use too


def check_choices(config: TrainConfig) -> None:
    """Check what can be checked by its value alone.

    Raises:
        ConfigError: Settings that contradict one another, or a run without an end.
    """
    _check_tta(config)
    _check_length(config)
    fixed = [key for key, value in config.optimizer.node.items() if key.endswith("_lr") and value is not None]
    if config.optimizer.lr == AUTO and fixed:
        raise ConfigError(
            f"optimizer.lr=auto moves all learning rates together, and optimizer.{fixed[0]} is fixed",
            f"set optimizer.{fixed[0]}=null",
        )
    trainer = config.trainer
    if config.data.batch_size == AUTO and (world_size() > 1 or device_count(trainer.accelerator, trainer.devices) > 1):
        raise ConfigError(
            "data.batch_size=auto tries batches on one device",
            "run it with trainer.devices=1 first, and give the batch of all devices",
        )


def _check_tta(config: TrainConfig) -> None:
    tta = config.model.tta
    if tta not in TTA:
        raise ConfigError(f"model.tta={tta} is unknown", f"use one of {', '.join(TTA)}")
    if "flip" in tta and not config.data.flip:
        raise ConfigError(
            f"model.tta={tta} also predicts a mirrored image, and data.flip=false says that it may be of another class",
            "set model.tta=shift or none",
        )


def _check_length(config: TrainConfig) -> None:
    trainer = config.trainer
    if trainer.max_epochs in (None, -1) and trainer.max_time is None and not trainer.has_max_steps:
        raise ConfigError("this run would never end", "set trainer.max_epochs, trainer.max_steps or trainer.max_time")
    if trainer.max_time is not None:
        seconds_of(trainer.max_time)


def autotune(inputs: TrainingInputs, plots: Path) -> TrainingInputs:
    """Return the inputs with a number wherever the configuration has auto: batch size, learning rate, steps, in order.

    The learning rate of a fine-tuning from a probe is left to `learning_rate_finder.with_finetuning_rate`.

    Raises:
        ConfigError: Not even the smallest batch fits, or `trainer.max_time` is too short.
        TrainingError: The loss falls at no learning rate.
    """
    if inputs.config.data.batch_size == AUTO:
        inputs = _with_values(inputs, {"data.batch_size": find_batch_size(TrialTrainer(inputs))})
    if inputs.config.optimizer.lr == AUTO and not inputs.config.finetune.probe:
        inputs = _with_values(inputs, {"optimizer.lr": find_learning_rate(TrialTrainer(inputs), plots, suggest)})
    trainer = inputs.config.trainer
    if trainer.max_time is not None and trainer.max_epochs is None and not trainer.has_max_steps:
        hardware, steps = plan_steps(TrialTrainer(inputs))
        inputs = _with_values(inputs, {"trainer.max_steps": steps, "trainer.compile": hardware.compile})
        inputs = replace(inputs, hardware=hardware)
    return inputs


def _with_values(inputs: TrainingInputs, values: Values) -> TrainingInputs:
    return replace(inputs, config=inputs.config.with_values(values))


def find_batch_size(trials: TrialTrainer) -> int:
    """Return the batch size whose double gains less than 3 % of speed, or is too large for memory or for an epoch.

    Raises:
        ConfigError: Not even the smallest batch fits into memory.
    """
    limit = max(1, trials.num_train // _MIN_STEPS)
    tried: list[tuple[int, float, float]] = []  # batch size, images/s, peak memory
    size, best, reason = min(_SMALLEST_BATCH, limit), 0, ""
    before = memory_used(trials.on_gpu)
    while not reason:
        measured = _speed(trials, size)
        if measured is None:
            reason = f"{size} do not fit into memory"
            break
        speed, peak = measured
        tried.append((size, speed, peak))
        if best and speed < _MIN_GAIN * tried[-2][1]:
            reason = f"{size} are no faster"
            break
        best, size = size, 2 * size
        # The next batch is expected to add twice as much memory as this one did.
        growth = peak - (tried[-2][2] if len(tried) > 1 else before)
        if size > limit:
            reason = f"an epoch of {trials.num_train} images would have fewer than {_MIN_STEPS} steps of {size}"
        elif growth > 0 and 2 * growth > free_memory(trials.on_gpu):
            reason = f"{size} would not fit into memory"
    if not best:
        raise ConfigError(
            f"not even batches of {size} fit into memory: {reason}", "lower data.image_size, or choose a smaller model"
        )
    for size, speed, peak in tried:
        log.info("batch of %5d: %8.1f images/s, peak memory %7.0f MB", size, speed, peak / 2**20)
    log.info("data.batch_size: %d (found: %s; optimizer.lr stays %s)", best, reason, trials.config.optimizer.lr)
    return best


def _speed(trials: TrialTrainer, batch_size: int) -> tuple[float, float] | None:
    """Return images/s and peak memory in bytes of real training steps; None where the device has too little memory."""
    timer = StepTimer(_WARMUP, _TIMED_S)
    values = {
        "data.batch_size": batch_size,
        "data.progressive_sizes": None,  # the last, largest size decides
        "trainer.max_epochs": -1,
        "trainer.max_steps": _WARMUP + _TIMED_STEPS,
        "trainer.limit_val_batches": 0,
    }
    reset_peak(trials.on_gpu)
    try:
        trials.fit({**values, **UNSCHEDULED}, timer)
    except torch.OutOfMemoryError:
        return None
    return batch_size / timer.step_s(), memory_used(trials.on_gpu)


def plan_steps(trials: TrialTrainer) -> tuple[Hardware, int]:
    """Return the optimizer steps that fit into `trainer.max_time` with validations, and whether compiled is faster.

    Raises:
        ConfigError: Not even one step and one validation fit.
    """
    config, allowed_s = trials.config, seconds_of(trials.config.trainer.max_time)
    hardware, step_s, validation_s = _fastest(trials, allowed_s)
    datamodule = build_datamodule(trials.inputs)
    # From seconds a batch to seconds an optimizer step, and to seconds a validation of all images.
    batches = config.trainer.accumulate_grad_batches or 1
    step_s = batches * step_s
    steps_per_epoch = max(1, math.ceil(len(datamodule.train_dataloader()) / batches))
    validation_s *= len(datamodule.val_dataloader())
    # One validation comes at the end; each step bears its share of the others.
    every = config.trainer.check_val_every_n_epoch or 1
    left_s = allowed_s * _SHARE_PLANNED - validation_s
    planned = int(left_s / (step_s + validation_s / (every * steps_per_epoch)))
    if planned < 1:
        raise ConfigError(
            f"trainer.max_time={config.trainer.max_time} is too short for one step and one validation",
            f"allow {step_s + validation_s:.0f} s",
        )
    log.info(
        "trainer.max_steps: %d, %.1f epochs (found: %.3g s a step and %.3g s a validation, "
        "so that the schedule ends within %.0f s)",
        planned,
        planned / steps_per_epoch,
        step_s,
        validation_s,
        allowed_s,
    )
    return hardware, planned


def _fastest(trials: TrialTrainer, allowed_s: float) -> tuple[Hardware, float, float]:
    """Return the faster hardware settings, compiled or not, with seconds a training batch and a validation batch."""
    hardware = trials.inputs.hardware
    choices: Sequence[str | bool] = [hardware.compile]
    if hardware.compile == AUTO:
        pays = allowed_s > break_even_s("cuda" if trials.on_gpu else "cpu")
        choices = [False, True] if pays else [False]
    timed = [(*_times(trials, tried), tried) for tried in (replace(hardware, compile=choice) for choice in choices)]
    step_s, validation_s, best = min(timed, key=lambda row: row[:2])
    if len(timed) > 1:
        log.info(
            "torch.compile: %s (%.3g s a step without, %.3g s with)",
            "on" if best.compile else "off",
            timed[0][0],
            timed[1][0],
        )
    return best, step_s, validation_s


def _times(trials: TrialTrainer, hardware: Hardware) -> tuple[float, float]:
    """Return seconds a training batch and a validation batch, the same on all ranks."""
    sizes = len(trials.config.data.progressive_sizes or [1])
    timer = StepTimer(_WARMUP, None, phases=sizes)
    steps = (_WARMUP + max(3, _TIMED_STEPS // (2 * sizes))) * sizes
    values = {"trainer.max_epochs": -1, "trainer.max_steps": steps, "trainer.limit_val_batches": 3}
    trials.fit(values, timer, hardware=hardware)
    times: tuple[float, float] = broadcast((timer.step_s(undisturbed=False), timer.validation_s()))
    return times


def seconds_of(max_time: Any) -> float:
    """Return `trainer.max_time` in seconds: days:hours:minutes:seconds, or a mapping such as {minutes: 30}.

    >>> seconds_of("00:00:30:00"), seconds_of({"minutes": 2})
    (1800.0, 120.0)
    """
    try:
        duration = time_limit_s(
            Timer(duration=dict(max_time) if not isinstance(max_time, str | timedelta) else max_time)
        )
    except (MisconfigurationException, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"trainer.max_time={max_time} is not a time", 'write "days:hours:minutes:seconds", such as "00:00:30:00"'
        ) from error
    return float(duration or 0)
