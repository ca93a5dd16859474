"""What a run finds out by trying before it begins: `data.batch_size=auto`, `optimizer.lr=auto`, and how many steps fit into `trainer.max_time`.

Each trial trains a network of its own for some real steps and throws it away; the random states are put back, so a run that found a value
is the same to the last bit as one that was given it.
"""

from __future__ import annotations

import csv
import gc
import io
import logging
import math
from collections.abc import Iterator
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
from image_classifier.cli import hydra_app
from image_classifier.dataset.pixel_cache import PixelCache
from image_classifier.dataset.prepare import DataSettings
from image_classifier.errors import ConfigError, TrainingError
from image_classifier.evaluation.plots.run_plots import plot_learning_rate_finder
from image_classifier.manifest import Manifest
from image_classifier.modeling.classifier import TTA
from image_classifier.training.builders import build_datamodule, build_module, build_trainer
from image_classifier.training.callbacks.exact_resume import random_state, set_random_state
from image_classifier.training.callbacks.lr_sweep import LearningRateSweep, StepTimer
from image_classifier.training.callbacks.throughput import Throughput
from image_classifier.training.callbacks.torch_compile import break_even_s
from image_classifier.training.distributed import broadcast, is_rank_zero, world_size
from image_classifier.training.hardware import Hardware
from image_classifier.training.launch import device_count, uses_gpu
from image_classifier.training.lightning_compat import time_limit_s
from image_classifier.training.memory import free_memory, memory_used, reset_peak

log = logging.getLogger(__name__)

_SWEEP_STEPS, _LOWEST, _HIGHEST = 100, 1e-6, 10.0
_SMALLEST_BATCH, _FEWEST_STEPS, _WORTH = (
    16,
    10,
    1.03,
)  # a batch may be 1/10 of the training part; each doubling must gain 3 %
_TIMED_STEPS, _TIMED_S, _WARMUP = 20, 2.0, 3
_UNSCHEDULED = {"scheduler.build": None, "scheduler.warmup": 0.0}
_MARGIN = 0.9  # of the time is planned for: checkpoints, plots, and a machine that others use too


@dataclass(frozen=True)
class TrialTrainer:
    """What all trials have in common: everything that the run itself will be made of."""

    config: Any
    manifest: Manifest
    cache: PixelCache
    hardware: Hardware

    @property
    def on_gpu(self) -> bool:
        """Whether the steps are made on a GPU, whose memory counts then."""
        return uses_gpu(self.config.trainer.accelerator)

    def fit(self, data: DataSettings, values: dict[str, Any], *callbacks: pl.Callback) -> None:
        """Train a fresh network with these values in the configuration's place, and forget it."""
        fixed: dict[str, Any] = {
            "callbacks": {},
            "logger": None,
            "trainer.max_time": None,
            "trainer.check_val_every_n_epoch": 1,
        }
        config = hydra_app.replaced(self.config, fixed | values)
        with _unnoticed():
            datamodule = build_datamodule(config, self.manifest, data, self.cache, self.hardware)
            module = build_module(config, self.manifest, data, self.cache, self.hardware)
            trainer = build_trainer(config, self.hardware, Throughput(), *callbacks)
            try:
                trainer.fit(module, datamodule=datamodule)
            except SIGTERMException:
                raise SystemExit(143) from None
            if trainer.interrupted:
                raise KeyboardInterrupt


@contextmanager
def _unnoticed() -> Iterator[None]:
    """Leave every random state, and the log, as if nothing had happened."""
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


def check_choices(config: Any) -> None:
    """Refuse what can be refused by its value alone.

    Raises:
        ConfigError: Settings that contradict one another, or a run without an end.
    """
    plain = {name: hydra_app.to_plain(config[name]) for name in ("model", "data", "optimizer", "trainer")}
    tta, trainer, rates = plain["model"].get("tta", "none"), plain["trainer"], plain["optimizer"]
    if tta not in TTA:
        raise ConfigError(f"model.tta={tta} is unknown", f"use one of {', '.join(TTA)}")
    if "flip" in tta and not plain["data"]["flip"]:
        raise ConfigError(
            f"model.tta={tta} asks a mirrored image too, and data.flip=false says that it may be of another class",
            "set model.tta=shift or none",
        )
    if trainer["max_epochs"] in (None, -1) and trainer["max_time"] is None and (trainer.get("max_steps") or -1) < 0:
        raise ConfigError("nothing ends this run", "set trainer.max_epochs, trainer.max_steps or trainer.max_time")
    if trainer["max_time"] is not None:
        seconds_of(trainer["max_time"])
    fixed = next((key for key, value in rates.items() if key.endswith("_lr") and value is not None), None)
    if rates.get("lr") == "auto" and fixed:
        raise ConfigError(
            f"optimizer.lr=auto moves all learning rates together, and optimizer.{fixed} is fixed",
            f"set optimizer.{fixed}=null",
        )
    if plain["data"]["batch_size"] == "auto" and (
        world_size() > 1 or device_count(trainer["accelerator"], trainer["devices"]) > 1
    ):
        raise ConfigError(
            "data.batch_size=auto tries batches on one device",
            "run it with trainer.devices=1 first, and give the batch of all devices",
        )


