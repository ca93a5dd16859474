"""Exact resume: state beyond Lightning's own, so that a resumed run ends bit by bit like one that never stopped.

A checkpoint is taken between two steps: before the first batch of an epoch, before any other batch, before a validation
that is due, or after training. Nothing is half-done then, and the loops' counters say exactly where the run stands.
Lightning 2.6 saves at other points, from which a resumed run validates twice, skips a scheduler's step, or loses the
gradients accumulated so far.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Timer
from torchmetrics import Metric

from image_classifier.training.datamodule import BatchLoader
from image_classifier.training.distributed import gather, rank, world_size
from image_classifier.training.lightning_compat import (
    callbacks_of,
    clear_computed,
    clear_epoch_restart,
    clear_fit_restart,
    restore_callback_metrics,
    set_time_limit_s,
    set_update_count,
    time_limit_s,
)

log = logging.getLogger(__name__)

KEY = "image_classifier"  # of all that this package adds to a checkpoint
_UPDATE_COUNT = "_update_count"  # key of a metric's counter among its sums


@dataclass
class _Limits:
    """Limits of a run, lifted for a validation that was due when the run stopped, then restored."""

    max_steps: int
    durations_s: list[tuple[Timer, float | None]]
    val_check_batch: Any = None

    @classmethod
    def lift(cls, trainer: pl.Trainer) -> _Limits:
        """Lift the limits of steps and time, and return them."""
        limits = cls(trainer.max_steps, [(timer, time_limit_s(timer)) for timer in callbacks_of(trainer, Timer)])
        trainer.fit_loop.epoch_loop.max_steps = -1
        for timer, _ in limits.durations_s:
            set_time_limit_s(timer, None)
        return limits

    def restore(self, trainer: pl.Trainer) -> None:
        """Put the limits back."""
        trainer.val_check_batch = self.val_check_batch
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps
        for timer, duration_s in self.durations_s:
            set_time_limit_s(timer, duration_s)


class ExactResume(Callback):
    """Adds to each checkpoint, and restores from it: loop position, random states, metrics so far, run fingerprint.

    Must be the first callback: what the others do at a hook happens after the point at which the checkpoint was taken.
    """

    def __init__(self, fingerprint: dict[str, Any], extended: bool = False) -> None:
        """Keep the `fingerprint`, plain values, in every checkpoint; `extended` lets a finished run train longer."""
        self.fingerprint = fingerprint
        self.extended = extended
        self._loaded: dict[str, Any] = {}  # the checkpoint's entry, from its loading to the first hook of the run
        self._loaded_rank: dict[str, Any] = {}  # this rank's part of it
        self._limits: _Limits | None = None
        self._random_before_validation: dict[str, Any] = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        _place_between_steps(checkpoint["loops"]["fit_loop"], pending=trainer.validating)
        checkpoint[KEY] = {
            "facts": self.fingerprint,
            "finished": not trainer.validating and not _is_epoch_under_way(trainer),
            "pending": trainer.validating,
            "stops": trainer.should_stop,
            "validates": trainer.check_val_every_n_epoch,
            "gradients": _gradients(pl_module) if is_accumulating(trainer) else {},
            "seen": {name: torch.as_tensor(value).clone() for name, value in trainer.callback_metrics.items()},
            "ranks": gather(
                {
                    "random": self._random_before_validation if trainer.validating else random_state(),
                    "metrics": copied_metrics(pl_module),
                }
            ),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded = checkpoint[KEY]
        ranks = self._loaded["ranks"]
        if len(ranks) == world_size():
            self._loaded_rank = ranks[rank()]
            set_metrics(pl_module, self._loaded_rank["metrics"])
        else:
            log.warning(
                "resume: %d processes instead of %d: the batches are the same, the results differ by rounding",
                world_size(),
                len(ranks),
            )
        if self._loaded["finished"] and not self.extended:
            trainer.should_stop = True  # whatever early stopping would say now
        if self._loaded["pending"]:
            # Else Lightning ends a run whose steps or time are used up before its last validation.
            self._limits = _Limits.lift(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._loaded:
            return
        # Metrics that the plateau scheduler and early stopping look up before the next validation.
        restore_callback_metrics(trainer, self._loaded["seen"])
        # Gradients accumulated over the batches since the last optimizer step.
        for name, parameter in pl_module.named_parameters():
            if name in self._loaded["gradients"]:
                parameter.grad = self._loaded["gradients"][name].to(parameter.device)
        # A validation that was due: due at once, whatever interval had led to it.
        if self._limits is not None:
            self._limits.val_check_batch = trainer.val_check_batch
            trainer.val_check_batch = batches_done_in_epoch(trainer)
            trainer.check_val_every_n_epoch = 1
        if _is_epoch_under_way(trainer):
            _skip_to(trainer, batches_done_in_epoch(trainer))
        else:
            clear_epoch_restart(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._resume_here(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._resume_here(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._resume_here(trainer)
        self._random_before_validation = random_state()

    def _resume_here(self, trainer: pl.Trainer) -> None:
        """Restore the rest at the first hook of a resumed run, which is the one at which the checkpoint was taken."""
        if not self._loaded:
            return
        # Last of all: what Lightning did before this hook has drawn random numbers.
        if self._loaded_rank:
            set_random_state(self._loaded_rank["random"])
        trainer.should_stop = self._loaded["stops"] and not (self._loaded["finished"] or self.extended)
        if self._limits is not None:
            trainer.check_val_every_n_epoch = self._loaded["validates"]
            self._limits.restore(trainer)
        clear_fit_restart(trainer)
        self._loaded = {}
        self._loaded_rank = {}
        self._limits = None


def _skip_to(trainer: pl.Trainer, batch: int) -> None:
    """Start the loader at that batch; Lightning loses the position where a scheduler has asked how long the run is."""
    # At the end of an epoch only the validation is left, and the next epoch starts at its first batch.
    if batch < trainer.num_training_batches:
        cast(BatchLoader, trainer.train_dataloader).load_state_dict({"first": batch})


def batches_done_in_epoch(trainer: pl.Trainer) -> int:
    """Return the number of training batches of this epoch whose step is complete."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.completed)


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Return whether there are gradients of batches that no optimizer step has used yet."""
    done = batches_done_in_epoch(trainer)
    return done % trainer.accumulate_grad_batches != 0 and done != trainer.num_training_batches


def _gradients(module: pl.LightningModule) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.detach().clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def _is_epoch_under_way(trainer: pl.Trainer) -> bool:
    """Return False after training, True at every other point where a checkpoint is taken."""
    progress = trainer.fit_loop.epoch_progress.current
    return bool(progress.ready != progress.completed)


def _place_between_steps(loop: dict[str, Any], pending: bool) -> None:
    """Set the saved counters of Lightning's fit loop to a point between steps, so that nothing is half-done.

    Lightning counts each epoch and batch as ready, started, processed and completed, in total and in the current run of
    the loop. With `pending` the last batch is complete and the validation after it is still to be made.
    """
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    # Started and processed agree only before the first batch of an epoch: on_train_epoch_start has just been called.
    at_epoch_start = epochs["current"]["started"] == epochs["current"]["processed"]
    for scope in ("total", "current"):
        # A checkpoint at the start of an epoch: the epoch is not ready yet, so the restart starts it from scratch.
        if at_epoch_start:
            epochs[scope]["ready"] = epochs[scope]["started"]
        # A batch that is ready or started but not completed is made again.
        batches[scope] = dict.fromkeys(batches[scope], batches[scope]["completed"])
    # Only a pending validation comes after the last batch; in any other case the next batch does.
    batches["is_last_batch"] = batches["is_last_batch"] and pending
    # A pending validation has started and processed no batch: the restart runs it from its first batch.
    # Without one the validation loop is as new.
    total = (
        {"ready": 1, "started": 1, "processed": 0, "completed": 0} if pending else dict.fromkeys(batches["total"], 0)
    )
    loop["epoch_loop.val_loop.batch_progress"] = {
        "total": total,
        "current": dict.fromkeys(total, 0),
        "is_last_batch": False,
    }
    # The position in the data is known from the counters; see _skip_to.
    loop["state_dict"].pop("combined_loader", None)


def random_state() -> dict[str, Any]:
    """Return the states of all generators that a training may draw from, as plain values and tensors."""
    version, words, gauss = random.getstate()
    numpy_state = cast(tuple[Any, ...], np.random.get_state())  # noqa: NPY002  # others draw from the global generator
    _, keys, position, has_gauss, cached_gauss = numpy_state
    state: dict[str, Any] = {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached_gauss)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the generators from a result of `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def copied_metrics(module: pl.LightningModule) -> dict[str, dict[str, Any]]:
    """Return copies of the unfinished sums of the module's metrics, by name."""
    return {
        name: {**_copied(metric.metric_state), _UPDATE_COUNT: metric.update_count}
        for name, metric in _metrics_of(module).items()
    }


def _metrics_of(module: pl.LightningModule) -> dict[str, Metric]:
    return {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: [item.clone() for item in value] if isinstance(value, list) else value.clone()
        for key, value in state.items()
    }


def set_metrics(module: pl.LightningModule, states: dict[str, dict[str, Any]]) -> None:
    """Restore the metrics' sums from a result of `copied_metrics`."""
    metrics = _metrics_of(module)
    for name in metrics.keys() & states.keys():
        metric = metrics[name]
        for key, value in states[name].items():
            if key == _UPDATE_COUNT:
                set_update_count(metric, value)
            else:
                setattr(metric, key, value.to(metric.device) if isinstance(value, torch.Tensor) else value)
        clear_computed(metric)
