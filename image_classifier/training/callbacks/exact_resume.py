"""What a checkpoint must hold, beyond what Lightning puts there, for a run that goes on to end as if it had never stopped.

A checkpoint is taken between two steps: before the first batch of an epoch, before any other batch, before a validation that is due, or when
training is over. Nothing is half-done then, and the loops' counters say only where the run stands. Lightning 2.6 saves elsewhere, where a
resumed run validates twice, skips a scheduler's step, or forgets the gradients gathered so far.
"""

from __future__ import annotations

import logging
import random
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Timer
from torchmetrics import Metric

from image_classifier.training.datamodule import BatchLoader
from image_classifier.training.distributed import gather, rank, world_size

log = logging.getLogger(__name__)

KEY = "image_classifier"  # of all that we add to a checkpoint


class ExactResume(Callback):
    """Adds to each checkpoint, and takes from it: the place in the run, random states, metrics so far, and facts that a resume compares.

    Must be the first callback: what the others do at a hook belongs after the place where the checkpoint was taken.
    """

    def __init__(self, facts: dict[str, Any], extended: bool = False) -> None:
        """`facts` are plain values to keep in every checkpoint; `extended` lets a run that is over train on."""
        self.facts, self.extended = facts, extended
        self._loaded: dict[str, Any] = {}
        self._before_validation: dict[str, Any] = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        _place_between_steps(checkpoint["loops"]["fit_loop"], pending=trainer.validating)
        checkpoint[KEY] = {
            "facts": self.facts,
            "finished": not trainer.validating and not _epoch_under_way(trainer),
            "pending": trainer.validating,
            "stops": trainer.should_stop,
            "validates": trainer.check_val_every_n_epoch,
            "gradients": _gradients(pl_module) if is_accumulating(trainer) else {},
            "seen": {name: torch.as_tensor(value).clone() for name, value in trainer.callback_metrics.items()},
            "ranks": gather(
                {
                    "random": self._before_validation if trainer.validating else random_state(),
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
            self._loaded["own"] = ranks[rank()]
            set_metrics(pl_module, self._loaded["own"]["metrics"])
        else:
            log.warning(
                "resume: %d processes instead of %d: the batches stay the same, the results not to the bit",
                world_size(),
                len(ranks),
            )

        if self._loaded["finished"] and not self.extended:
            trainer.should_stop = True  # early stopping is not asked again
        if self._loaded[
            "pending"
        ]:  # else Lightning ends a run whose steps or time are used up before its last validation
            self._loaded["max_steps"], trainer.fit_loop.epoch_loop.max_steps = trainer.max_steps, -1
            timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
            self._loaded["durations"] = [(timer, timer._duration) for timer in timers]
            for timer in timers:
                timer._duration = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._loaded:
            return
        trainer._logger_connector._callback_metrics.update(self._loaded["seen"])
        for name, parameter in pl_module.named_parameters():
            if name in self._loaded["gradients"]:
                parameter.grad = self._loaded["gradients"][name].to(parameter.device)
        if self._loaded["pending"]:
            self._loaded["val_check_batch"] = trainer.val_check_batch
            trainer.val_check_batch, trainer.check_val_every_n_epoch = (
                batches_done_in_epoch(trainer),
                1,
            )  # now, whatever led to it
        if _epoch_under_way(trainer):
            _skip_to(trainer, batches_done_in_epoch(trainer))
        else:
            for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop):
                loop._restarting = (
                    False  # a new epoch begins; with max_steps Lightning would take it for one that is over
                )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._go_on(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._go_on(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._go_on(trainer)
        self._before_validation = random_state()

    def _go_on(self, trainer: pl.Trainer) -> None:
        """At the first hook after a resume, the one at which the checkpoint was taken."""
        if self._loaded:
            if "own" in self._loaded:
                set_random_state(self._loaded["own"]["random"])
            trainer.should_stop = self._loaded["stops"] and not (self._loaded["finished"] or self.extended)
            if self._loaded["pending"]:
                trainer.check_val_every_n_epoch = self._loaded["validates"]
                trainer.val_check_batch, trainer.fit_loop.epoch_loop.max_steps = (
                    self._loaded["val_check_batch"],
                    self._loaded["max_steps"],
                )
                for timer, duration in self._loaded["durations"]:
                    timer._duration = duration
            trainer.fit_loop._restarting = False  # or the plateau scheduler misses the end of this epoch
            self._loaded = {}


def _skip_to(trainer: pl.Trainer, batch: int) -> None:
    """Let the loader begin there; Lightning forgets its place where a scheduler has asked how long the run is."""
    if (
        batch < trainer.num_training_batches
    ):  # else only the validation is left, and the next epoch begins at its beginning
        cast(BatchLoader, trainer.train_dataloader).load_state_dict({"first": batch})


def batches_done_in_epoch(trainer: pl.Trainer) -> int:
    """Training batches of this epoch whose step is complete."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.completed)


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether batches were seen whose gradients no optimizer step has used yet."""
    done = batches_done_in_epoch(trainer)
    return done % trainer.accumulate_grad_batches != 0 and done != trainer.num_training_batches


def _gradients(module: pl.LightningModule) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.detach().clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def _epoch_under_way(trainer: pl.Trainer) -> bool:
    """False once training is over, True at every other place where a checkpoint is taken."""
    progress = trainer.fit_loop.epoch_progress.current
    return bool(progress.ready != progress.completed)


def _place_between_steps(loop: dict[str, Any], pending: bool) -> None:
    """Set the counters of Lightning's fit loop to where the run stands, so that its restart finds nothing half-done.

    With `pending` the last batch is complete and the validation after it is still to be done.
    """
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    at_epoch_start = epochs["current"]["started"] == epochs["current"]["processed"]
    for scope in ("total", "current"):
        if at_epoch_start:
            epochs[scope]["ready"] = epochs[scope]["started"]
        batches[scope] = dict.fromkeys(batches[scope], batches[scope]["completed"])
    batches["is_last_batch"] = batches["is_last_batch"] and pending
    begun = (
        {"ready": 1, "started": 1, "processed": 0, "completed": 0} if pending else dict.fromkeys(batches["total"], 0)
    )
    loop["epoch_loop.val_loop.batch_progress"] = {
        "total": begun,
        "current": dict.fromkeys(begun, 0),
        "is_last_batch": False,
    }
    loop["state_dict"].pop("combined_loader", None)


def random_state() -> dict[str, Any]:
    """The states of all generators that a training may draw from, as plain values and tensors."""
    version, words, gauss = random.getstate()
    _, keys, place, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state())
    state: dict[str, Any] = {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(place), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def copied_metrics(module: pl.LightningModule) -> dict[str, dict[str, Any]]:
    """The unfinished sums of the module's metrics, by name."""
    found = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
    return {
        name: {**_copied(metric.metric_state), "_update_count": metric._update_count} for name, metric in found.items()
    }


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: [item.clone() for item in value] if isinstance(value, list) else value.clone()
        for key, value in state.items()
    }


def set_metrics(module: pl.LightningModule, states: dict[str, dict[str, Any]]) -> None:
    """Put back what `copied_metrics` gave."""
    metrics = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
    for name in metrics.keys() & states.keys():
        device = metrics[name].device
        for key, value in states[name].items():
            setattr(metrics[name], key, value.to(device) if isinstance(value, torch.Tensor) else value)
        metrics[name]._computed = None
