"""Numbers that a run finds by trying: batch size, learning rate, and how many steps fit into `trainer.max_time`.

Each trial trains a fresh network for some real steps and throws it away. The random states are restored afterwards, so
a run that found a value is the same to the last bit as one that was given it.
"""

from __future__ import annotations

import csv
import gc
import io
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks.timer import Timer
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

from image_classifier.atomic_io import write_text
from image_classifier.errors import ConfigError, TrainingError
from image_classifier.evaluation.plots.learning_curves import plot_learning_rate_finder
from image_classifier.modeling.classifier import TTA
from image_classifier.training.builders import TrainingInputs, build_datamodule, build_module, build_trainer
from image_classifier.training.callbacks.exact_resume import random_state, set_random_state
from image_classifier.training.callbacks.lr_sweep import LearningRateSweep, StepTimer
from image_classifier.training.callbacks.throughput import Throughput
from image_classifier.training.callbacks.torch_compile import break_even_s
from image_classifier.training.config import AUTO, TrainConfig
from image_classifier.training.distributed import broadcast, is_rank_zero, world_size
from image_classifier.training.hardware import Hardware
from image_classifier.training.launch import device_count, uses_gpu
from image_classifier.training.lightning_compat import time_limit_s
from image_classifier.training.memory import free_memory, memory_used, reset_peak

log = logging.getLogger(__name__)

_SWEEP_STEPS, _LOWEST_RATE, _HIGHEST_RATE = 100, 1e-6, 10.0
_SMALLEST_BATCH = 16
_MIN_STEPS = 10  # an epoch: a batch holds at most a tenth of the training images
_MIN_GAIN = 1.03  # each doubling of the batch must make training 3 % faster
_TIMED_STEPS, _TIMED_S, _WARMUP = 20, 2.0, 3
_UNSCHEDULED = {"scheduler.build": None, "scheduler.warmup": 0.0}
_SHARE_PLANNED = 0.9  # of the time; the rest is for checkpoints, plots, and a machine that others use too

Values = Mapping[str, Any]  # of the configuration, by dotted key


@dataclass(frozen=True)
class TrialTrainer:
    """Trains throw-away networks on everything that the run itself will be made of."""

    inputs: TrainingInputs

    @property
    def config(self) -> TrainConfig:
        """The configuration of the run."""
        return self.inputs.config

    @property
    def num_train(self) -> int:
        """Training images."""
        return len(self.inputs.manifest.indices("train"))

    @property
    def on_gpu(self) -> bool:
        """Whether steps run on a GPU, whose memory counts then."""
        return uses_gpu(self.config.trainer.accelerator)

    def fit(self, values: Values, *callbacks: pl.Callback, hardware: Hardware | None = None) -> None:
        """Train a fresh network with these values in the configuration, and forget it."""
        fixed: Values = {
            "callbacks": {},
            "logger": None,
            "trainer.max_time": None,
            "trainer.check_val_every_n_epoch": 1,
        }
        config = self.config.with_values({**fixed, **values})
        inputs = replace(self.inputs, config=config, hardware=hardware or self.inputs.hardware)
        with _without_trace():
            datamodule = build_datamodule(inputs)
            module = build_module(inputs)
            trainer = build_trainer(config, inputs.hardware, Throughput(), *callbacks)
            try:
                trainer.fit(module, datamodule=datamodule)
            except SIGTERMException:
                raise SystemExit(143) from None
            if trainer.interrupted:
                raise KeyboardInterrupt


@contextmanager
def _without_trace() -> Iterator[None]:
    """Put every random state back at the end of the block, and log only warnings in it."""
    logger = logging.getLogger("image_classifier")
    level, state = logger.level, random_state()
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        set_random_state(state)
        logger.setLevel(level)
        gc.collect()
        torch.cuda.empty_cache()


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
    """Return the inputs with a number wherever the configuration has auto: batch size, then learning rate, then steps.

    Raises:
        ConfigError: Not even the smallest batch fits, or `trainer.max_time` is too short.
        TrainingError: The loss falls at no learning rate.
    """
    if inputs.config.data.batch_size == AUTO:
        inputs = _with_values(inputs, {"data.batch_size": find_batch_size(TrialTrainer(inputs))})
    if inputs.config.optimizer.lr == AUTO:
        inputs = _with_values(inputs, {"optimizer.lr": find_learning_rate(TrialTrainer(inputs), plots)})
    trainer = inputs.config.trainer
    if trainer.max_time is not None and trainer.max_epochs is None and not trainer.has_max_steps:
        hardware, steps = plan_steps(TrialTrainer(inputs))
        inputs = _with_values(inputs, {"trainer.max_steps": steps, "trainer.compile": hardware.compile})
        inputs = replace(inputs, hardware=hardware)
    return inputs


