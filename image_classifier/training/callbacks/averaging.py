"""Averaged weights: validated, kept as `best.ckpt` and delivered in place of the current ones, which go on learning."""

from __future__ import annotations

import warnings
from itertools import islice
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from image_classifier.errors import ConfigError
from image_classifier.modeling.classifier import Classifier
from image_classifier.training.datamodule import run_length

_NORM_BATCHES = 100  # give a batch norm's statistics to about a percent


class Averaging(WeightAveraging):
    """Lightning's weight averaging, with what it leaves open: until the first average the current weights are judged; counters (integers) are copied,
    not averaged; the average lies on the training device; and an error within a validation leaves the weights where they belong.

    Norm statistics are averaged as the weights are (SWA takes them anew). A checkpoint holds the average as `state_dict`, and what learns as
    `current_model_state`.
    """

    _average_model: Any
    _swapped = False

    def __init__(self) -> None:
        super().__init__(use_buffers=True, multi_avg_fn=self._average)

    def share(self, number: int) -> float:
        """The newest weights' share of the average that held `number` before, which is 1 or more."""
        raise NotImplementedError

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        with (
            warnings.catch_warnings()
        ):  # our module's configure_model matters to sharded networks alone, which are refused before
            warnings.filterwarnings(
                "ignore", message=".*WeightAveraging callback with a model that overrides the configure_model.*"
            )
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._average_model.module.to(
            pl_module.device
        )  # Lightning copies the network while it is still on the processor
        self._average_model.n_averaged = (
            self._average_model.n_averaged.cpu()
        )  # looked at in every step, which must not wait for the device

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._follow(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._follow(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._swapped:
            self._swap_models(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing yet: a checkpoint of the end must hold what learns, to go on from."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._follow(pl_module)
        self._copy_average_to_current(pl_module)

    def _follow(self, pl_module: pl.LightningModule) -> None:
        if self._average_model is not None and self._average_model.n_averaged == 0 and not self._swapped:
            self._average_model.module.load_state_dict(pl_module.state_dict())

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped

    def _average(self, averaged: list[Tensor], current: list[Tensor], _: Tensor) -> None:
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, self.share(int(self._average_model.n_averaged)))
        else:
            torch._foreach_copy_(averaged, current)


class EMA(Averaging):
    """The exponential moving average of the weights (Polyak and Juditsky, 1992; Tarvainen and Valpola, 2017)."""

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1) -> None:
        """The average over about 1 / (1 - decay) updates, one every `every_n_steps` optimizer steps.

        The decay of update n is at most (1 + n) / (10 + n), so that the average covers the last tenth of a run that is short for it.
        """
        if not 0 < decay < 1 or every_n_steps < 1:
            raise ConfigError(
                f"callbacks.averaging cannot average with decay={decay}, every_n_steps={every_n_steps}",
                "use 0.999 and 1",
            )
        super().__init__()
        self.decay, self.every_n_steps = decay, every_n_steps

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and (step_idx + 1) % self.every_n_steps == 0

    def share(self, number: int) -> float:
        return 1 - min(self.decay, (1 + number) / (10 + number))


class SWA(Averaging):
    """The equal average of the weights at the ends of the last epochs (Izmailov et al., 2018).

    Norm statistics are taken anew for the averaged weights, as in its section 3.2, before each validation of them. (A small network on
    4 000 images of simpsons_mnist, constant learning rate, 3 seeds: 0.716 without averaging, 0.791 with averaged statistics, 0.800 with new ones.)
    """

    def __init__(self, start: float = 0.75) -> None:
        """Averages over the epochs that end in the last 1 - `start` of the run's steps."""
        if not 0 <= start < 1:
            raise ConfigError(
                f"callbacks.averaging.start={start} is impossible",
                "give a share of the run from 0 to below 1, such as 0.75",
            )
        super().__init__()
        self.start = start
        self._epoch_is_over = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run_length(trainer, "callbacks=swa")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # At its last step, not at the end of the epoch: that comes after the validation, which would judge the average of the epoch before.
        self._epoch_is_over = trainer.is_last_batch and trainer.global_step >= self.start * run_length(
            trainer, "callbacks=swa"
        )
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        if self._average_model is not None and self._average_model.n_averaged > 1:
            _renew_norms(trainer, cast(Classifier, pl_module.get_submodule("classifier")))

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and self._epoch_is_over

    def share(self, number: int) -> float:
        return 1 / (number + 1)


def _rests(norm: nn.Module) -> bool:
    """Whether a norm is frozen: its statistics then belong to the weights it came with."""
    learns = [parameter.requires_grad for parameter in norm.parameters()]
    return bool(learns) and not any(learns)


@torch.no_grad()
def _renew_norms(trainer: pl.Trainer, classifier: Classifier) -> None:
    """Take the statistics of all batch norms from training images, those of the first epoch's batches as they lie in the cache."""
    norms = [
        module
        for module in classifier.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and not _rests(module)
    ]
    momenta = [norm.momentum for norm in norms]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # the plain average over all batches
    for pixels, _ in islice(cast(Any, trainer).datamodule.train_dataloader(), _NORM_BATCHES):
        with trainer.precision_plugin.forward_context():
            classifier.embed(pixels.to(trainer.strategy.root_device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        for statistic in (norm.running_mean, norm.running_var):
            if trainer.world_size > 1 and statistic is not None:
                statistic.copy_(cast(Tensor, trainer.strategy.reduce(statistic, reduce_op="mean")))
