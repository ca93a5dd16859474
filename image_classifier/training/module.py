"""The Lightning module: one training step, and a validation with the metrics of every report."""

from __future__ import annotations

import copy
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from image_classifier.errors import TrainingError
from image_classifier.evaluation.metrics.compute import compute_metrics
from image_classifier.modeling.classifier import Classifier
from image_classifier.predictions import PredictionTable
from image_classifier.training.datamodule import Batch
from image_classifier.training.depthwise import depthwise_in_float32
from image_classifier.training.distillation import Teacher
from image_classifier.training.distributed import gather_rows
from image_classifier.training.optimizers.freezing import freeze_batch_norm, freeze_norm_stats, set_frozen
from image_classifier.training.optimizers.groups import parameter_groups
from image_classifier.training.optimizers.schedules import (
    OptimizerFactory,
    SchedulerSettings,
    build_optimizer_and_schedule,
    scaled_rates,
    warmup_factor,
)
from image_classifier.training.sharding import shard, unsharded


class ClassifierModule(pl.LightningModule):
    """Trains a classifier; logs train/loss, train/accuracy, val/loss, val/accuracy and val/f1_macro once an epoch."""

    def __init__(
        self,
        classifier: Classifier,
        *,
        criterion: nn.Module,
        make_optimizer: OptimizerFactory,
        scheduler: SchedulerSettings,
        classes: tuple[str, ...],
        blueprint: dict[str, Any],
        val_criterion: nn.Module | None = None,
        layer_decay: float = 1.0,
        frozen: frozenset[str] = frozenset(),
        keep_norm_stats: bool = False,
        teacher: Teacher | None = None,
    ) -> None:
        """The training of `classifier`.

        Args:
            classifier: The network, pixels to logits.
            criterion: Loss of logits [N, C] and targets int64 [N], or class probabilities [N, C] where images are
                mixed; also of embeddings [N, D] where it has `takes_embeddings`. Its parameters are trained too, and
                are not part of the classifier.
            make_optimizer: From parameter groups to an optimizer.
            scheduler: How the learning rate moves.
            classes: Their names, in order.
            blueprint: What `inference.checkpoint` needs to rebuild the classifier; plain containers only.
            val_criterion: The loss of `val/loss`, without class weights, so that runs compare; None: `criterion`.
            layer_decay: Factor of the learning rate from each layer to the one below it.
            frozen: Names of the classifier's parameters that are not trained; modules in which all are frozen stay in
                evaluation mode.
            keep_norm_stats: Whether batch normalisation keeps the mean and variance that it starts with.
            teacher: The network that this one learns from, besides the labels.
        """
        super().__init__()
        self.classifier = classifier
        self.criterion = criterion
        self.val_criterion = val_criterion or criterion
        self.make_optimizer = make_optimizer
        self.scheduler = scheduler
        self.classes = classes
        self.layer_decay = layer_decay
        self.frozen = frozen
        self.keep_norm_stats = keep_norm_stats
        self.teacher = teacher  # no module: it is neither trained nor part of a checkpoint
        self.save_hyperparameters({"blueprint": blueprint}, logger=False)
        self.train_accuracy = MulticlassAccuracy(len(classes), average="micro", validate_args=False)
        self.train_loss = MeanMetric(nan_strategy="disable")
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._warmup_steps = 0
        # Tuples, so that torch does not register what is in them a second time.
        self._unsharded: tuple[Classifier] | None = None
        self._upper: tuple[nn.Module] | None = None

    def configure_model(self) -> None:
        if self.device_mesh is not None and self._unsharded is None:
            self._unsharded = (copy.deepcopy(self.classifier),)
            shard(self.classifier, self.criterion, self.device_mesh["data_parallel"])

    def whole_classifier(self) -> Classifier:
        """Return the classifier with all weights on this device, also if they are sharded; all ranks must call this."""
        if self._unsharded is None:
            return self.classifier
        self._unsharded[0].load_state_dict(unsharded(self.classifier.state_dict()))
        return self._unsharded[0]

    def train_above(self, upper: nn.Module, frozen: frozenset[str]) -> None:
        """Train only the layers above a cut, from kept activations; `frozen` are the parameters below it."""
        self._upper = (upper,)
        self.frozen |= frozen
        set_frozen(self.classifier, frozen)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        pixels, targets = batch
        logits, loss = self.logits_and_loss(pixels, targets)
        # Of mixed images the class with the larger share counts.
        labels = targets.argmax(dim=1) if targets.is_floating_point() else targets
        self.train_accuracy.update(_labelled(logits.detach(), targets), labels)
        self.train_loss.update(loss.detach(), len(targets))
        return loss

    def logits_and_loss(self, pixels: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of a batch, float [N, C], and its loss."""
        embeddings = self._embed(pixels)
        if not getattr(self.criterion, "takes_embeddings", False):
            logits = self.classifier.classify(embeddings)
            loss = self.criterion(_labelled(logits, targets), targets)
        else:
            logits = self.classifier.classify(embeddings.detach() if self.criterion.head_apart else embeddings)
            loss = self.criterion(_labelled(logits, targets), targets, _labelled(embeddings, targets))
        return logits, self.teacher.joined(loss, logits, pixels) if self.teacher else loss

    def _embed(self, values: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of pixels uint8, or of kept activations bfloat16 (transfer/activations.py)."""
        with depthwise_in_float32(values.device):
            if self._upper is None or values.dtype == torch.uint8:
                return self.classifier.embed(values)
            if not torch.is_autocast_enabled(values.device.type):
                values = values.float()
            return torch.flatten(self._upper[0](values), 1)

    def on_train_start(self) -> None:
        self.freeze_norms()  # a run that resumes within an epoch does not start one

    def freeze_norms(self) -> None:
        """Keep the normalisation of frozen layers, and with `keep_norm_stats` of all, in evaluation mode."""
        freeze_norm_stats(self.classifier, self.frozen)
        if self.keep_norm_stats:
            freeze_batch_norm(self.classifier)

    def on_train_epoch_start(self) -> None:
        self.freeze_norms()
        self.train_loss.reset()
        self.train_accuracy.reset()

    @property
    def learning_rate(self) -> float:
        """The rate of the first parameter group at the next optimizer step, warm-up included."""
        rate = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        return rate * warmup_factor(self.trainer.global_step, self._warmup_steps)

    def train_metrics(self) -> dict[str, float]:
        """Return loss and accuracy over the batches of this epoch so far."""
        return {"train/loss": float(self.train_loss.compute()), "train/accuracy": float(self.train_accuracy.compute())}

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.train_metrics())  # once an epoch: Lightning's log costs a millisecond a call

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # A run always ends with a validation, wherever in an epoch its steps or its time end: else it could end without
        # a best checkpoint.
        trainer = self.trainer
        last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True
        if trainer.should_stop or (last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch):
            trainer.check_val_every_n_epoch = trainer.check_val_every_n_epoch and 1

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pixels, targets = batch
        # One view an image, also where the finished model averages several: this is cheaper, and epochs rank the same.
        logits = self.classifier.classify(self._embed(pixels))
        self._seen.append((logits, targets))

    def on_validation_epoch_end(self) -> None:
        logits, targets = (gather_rows(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        if not torch.isfinite(logits).all():
            raise TrainingError(
                f"the network's logits are not finite after step {self.trainer.global_step}, "
                f"learning rate {self.learning_rate:g}",
                "lower optimizer.lr, or set trainer.gradient_clip_val=1.0",
            )
        self.log("val/loss", self.val_criterion(logits, targets))
        table = PredictionTable(("",) * len(targets), targets.cpu().numpy(), logits.float().cpu().numpy(), self.classes)
        metrics = compute_metrics(table, resamples=0)
        self.log_dict({"val/accuracy": metrics.accuracy, "val/f1_macro": metrics.f1_macro}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.classifier, self.criterion, self.layer_decay)
        moves = build_optimizer_and_schedule(
            self.make_optimizer, groups, self.scheduler, self.trainer.estimated_stepping_batches
        )
        self._warmup_steps = moves.warmup_steps
        if moves.schedule is None:
            return moves.optimizer
        entry: dict[str, Any] = {"scheduler": moves.schedule, "interval": self.scheduler.interval}
        if self.scheduler.monitor:  # a value that is there only after a validation
            entry |= {"monitor": self.scheduler.monitor, "frequency": self.trainer.check_val_every_n_epoch or 1}
        return {"optimizer": moves.optimizer, "lr_scheduler": entry}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        with scaled_rates(optimizer, warmup_factor(self.trainer.global_step, self._warmup_steps)):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


def _labelled(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the rows of a batch that have targets: the first ones."""
    return values if len(values) == len(targets) else values[: len(targets)]
