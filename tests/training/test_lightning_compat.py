"""Every private name of Lightning that training uses still exists and still does what `lightning_compat` says."""

from __future__ import annotations

import inspect
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, Timer, WeightAveraging
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torchmetrics import MeanMetric

from image_classifier.training import lightning_compat as compat
from image_classifier.training.callbacks.averaging import EMA
from image_classifier.training.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from image_classifier.training.callbacks.exact_resume import ExactResume
from image_classifier.training.callbacks.order import in_hook_order
from image_classifier.training.callbacks.preemption import SignalHandler, StopOnSignal
from tests.training.small_fits import equal_states, fit, small_module


class During(Callback):
    """Calls a function at one hook."""

    def __init__(self, hook: str, call: Any) -> None:
        setattr(self, hook, lambda trainer, module, *rest, **named: call(trainer, module))


def quiet_trainer(**arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, **arguments
    )


# Loops


def test_restarting_of_the_fit_loop_alone() -> None:
    trainer = quiet_trainer(max_steps=5)
    loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop)
    for loop in loops:
        loop._restarting = True
    compat.clear_fit_restart(trainer)
    assert [loop.restarting for loop in loops] == [False, True, True]


def test_restarting_of_all_loops() -> None:
    trainer = quiet_trainer(max_steps=5)
    loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop)
    trainer.fit_loop.restarting = False
    assert trainer.fit_loop.restarting  # the public setter does not obey in runs bounded by steps
    compat.clear_epoch_restart(trainer)
    assert not any(loop.restarting for loop in loops)


def test_broadcast_sigterm_tensor() -> None:
    trainer = quiet_trainer()
    loop = trainer.fit_loop.epoch_loop
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(type(loop).advance)  # called in every step
    replaced = loop._broadcast_sigterm_tensor
    compat.skip_sigterm_broadcast(trainer)
    assert loop._broadcast_sigterm_tensor != replaced
    loop._broadcast_sigterm_tensor()


# Connectors


def test_signal_connector(tmp_path: Path) -> None:
    def handlers(*callbacks: Callback) -> list[Any]:
        seen: list[Any] = []
        look = During("on_train_start", lambda trainer, module: seen.append(signal.getsignal(signal.SIGTERM)))
        fit(small_module(), tmp_path, [*callbacks, look], max_epochs=1)
        return seen

    before = signal.getsignal(signal.SIGTERM)
    keep = During("setup", lambda trainer, module: compat.keep_signal_handlers(trainer))
    assert handlers() != [before]  # or the function is needed no longer
    assert handlers(keep) == [before]


def test_callback_metrics() -> None:
    trainer = quiet_trainer()
    compat.restore_callback_metrics(trainer, {"val/loss": torch.tensor(0.5)})
    assert float(trainer.callback_metrics["val/loss"]) == 0.5


# Callbacks


def test_timer_duration() -> None:
    timer = Timer(duration="00:00:01:00")
    assert compat.time_limit_s(timer) == 60
    compat.set_time_limit_s(timer, None)
    assert timer.time_remaining() is None
    compat.set_time_limit_s(timer, 30.0)
    assert timer.time_remaining() == 30.0


def test_average_model_and_swap_models(tmp_path: Path) -> None:
    averaging, module = EMA(), small_module()
    assert compat.averaged_model(averaging) is None
    averaging.setup(quiet_trainer(), module, "fit")
    averaged = compat.averaged_model(averaging)
    assert averaged is not None
    with torch.no_grad():
        module.classifier.head.weight.zero_()
    ours, theirs = module.classifier.head.weight, averaged.module.classifier.head.weight
    compat.swap_averaged_weights(averaging, module)
    assert ours.abs().sum() > 0 and theirs.abs().sum() == 0


def test_copy_average_to_current() -> None:
    averaging, module = EMA(), small_module()
    averaging.setup(quiet_trainer(), module, "fit")
    with torch.no_grad():
        module.classifier.head.weight.zero_()
    compat.load_averaged_weights(averaging, module)
    averaged = compat.averaged_model(averaging)
    assert averaged is not None and equal_states(module, averaged.module)


def test_latest_update_step(tmp_path: Path) -> None:
    def updates(*callbacks: Callback) -> int:
        averaging = EMA()
        fit(small_module(), tmp_path, [*callbacks, averaging], max_epochs=1)
        averaged = compat.averaged_model(averaging)
        assert averaged is not None
        return int(averaged.n_averaged)

    def skip_first(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step == 1:
            for averaging in compat.callbacks_of(trainer, WeightAveraging):
                compat.skip_average_update(averaging, 1)

    assert updates() == 4
    assert updates(During("on_train_batch_end", skip_first)) == 3


# Strategies, metrics, loggers


def test_ddp_kwargs() -> None:
    assert compat.finds_unused_parameters(DDPStrategy(find_unused_parameters=True))
    assert not compat.finds_unused_parameters(DDPStrategy())
    assert not compat.finds_unused_parameters(SingleDeviceStrategy())


def test_update_count() -> None:
    metric = MeanMetric()
    compat.set_update_count(metric, 3)
    assert metric.update_count == 3


def test_computed() -> None:
    metric = MeanMetric()
    metric.update(1.0)
    assert metric.compute() == 1
    metric.mean_value = torch.tensor(2.0)
    assert metric.compute() == 1  # cached
    compat.clear_computed(metric)
    assert metric.compute() == 2


def test_wandb_init_and_id_and_experiment(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    assert not compat.wandb_has_id(logger) and not compat.wandb_has_started(logger)
    compat.resume_wandb_run(logger, "a-key")
    assert compat.wandb_has_id(logger) and logger.version == "a-key"
    assert logger._wandb_init["resume"] == "allow"
    assert compat.wandb_has_id(WandbLogger(save_dir=tmp_path, id="theirs", offline=True))


# Public, but not declared


def test_callbacks_data_module_and_dev_run(tmp_path: Path) -> None:
    first, second = During("setup", lambda trainer, module: None), Timer()
    trainer = fit(small_module(), tmp_path, [first, second], max_epochs=1)
    assert compat.callbacks_of(trainer, During) == [first]
    assert compat.callbacks_of(trainer, Callback)[1:3] == [first, second]  # in the order that was given
    assert isinstance(compat.datamodule_of(trainer), pl.LightningDataModule)
    assert not compat.is_dev_run(trainer) and compat.is_dev_run(quiet_trainer(fast_dev_run=True))


def test_callbacks_that_take_checkpoints_come_first() -> None:
    exact, stop, last, best = ExactResume({}), StopOnSignal(SignalHandler()), LastCheckpoint("."), BestCheckpoint(".")
    timer, early = Timer(), EarlyStopping("val/loss")
    callbacks = in_hook_order([timer, best, early, last, stop, exact])
    assert callbacks == [exact, stop, last, best, timer, early]
    assert compat.callbacks_of(quiet_trainer(callbacks=[*callbacks]), Callback)[:6] == callbacks