def autotune(
    config: Any, manifest: Manifest, data: DataSettings, cache: PixelCache, hardware: Hardware, plots: Path
) -> tuple[DataSettings, Hardware]:
    """Put numbers where `config` says auto, batch size first; the settings of the data and hardware with what was found.

    Raises:
        ConfigError: Not even the smallest batch fits, or `trainer.max_time` is too short.
        TrainingError: No learning rate makes the loss fall.
    """
    trials = TrialTrainer(config, manifest, cache, hardware)
    if data.batch_size == "auto":
        config.data.batch_size = find_batch_size(trials, data)
        data = replace(data, batch_size=config.data.batch_size)
    if config.optimizer.get("lr") == "auto":
        config.optimizer.lr = find_learning_rate(trials, data, plots)
    if (
        config.trainer.max_time is not None
        and config.trainer.max_epochs is None
        and (config.trainer.get("max_steps") or -1) < 0
    ):
        hardware, config.trainer.max_steps = plan_steps(trials, data)
        config.trainer.compile = hardware.compile
    return data, hardware


def find_learning_rate(trials: TrialTrainer, data: DataSettings, plots: Path) -> float:
    """The learning rate at which the loss falls fastest, in a sweep that raises it from step to step (Smith, 2017, section 3.3)."""
    sweep = LearningRateSweep(_LOWEST, _HIGHEST, _SWEEP_STEPS)
    steps = {"trainer.max_steps": _SWEEP_STEPS, "trainer.max_epochs": -1, "trainer.limit_val_batches": 0}
    trials.fit(replace(data, progressive_sizes=None), steps | _UNSCHEDULED | {"optimizer.lr": _LOWEST}, sweep)
    rates, losses = np.array(sweep.rates), np.array(sweep.losses)
    smooth = smoothed(losses)
    found = broadcast(suggest(rates, smooth) if is_rank_zero() else None)
    if is_rank_zero():
        plot_learning_rate_finder(rates, losses, smooth, found, plots / "learning_rate_finder.png")
        write_text(
            plots / "learning_rate_finder.csv",
            _table(["learning_rate", "loss", "smoothed_loss"], zip(rates, losses, smooth, strict=True)),
        )
    if found is None:
        raise TrainingError(
            "no learning rate makes the loss fall",
            f"look at {plots / 'learning_rate_finder.png'}, and give optimizer.lr",
        )
    log.info("optimizer.lr: %.2g (found: the loss falls fastest there; %s)", found, plots / "learning_rate_finder.png")
    return found


def smoothed(losses: np.ndarray, width: float = 3.0) -> np.ndarray:
    """Losses [S] averaged with their neighbours, Gaussian weights of `width` steps; unlike a running mean this does not lag behind."""
    places = np.arange(len(losses))
    weights = np.exp(-0.5 * ((places[:, None] - places) / width) ** 2)
    return np.asarray(weights @ losses / weights.sum(axis=1))


def suggest(rates: np.ndarray, losses: np.ndarray) -> float | None:
    """The rate of the steepest descent of these smoothed losses [S], along log(rate), before their minimum; None where they never fall."""
    lowest = int(losses.argmin())
    if lowest < 2:
        return None
    slopes = np.gradient(losses, np.log(rates))[: lowest + 1]
    return float(f"{rates[int(slopes.argmin())]:.2g}") if slopes.min() < 0 else None


