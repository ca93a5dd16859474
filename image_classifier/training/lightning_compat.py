"""Private names of Lightning, each behind one function that says which public name is missing.

No other module of the package touches them. tests/training/test_lightning_compat.py has one test per name, so an
upgrade of Lightning fails there first. TorchMetrics and the loggers are Lightning's own packages and belong here too.
The last section holds public attributes that Lightning sets without declaring them; type checkers do not know them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, Timer, WeightAveraging
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.strategies import Strategy
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torchmetrics import Metric

C = TypeVar("C", bound=Callback)


# Loops


def clear_fit_restart(trainer: pl.Trainer) -> None:
    """Clear `_restarting` of the fit loop, so that the plateau scheduler sees the end of the epoch that was resumed.

    The public setter of `restarting` passes the value on to the epoch loop, which must still skip the batches that
    were done, and ignores the value in runs bounded by `max_steps`.
    """
    trainer.fit_loop._restarting = False


def clear_epoch_restart(trainer: pl.Trainer) -> None:
    """Clear `_restarting` of the fit, epoch and validation loops, so that a new epoch begins.

    The public setter of `restarting` leaves it at True in runs bounded by `max_steps`, and Lightning then takes the new
    epoch for one that is over.
    """
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop):
        loop._restarting = False


def skip_sigterm_broadcast(trainer: pl.Trainer) -> None:
    """Replace `_broadcast_sigterm_tensor`, which makes every rank wait for its device in every step.

    `StopOnSignal` asks all ranks for their signals, and only every few steps. No public option turns it off.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


# Connectors


def keep_signal_handlers(trainer: pl.Trainer) -> None:
    """Keep Lightning's `_signal_connector` from replacing the process's signal handlers.

    Its handlers end a run with exit code 0 and without a checkpoint. No public option turns them off.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def restore_callback_metrics(trainer: pl.Trainer, metrics: Mapping[str, Tensor]) -> None:
    """Put metrics of an earlier process back into `_callback_metrics`, where schedulers and callbacks look them up.

    `trainer.callback_metrics` has no setter, and `log` works only inside the hooks of the module.
    """
    trainer._logger_connector._callback_metrics.update(metrics)


# Callbacks


def time_limit_s(timer: Timer) -> float | None:
    """Return a timer's `_duration` in seconds; the public `time_remaining` has the elapsed time subtracted."""
    return timer._duration


def set_time_limit_s(timer: Timer, seconds: float | None) -> None:
    """Set a timer's `_duration`, which is public in the constructor only; None: no limit."""
    timer._duration = seconds


def averaged_model(callback: WeightAveraging) -> AveragedModel | None:
    """Return the `_average_model` of a weight averaging callback, None before the fit; there is no public property."""
    return callback._average_model


def swap_averaged_weights(callback: WeightAveraging, module: pl.LightningModule) -> None:
    """Exchange current and averaged weights with `_swap_models`, which the public hooks call for validations only."""
    callback._swap_models(module)


def load_averaged_weights(callback: WeightAveraging, module: pl.LightningModule) -> None:
    """Copy the averaged weights into the module with `_copy_average_to_current`.

    The public hook that does so, `on_train_end`, comes before the last checkpoint is written.
    """
    callback._copy_average_to_current(module)


def skip_average_update(callback: WeightAveraging, step: int) -> None:
    """Mark optimizer step `step` as averaged in `_latest_update_step`, so that skipped weights do not count twice.

    `should_update` is public, but it belongs to the subclass and knows nothing of skipped steps.
    """
    callback._latest_update_step = step


# Strategies, metrics, loggers


def finds_unused_parameters(strategy: Strategy) -> bool:
    """Return whether DDP accepts parameters without gradients; only `_ddp_kwargs` keeps the option."""
    return bool(getattr(strategy, "_ddp_kwargs", {}).get("find_unused_parameters"))


def set_update_count(metric: Metric, count: int) -> None:
    """Set a metric's `_update_count`; `update_count` is read-only, and no `state_dict` holds it."""
    metric._update_count = count


def clear_computed(metric: Metric) -> None:
    """Drop the value that a metric has cached in `_computed`; only `reset` does so publicly, and it clears the sums."""
    metric._computed = None


def wandb_has_id(logger: WandbLogger) -> bool:
    """Return whether the user gave the wandb run an id (`_wandb_init`); `experiment.id` would start the run."""
    return bool(logger._wandb_init.get("id"))


def resume_wandb_run(logger: WandbLogger, run_id: str) -> None:
    """Give a wandb run an id before it starts (`_wandb_init`, `_id`), or resume the run that has it.

    The constructor takes both, but a configuration builds the logger before the run's id is known.
    """
    logger._wandb_init.update(id=run_id, resume="allow")
    logger._id = run_id


def wandb_has_started(logger: WandbLogger) -> bool:
    """Return whether a wandb run was started (`_experiment`); the public `experiment` would start one."""
    return logger._experiment is not None


# Public attributes that Lightning does not declare


def callbacks_of(trainer: pl.Trainer, kind: type[C]) -> list[C]:
    """Return the trainer's callbacks of one class, in the order of their hooks."""
    return [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, kind)]


def datamodule_of(trainer: pl.Trainer) -> Any:
    """Return the data module of the fit, None where there is none."""
    return cast(Any, trainer).datamodule


def is_dev_run(trainer: pl.Trainer) -> bool:
    """Return whether `fast_dev_run` is on, which writes no checkpoints."""
    return bool(cast(Any, trainer).fast_dev_run)
