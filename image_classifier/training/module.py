"""The Lightning module: one training step, one validation pass judged by the same code as every report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from image_classifier.errors import ConfigError, TrainingError
from image_classifier.evaluation.metrics import compute_metrics
from image_classifier.modeling.classifier import Classifier
from image_classifier.records import PredictionTable
from image_classifier.training.datamodule import Batch

_SHORTEST = 16  # steps: below that torch's schedulers divide by the length of an empty phase

OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]


@dataclass(frozen=True)
class SchedulerSettings:
    """How the learning rate moves: `build` takes the optimizer (and the run's length under the name `length`)."""

    build: Callable[..., Any] | None = None
    interval: str = "epoch"
    length: str | None = None
    monitor: str | None = None


class ClassifierModule(pl.LightningModule):
    """Trains a classifier; logs train/loss, train/accuracy, val/loss, val/accuracy and val/f1_macro once an epoch."""

    def __init__(
        self,
        classifier: Classifier,
        criterion: nn.Module,
        make_optimizer: OptimizerFactory,
        scheduler: SchedulerSettings,
        classes: tuple[str, ...],
        blueprint: dict[str, Any],
        val_criterion: nn.Module | None = None,
    ) -> None:
        """The training of `classifier`.

        Args:
            classifier: The network, pixels to logits.
            criterion: Loss of logits [N, C] and targets int64 [N], or class probabilities [N, C] where images are mixed.
            make_optimizer: From parameter groups to an optimizer.
            scheduler: How the learning rate moves.
            classes: Their names, in order.
            blueprint: Plain containers only: what `inference.checkpoint` needs to rebuild the classifier from a checkpoint.
            val_criterion: The loss of `val/loss`, without class weights, so that runs compare; None: `criterion`.
        """
        super().__init__()
        self.classifier, self.criterion, self.val_criterion = classifier, criterion, val_criterion or criterion
        self.make_optimizer, self.scheduler, self.classes = make_optimizer, scheduler, classes
        self.save_hyperparameters({"blueprint": blueprint}, logger=False)
        self.train_accuracy = MulticlassAccuracy(len(classes), average="micro", validate_args=False)
        self.train_loss = MeanMetric(nan_strategy="disable")
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        pixels, targets = batch
        logits = self.classifier(pixels)
        loss: torch.Tensor = self.criterion(logits, targets)
        self.train_accuracy.update(logits.detach(), targets.argmax(dim=1) if targets.is_floating_point() else targets)  # mixed: the greater share
        self.train_loss.update(loss.detach(), len(targets))
        return loss

    def on_train_epoch_start(self) -> None:
        self.train_loss.reset()
        self.train_accuracy.reset()

    def train_metrics(self) -> dict[str, float]:
        """Loss and accuracy over the batches of this epoch so far."""
        return {"train/loss": float(self.train_loss.compute()), "train/accuracy": float(self.train_accuracy.compute())}

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.train_metrics())  # once an epoch: Lightning's log costs a millisecond a call

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pixels, targets = batch
        self._seen.append((self.classifier(pixels), targets))

    def on_validation_epoch_end(self) -> None:
        logits, targets = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        if not torch.isfinite(logits).all():
            raise TrainingError("the network answers with numbers that are not finite", "lower optimizer.lr, or set trainer.gradient_clip_val=1.0")
        self.log("val/loss", self.val_criterion(logits, targets))
        table = PredictionTable(("",) * len(targets), targets.cpu().numpy(), logits.float().cpu().numpy(), self.classes)
        metrics = compute_metrics(table)
        self.log_dict({"val/accuracy": metrics.accuracy, "val/f1_macro": metrics.f1_macro}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        try:
            optimizer = self.make_optimizer(_decay_groups(self.classifier))
            if self.scheduler.build is None:
                return optimizer
            schedule = self.scheduler.build(optimizer, **self._length())
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the optimizer or the scheduler cannot be built ({error})", "see conf/optimizer and conf/scheduler") from error
        entry: dict[str, Any] = {"scheduler": schedule, "interval": self.scheduler.interval}
        if self.scheduler.monitor:  # a value that is there only after a validation
            entry |= {"monitor": self.scheduler.monitor, "frequency": self.trainer.check_val_every_n_epoch or 1}
        return {"optimizer": optimizer, "lr_scheduler": entry}

    def _length(self) -> dict[str, int]:
        if not self.scheduler.length:
            return {}
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ConfigError("this scheduler needs to know how long the run is", "set trainer.max_epochs, or use scheduler=constant")
        return {self.scheduler.length: max(_SHORTEST, int(steps))}


def _decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels only: decayed norms and biases only hurt (He et al., 2019, section 3.1)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": [parameter for parameter in parameters if parameter.ndim > 1]}]
    return [*groups, {"params": vectors, "weight_decay": 0.0}] if vectors else groups