def _with_values(inputs: TrainingInputs, values: Values) -> TrainingInputs:
    return replace(inputs, config=inputs.config.with_values(values))


def find_learning_rate(trials: TrialTrainer, plots: Path) -> float:
    """Return the rate at which the loss falls fastest in a sweep with rising rates (Smith, 2017, section 3.3)."""
    sweep = LearningRateSweep(_LOWEST_RATE, _HIGHEST_RATE, _SWEEP_STEPS)
    steps = {"trainer.max_steps": _SWEEP_STEPS, "trainer.max_epochs": -1, "trainer.limit_val_batches": 0}
    fixed = {"data.progressive_sizes": None, "optimizer.lr": _LOWEST_RATE}
    trials.fit({**steps, **_UNSCHEDULED, **fixed}, sweep)
    rates, losses = np.array(sweep.rates), np.array(sweep.losses)
    smooth = smoothed(losses)
    rate: float | None = broadcast(suggest(rates, smooth) if is_rank_zero() else None)
    figure = plots / "learning_rate_finder.png"
    if is_rank_zero():
        plot_learning_rate_finder(rates, losses, smooth, rate, figure)
        rows = zip(rates, losses, smooth, strict=True)
        write_text(figure.with_suffix(".csv"), _table(["learning_rate", "loss", "smoothed_loss"], rows))
    if rate is None:
        raise TrainingError("the loss falls at no learning rate", f"look at {figure}, and give optimizer.lr")
    log.info("optimizer.lr: %.2g (found: the loss falls fastest there; %s)", rate, figure)
    return rate


def smoothed(losses: np.ndarray, width: float = 3.0) -> np.ndarray:
    """Return losses [S] averaged with Gaussian weights of `width` steps; unlike a running mean this has no lag.

    >>> smoothed(np.array([1.0, 1.0, 1.0])).round(6).tolist()
    [1.0, 1.0, 1.0]
    """
    steps = np.arange(len(losses))
    weights = np.exp(-0.5 * ((steps[:, None] - steps) / width) ** 2)  # [S, S]
    return np.asarray(weights @ losses / weights.sum(axis=1))


def suggest(rates: np.ndarray, losses: np.ndarray) -> float | None:
    """Return the rate where smoothed losses [S] fall fastest along log(rate); None where they never fall.

    Only rates below that of the smallest loss count.

    >>> suggest(np.array([0.001, 0.01, 0.1, 1.0]), np.array([2.0, 1.9, 1.0, 0.9]))
    0.01
    """
    lowest = int(losses.argmin())
    if lowest < 2:
        return None
    slopes = np.gradient(losses, np.log(rates))[: lowest + 1]
    return float(f"{rates[int(slopes.argmin())]:.2g}") if slopes.min() < 0 else None


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
    lr = trials.config.optimizer.lr
    values = {
        "data.batch_size": batch_size,
        "data.progressive_sizes": None,  # the last, largest size decides
        "trainer.max_epochs": -1,
        "trainer.max_steps": _WARMUP + _TIMED_STEPS,
        "trainer.limit_val_batches": 0,
        "optimizer.lr": 1e-4 if lr == AUTO else lr,
    }
    reset_peak(trials.on_gpu)
    try:
        trials.fit({**values, **_UNSCHEDULED}, timer)
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


def _table(header: Sequence[str], rows: Iterable[Sequence[float]]) -> str:
    text = io.StringIO()
    numbers = ([f"{float(value):.6g}" for value in row] for row in rows)
    csv.writer(text, lineterminator="\n").writerows([header, *numbers])
    return text.getvalue()