def find_batch_size(trials: TrialTrainer, data: DataSettings) -> int:
    """The batch, a power of two, from which on twice as many images a step are not 3 % faster, or too many for memory or for an epoch."""
    most = max(1, len(trials.manifest.indices("train")) // _FEWEST_STEPS)
    tried: list[tuple[int, float, float]] = []
    size, best, reason = min(_SMALLEST_BATCH, most), 0, ""
    before = memory_used(trials.on_gpu)
    while not reason:
        measured = _speed(
            trials, replace(data, batch_size=size, progressive_sizes=None)
        )  # the last, largest size decides
        if measured is None:
            reason = f"{size} do not fit into memory"
            break
        rate, peak = measured
        tried.append((size, rate, peak))
        if best and rate < _WORTH * tried[-2][1]:
            reason = f"{size} are no faster"
            break
        best, size = size, 2 * size
        growth = peak - (tried[-2][2] if len(tried) > 1 else before)
        if size > most:
            reason = f"an epoch of {len(trials.manifest.indices('train'))} images would have fewer than {_FEWEST_STEPS} steps of {size}"
        elif growth > 0 and 2 * growth > free_memory(trials.on_gpu):
            reason = f"{size} would not fit into memory"
    if not best:
        raise ConfigError(
            f"not even batches of {size} fit into memory: {reason}", "lower data.image_size, or choose a smaller model"
        )
    for size, rate, peak in tried:
        log.info("batch of %5d: %8.1f images/s, peak memory %7.0f MB", size, rate, peak / 2**20)
    log.info("data.batch_size: %d (found: %s; optimizer.lr stays %s)", best, reason, trials.config.optimizer.get("lr"))
    return best


def _speed(trials: TrialTrainer, data: DataSettings) -> tuple[float, float] | None:
    """Images a second and peak memory in bytes of real training steps; None where the device has not so much memory."""
    watch = StepTimer(_WARMUP, _TIMED_S)
    limits = {
        "trainer.max_epochs": -1,
        "trainer.max_steps": _WARMUP + _TIMED_STEPS,
        "trainer.limit_val_batches": 0,
        "optimizer.lr": _rate(trials),
    }
    reset_peak(trials.on_gpu)
    try:
        trials.fit(data, limits | _UNSCHEDULED, watch)
    except torch.OutOfMemoryError:
        return None
    return data.batch_size / watch.step_s(), memory_used(trials.on_gpu)


def _rate(trials: TrialTrainer) -> Any:
    asked = trials.config.optimizer.get("lr")
    return 1e-4 if asked == "auto" else asked


def plan_steps(trials: TrialTrainer, data: DataSettings) -> tuple[Hardware, int]:
    """Optimizer steps after which `trainer.max_time` is nearly over, validations included; compiled or not, whatever is found to be faster."""
    config, allowed_s = trials.config, seconds_of(trials.config.trainer.max_time)
    hardware, choices = trials.hardware, [trials.hardware.compile]
    if hardware.compile == "auto":
        choices = [False, True] if allowed_s > break_even_s("cuda" if trials.on_gpu else "cpu") else [False]
    tried = [replace(hardware, compile=choice) for choice in choices]
    timed = [_times(replace(trials, hardware=one), data) for one in tried]
    (step_s, validation_s), hardware = min(zip(timed, tried, strict=True), key=lambda pair: pair[0])
    if len(tried) > 1:
        log.info(
            "torch.compile: %s (%.3g s a step without, %.3g s with)",
            "on" if hardware.compile else "off",
            timed[0][0],
            timed[1][0],
        )
    datamodule = build_datamodule(config, trials.manifest, data, trials.cache, trials.hardware)
    batches = config.trainer.accumulate_grad_batches or 1  # a step
    step_s, per_epoch = batches * step_s, max(1, math.ceil(len(datamodule.train_dataloader()) / batches))
    validation_s *= len(datamodule.val_dataloader())
    every = config.trainer.check_val_every_n_epoch or 1
    left_s = allowed_s * _MARGIN - validation_s  # the last one
    planned = int(left_s / (step_s + validation_s / (every * per_epoch)))
    if planned < 1:
        raise ConfigError(
            f"trainer.max_time={config.trainer.max_time} is less than a step and a validation take",
            f"allow {step_s + validation_s:.0f} s",
        )
    log.info(
        "trainer.max_steps: %d, %.1f epochs (found: %.3g s a step and %.3g s a validation, so that the schedule ends within %.0f s)",
        planned, planned / per_epoch, step_s, validation_s, allowed_s,
    )  # fmt: skip
    return hardware, planned


def _times(trials: TrialTrainer, data: DataSettings) -> tuple[float, float]:
    """Seconds a training batch and a validation batch, the same on all ranks."""
    sizes = len(data.progressive_sizes or [1])
    watch = StepTimer(_WARMUP, None, phases=sizes)
    steps = (_WARMUP + max(3, _TIMED_STEPS // (2 * sizes))) * sizes
    trials.fit(data, {"trainer.max_epochs": -1, "trainer.max_steps": steps, "trainer.limit_val_batches": 3}, watch)
    times: tuple[float, float] = broadcast((watch.step_s(undisturbed=False), watch.validation_s()))
    return times


def seconds_of(max_time: Any) -> float:
    """`trainer.max_time` in seconds, as Lightning reads it: days:hours:minutes:seconds, or a mapping such as {minutes: 30}."""
    try:
        duration = time_limit_s(
            Timer(duration=dict(max_time) if not isinstance(max_time, str | timedelta) else max_time)
        )
    except (MisconfigurationException, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"trainer.max_time={max_time} is no time", 'write "days:hours:minutes:seconds", such as "00:00:30:00"'
        ) from error
    return float(duration or 0)


def _table(header: list[str], rows: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [header, *([f"{float(value):.6g}" for value in row] for row in rows)]
    )
    return text.getvalue()
