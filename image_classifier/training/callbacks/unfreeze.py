"""Gradual unfreezing: the head is trained first, then layer after layer below it."""

from __future__ import annotations

import logging
from typing import cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from image_classifier.errors import ConfigError
from image_classifier.training.lightning_compat import finds_unused_parameters
from image_classifier.training.module import ClassifierModule
from image_classifier.training.optimizers.freezing import set_frozen
from image_classifier.training.optimizers.groups import layers

log = logging.getLogger(__name__)


class Unfreeze(Callback):
    """Trains more layers of the backbone every few epochs, from the head down.

    Source: ULMFiT (Howard and Ruder, 2018), section 3.3.

    All layers are in the optimizer from the start, which ignores parameters without a gradient. So schedulers and
    checkpoints see the same groups all the time, and the epoch alone decides which layers are trained. Layers that
    `model.freeze` names are never trained.
    """

    def __init__(self, every_n_epochs: int | None = None, layers_at_once: int = 1) -> None:
        """Set the pace; `every_n_epochs` None: nothing is frozen.

        Raises:
            ConfigError: A number is below 1.
        """
        for name, value in (("every_n_epochs", every_n_epochs), ("layers_at_once", layers_at_once)):
            if value is not None and value < 1:
                raise ConfigError(f"invalid callbacks.unfreeze.{name}={value}", "use 1 or more")
        self.every_n_epochs = every_n_epochs
        self.layers_at_once = layers_at_once
        self._layers: list[list[str]] = []  # names of the trainable parameters, one list per layer, from the head down
        self._always_frozen: frozenset[str] = frozenset()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_epochs is None:
            return
        if trainer.world_size > 1 and not finds_unused_parameters(trainer.strategy):
            raise ConfigError(
                "callbacks.unfreeze leaves parameters without gradients",
                "use trainer.strategy=ddp_find_unused_parameters_true",
            )
        module = cast(ClassifierModule, pl_module)
        backbone = module.classifier.backbone
        trainable = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
        by_layer = [[f"backbone.{name}" for name in names if name in trainable] for names in reversed(layers(backbone))]
        self._layers = [names for names in by_layer if names]
        self._always_frozen = module.frozen

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run resumed in mid-epoch does not start an epoch.
        self._apply(trainer.current_epoch, cast(ClassifierModule, pl_module))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(trainer.current_epoch, cast(ClassifierModule, pl_module))
        num_trained = self._num_trained(trainer.current_epoch)
        has_changed = num_trained != self._num_trained(trainer.current_epoch - 1)
        if self._layers and (has_changed or trainer.current_epoch == 0):
            log.info(
                "unfreeze: from epoch %d on, the head and %d of %d layers are trained",
                trainer.current_epoch + 1,
                num_trained,
                len(self._layers),
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._layers:
            self._train_layers(len(self._layers), cast(ClassifierModule, pl_module))

    def _num_trained(self, epoch: int) -> int:
        return min(len(self._layers), max(0, epoch) // (self.every_n_epochs or 1) * self.layers_at_once)

    def _apply(self, epoch: int, module: ClassifierModule) -> None:
        if self._layers:
            self._train_layers(self._num_trained(epoch), module)

    def _train_layers(self, num_trained: int, module: ClassifierModule) -> None:
        """Train that number of layers below the head and freeze the others."""
        trained = {name for names in self._layers[:num_trained] for name in names}
        frozen = {name for names in self._layers[num_trained:] for name in names}
        for name, parameter in module.classifier.named_parameters():
            if name in trained:
                parameter.requires_grad_(True)
        set_frozen(module.classifier, frozen)
        module.frozen = self._always_frozen | frozen
        # The module's own hook, which comes next, puts the norms of frozen layers into evaluation mode.
        module.classifier.train()
