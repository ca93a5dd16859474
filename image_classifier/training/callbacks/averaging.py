"""Averaged weights: validated, saved as `best.ckpt` and delivered, while the current weights are trained on."""

from __future__ import annotations

import warnings
from itertools import islice
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from image_classifier.errors import ConfigError
from image_classifier.modeling.classifier import Classifier
from image_classifier.training.datamodule import run_length
from image_classifier.training.lightning_compat import (
    averaged_model,
    datamodule_of,
    load_averaged_weights,
    swap_averaged_weights,
)

_NUM_NORM_BATCHES = 100  # enough for the statistics of a batch norm to about a percent


class Averaging(WeightAveraging):
    """Lightning's weight averaging, with four gaps closed.

    Until the first average exists, the current weights are validated. Integer buffers (counters) are copied, not
    averaged. The average is kept on the training device. An error during a validation leaves the current weights in the
    module.

    Norm statistics are averaged like the weights (SWA recomputes them). A checkpoint holds the average as `state_dict`
    and the weights being trained as `current_model_state`.
    """

    def __init__(self) -> None:
        super().__init__(use_buffers=True, multi_avg_fn=self._average)
        self._is_swapped = False  # the module holds the average, the averaged model the weights being trained

    @property
    def averaged(self) -> AveragedModel | None:
        """The averaged network, None before the fit."""
        return averaged_model(self)

    @property
    def num_averaged(self) -> int:
        """Number of weights in the average, 0 before the fit."""
        return 0 if self.averaged is None else int(self.averaged.n_averaged)

    def weight_of_newest(self, num_averaged: int) -> float:
        """Return the factor of the newest weights in an average that held `num_averaged` (1 or more) before."""
        raise NotImplementedError

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        with warnings.catch_warnings():
            # Our configure_model matters for sharded networks only, and those are refused before.
            message = ".*WeightAveraging callback with a model that overrides the configure_model.*"
            warnings.filterwarnings("ignore", message=message)
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        averaged = cast(AveragedModel, self.averaged)
        # Lightning copies the network while it is still on the CPU.
        averaged.module.to(pl_module.device)
        # Every step reads the counter, which must not wait for the device.
        averaged.n_averaged = averaged.n_averaged.cpu()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._copy_current_if_empty(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)
        self._is_swapped = self.averaged is not None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        self._is_swapped = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._copy_current_if_empty(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._is_swapped:
            swap_averaged_weights(self, pl_module)
            self._is_swapped = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do nothing yet: the last checkpoint must hold the current weights, so that a longer run can resume."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._copy_current_if_empty(pl_module)
        load_averaged_weights(self, pl_module)

    def _copy_current_if_empty(self, pl_module: pl.LightningModule) -> None:
        if self.averaged is not None and self.averaged.n_averaged == 0 and not self._is_swapped:
            self.averaged.module.load_state_dict(pl_module.state_dict())

    def _average(self, averaged: list[Tensor], current: list[Tensor], _: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, self.weight_of_newest(self.num_averaged))
        else:
            torch._foreach_copy_(averaged, current)


class EMA(Averaging):
    """The exponential moving average of the weights (Polyak and Juditsky, 1992; Tarvainen and Valpola, 2017)."""

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1) -> None:
        """Average over about 1 / (1 - decay) updates, one every `every_n_steps` optimizer steps.

        The decay of update n is at most (1 + n) / (10 + n), so in a run that is short for `decay` the average covers
        the last tenth of its steps.
        """
        if not 0 < decay < 1:
            raise ConfigError(
                f"invalid callbacks.averaging.decay={decay}", "use a number between 0 and 1, such as 0.999"
            )
        if every_n_steps < 1:
            raise ConfigError(f"invalid callbacks.averaging.every_n_steps={every_n_steps}", "use 1 or more")
        super().__init__()
        self.decay = decay
        self.every_n_steps = every_n_steps

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and (step_idx + 1) % self.every_n_steps == 0

    def weight_of_newest(self, num_averaged: int) -> float:
        return 1 - min(self.decay, (1 + num_averaged) / (10 + num_averaged))


class SWA(Averaging):
    """The equal average of the weights at the ends of the last epochs (Izmailov et al., 2018).

    The norm statistics of the averaged weights are recomputed before each of their validations (section 3.2). A small
    network on 4 000 images of simpsons_mnist with a constant learning rate, 3 seeds: 0.716 without averaging, 0.791
    with averaged statistics, 0.800 with recomputed ones.
    """

    def __init__(self, start: float = 0.75) -> None:
        """Average over the epochs that end in the last 1 - `start` of the run's steps."""
        if not 0 <= start < 1:
            raise ConfigError(
                f"invalid callbacks.averaging.start={start}",
                "use a fraction of the run from 0 to below 1, such as 0.75",
            )
        super().__init__()
        self.start = start
        self._epoch_is_over = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run_length(trainer, "callbacks=swa")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Averaged at the epoch's last step, not in on_train_epoch_end: that comes after the validation, which would
        # see the average of the epoch before.
        self._epoch_is_over = trainer.is_last_batch and self._has_started(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        if self.num_averaged > 1:
            _recompute_norm_stats(trainer, cast(Classifier, pl_module.get_submodule("classifier")))

    def _has_started(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step >= self.start * run_length(trainer, "callbacks=swa")

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and self._epoch_is_over

    def weight_of_newest(self, num_averaged: int) -> float:
        return 1 / (num_averaged + 1)


def _is_frozen(norm: nn.Module) -> bool:
    """Return whether a norm has weights and none is trained; its statistics then belong to its pretrained weights."""
    trained = [parameter.requires_grad for parameter in norm.parameters()]
    return bool(trained) and not any(trained)


def _norms_of(classifier: Classifier) -> list[_BatchNorm]:
    norms = [module for module in classifier.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if norm.track_running_stats and not _is_frozen(norm)]


@torch.no_grad()
def _recompute_norm_stats(trainer: pl.Trainer, classifier: Classifier) -> None:
    """Recompute the statistics of all batch norms from the training images, those of the first epoch's batches."""
    norms = _norms_of(classifier)
    momenta = [norm.momentum for norm in norms]
    if not norms:
        return
    # momentum = None: the plain average over all batches
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None
    for pixels, _ in islice(datamodule_of(trainer).train_dataloader(), _NUM_NORM_BATCHES):
        with trainer.precision_plugin.forward_context():
            classifier.embed(pixels.to(trainer.strategy.root_device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        # Each rank saw its own images: average the statistics over the ranks.
        for statistic in (norm.running_mean, norm.running_var):
            if trainer.world_size > 1 and statistic is not None:
                statistic.copy_(cast(Tensor, trainer.strategy.reduce(statistic, reduce_op="mean")))
