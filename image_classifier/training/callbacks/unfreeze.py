"""Gradual unfreezing: the head learns first, then layer after layer below it."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from image_classifier.errors import ConfigError
from image_classifier.training.module import ClassifierModule
from image_classifier.training.optimizers.freezing import set_frozen
from image_classifier.training.optimizers.groups import layers

log = logging.getLogger(__name__)


class Unfreeze(Callback):
    """Every few epochs some more layers of the backbone learn, from the head down (Howard and Ruder, 2018, ULMFiT, section 3.3).

    All of them are in the optimizer from the start, which skips what has no gradient: so schedulers and checkpoints see the same groups all along,
    and which layers learn is a function of the epoch alone. What `model.freeze` names never learns.
    """

    def __init__(self, every_n_epochs: int | None = None, layers_at_once: int = 1) -> None:
        """Nothing is frozen where `every_n_epochs` is None; ConfigError for numbers below 1."""
        for name, value in (("every_n_epochs", every_n_epochs), ("layers_at_once", layers_at_once)):
            if value is not None and value < 1:
                raise ConfigError(f"callbacks.unfreeze.{name}={value} is impossible", "give 1 or more")
        self.every_n_epochs, self.layers_at_once = every_n_epochs, layers_at_once
        self._layers: list[list[str]] = []  # names of the parameters that may learn, from the head down
        self._never: frozenset[str] = frozenset()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_epochs is None:
            return
        kwargs: dict[str, Any] = getattr(trainer.strategy, "_ddp_kwargs", {})
        if trainer.world_size > 1 and not kwargs.get("find_unused_parameters"):
            raise ConfigError(
                "callbacks.unfreeze leaves parameters without gradients",
                "use trainer.strategy=ddp_find_unused_parameters_true",
            )
        module = cast(ClassifierModule, pl_module)
        backbone = module.classifier.backbone
        learning = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
        found = [[f"backbone.{name}" for name in names if name in learning] for names in reversed(layers(backbone))]
        self._layers, self._never = [names for names in found if names], module.frozen

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(
            trainer.current_epoch, cast(ClassifierModule, pl_module)
        )  # a run resumed within an epoch does not start one

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(trainer.current_epoch, cast(ClassifierModule, pl_module))
        opened, before = self._num_open(trainer.current_epoch), self._num_open(trainer.current_epoch - 1)
        if self._layers and (opened != before or trainer.current_epoch == 0):
            log.info(
                "unfreeze: from epoch %d on the head and %d of %d layers learn",
                trainer.current_epoch + 1,
                opened,
                len(self._layers),
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._layers:
            self._set(len(self._layers), cast(ClassifierModule, pl_module))

    def _num_open(self, epoch: int) -> int:
        return min(len(self._layers), max(0, epoch) // (self.every_n_epochs or 1) * self.layers_at_once)

    def _apply(self, epoch: int, module: ClassifierModule) -> None:
        if self._layers:
            self._set(self._num_open(epoch), module)

    def _set(self, num_open: int, module: ClassifierModule) -> None:
        resting = {name for names in self._layers[num_open:] for name in names}
        learning = {name for names in self._layers[:num_open] for name in names}
        for name, parameter in module.classifier.named_parameters():
            if name in learning:
                parameter.requires_grad_(True)
        set_frozen(module.classifier, resting)
        module.frozen = self._never | resting
        module.classifier.train()  # the module's own hook, which comes next, quietens what is frozen
